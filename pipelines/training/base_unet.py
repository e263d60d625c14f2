"""Training of a small diffusion UNet of Stable Diffusion's shape, with one fixed prompt, as a base for the methods."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

PROMPT_EMBEDS = "prompt_embeds.safetensors"
"""File of a base without text encoder: its only prompt, ``prompt_embeds`` (1, tokens, width)."""


def small_unet(channels: tuple[int, ...] = (64, 64, 64), width: int = 64) -> UNet2DConditionModel:
    """A UNet with random weights; attention everywhere but at the highest resolution, heads of 32 channels."""
    lower = len(channels) - 1
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=tuple(channel // 32 for channel in channels),  # number of heads, in diffusers' naming
        use_linear_projection=True,
    )


def stable_diffusion_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise table."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="epsilon"
    )


class BaseUNetTask:
    """Noise prediction on the latents of a frozen VAE (Ho et al., NeurIPS 2020, equation 14)."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, prompt_embeds: torch.Tensor):
        self.unet, self.vae, self.prompt_embeds = unet, vae.requires_grad_(False).eval(), prompt_embeds
        self.scheduler = stable_diffusion_scheduler()
        self.phases: dict[str, nn.Module] = {"unet": unet}

    def loss(self, phase, batch, generator):
        latents = self._encode(batch["hq"])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        noise_pred = self.phases[phase](noisy, timesteps, self._prompt(latents)).sample
        return F.mse_loss(noise_pred.float(), noise.float()), {}

    def sample(self, batch):
        """The pictures, and what one step makes of them from timesteps 200, 400 and 600."""
        latents = self._encode(batch["hq"])
        rows = [torch.cat(list(batch["hq"]), -1)]
        for timestep in (200, 400, 600):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
            alpha = self.scheduler.alphas_cumprod[timestep].to(latents)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            noise_pred = self.unet(noisy, timestep, self._prompt(latents)).sample
            x0 = (noisy - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
            rows.append(torch.cat(list(self.vae.to(x0).decode(x0 / self.vae.config.scaling_factor).sample / 2 + 0.5), -1))
        return torch.cat(rows, -2)

    def save(self, folder: Path) -> None:
        """A base in diffusers' layout, without text encoder."""
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        self.scheduler.save_pretrained(folder / "scheduler")
        save_file({"prompt_embeds": self.prompt_embeds.cpu().contiguous()}, folder / PROMPT_EMBEDS)

    def _prompt(self, latents: torch.Tensor) -> torch.Tensor:
        return self.prompt_embeds.to(latents).expand(len(latents), -1, -1)

    @torch.no_grad()
    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vae.to(pictures.device).encode(pictures * 2 - 1).latent_dist.mean * self.vae.config.scaling_factor
