"""Discriminators: InvSR's of latents, a UNet with time and text that says of each part of a latent picture, at several scales, whether it is real; and one of pictures."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .options import DISCRIMINATOR_CHANNELS


class LatentDiscriminator(nn.Module):
    """Stable Diffusion's UNet in small, with a head of its own behind the middle and behind each level of the way up.

    Args:
        text_width: of the prompt embeddings.
        channels: of the levels, multiples of 32; the first level has no attention.
    """

    def __init__(self, text_width: int, channels: tuple[int, ...] = DISCRIMINATOR_CHANNELS):
        super().__init__()
        attention = len(channels) - 1
        self.unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=1,
            block_out_channels=channels,
            layers_per_block=(1, *(2,) * attention),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * attention),
            up_block_types=(*("CrossAttnUpBlock2D",) * attention, "UpBlock2D"),
            attention_head_dim=(8, *(16,) * attention),
            cross_attention_dim=text_width,
        )
        self.unet.conv_norm_out, self.unet.conv_out = None, nn.Identity()  # the heads take their place
        levels = [self.unet.mid_block, *self.unet.up_blocks]
        self.heads = nn.ModuleList(_head(width) for width in (channels[-1], *reversed(channels)))
        self._logits: list[torch.Tensor] = []
        for level, head in zip(levels, self.heads, strict=True):
            level.register_forward_hook(lambda _, inputs, hidden, head=head: self._logits.append(head(hidden)))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, 1, h', w') of latents (B, 4, h, w), from coarse to fine; large where they look real."""
        self._logits.clear()
        self.unet(latents, timesteps, encoder_hidden_states=prompt_embeds)
        return list(self._logits)


class PatchDiscriminator(nn.Module):
    """A discriminator of pictures that looks at patches alone (Isola et al., CVPR 2017), with spectral normalisation (Miyato et al., ICLR 2018).

    Beside the picture it sees what a mean of 3 x 3 pixels takes out of it, enlarged: texture is a small part of a picture's values.

    Args:
        channels: of the levels, each of half the size of the one before.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(6, channels[0], 3, padding=1)), nn.LeakyReLU(0.2)]
        for width, next_width in pairwise(channels):
            layers += [spectral_norm(nn.Conv2d(width, next_width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1)))

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, 1, h, w) of pictures (B, 3, H, W) in [-1, 1], in a list as :func:`~pipelines.training.losses.hinge_loss` wants them; large where they look real."""
        detail = pictures - F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return [self.layers(torch.cat([pictures, 8 * detail], 1))]


def _head(channels: int) -> nn.Sequential:
    groups = min(32, channels // 4)
    return nn.Sequential(
        nn.GroupNorm(groups, channels, eps=1e-5),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(groups, channels, eps=1e-5),
        nn.SiLU(),
        nn.Conv2d(channels, 1, 3, padding=1),
    )
