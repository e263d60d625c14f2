"""What the two methods' trainings share."""

import torch
import torch.nn.functional as F
from torch import nn

from fewstep_sr.image.sizes import VAE_MULTIPLE, size_of

from .distillation import Denoiser


def enlarge(lq: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Low-quality pictures in the result's size, as the pipelines and 'Upscale Image By' enlarge them."""
    return F.interpolate(lq, size=tuple(size), mode="bicubic", align_corners=False)


def cells(pictures: torch.Tensor) -> tuple[int, int]:
    """Height and width of the latents of pictures whose sides are whole cells."""
    height, width = size_of(pictures)
    return height // VAE_MULTIPLE, width // VAE_MULTIPLE


def draw(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise of the shape of the pictures' latents, (B, 4, H / 8, W / 8), the same on every device."""
    return torch.randn((len(pictures), 4, *cells(pictures)), generator=generator).to(pictures, non_blocking=True)


def denoiser(unet: nn.Module) -> Denoiser:
    """The UNet as a function of float32 tensors, whatever its own precision."""
    dtype = next(unet.parameters()).dtype
    return lambda latents, timesteps, embeds: unet(latents.to(dtype), timesteps, encoder_hidden_states=embeds.to(dtype)).sample.float()


def sample_grid(lq: torch.Tensor, restored: torch.Tensor, hq: torch.Tensor) -> torch.Tensor:
    """A picture for people to look at, (3, height, width) in [0, 1]. A row for each: low quality enlarged (bicubic), restored, high quality."""
    rows = torch.cat([enlarge(lq, size_of(hq)), restored.to(hq), hq], dim=-1)
    return torch.cat(list(rows), dim=-2).clamp(0, 1)
