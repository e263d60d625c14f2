"""Training of a small diffusion UNet of Stable Diffusion's shape, with one fixed prompt, as a base for the methods."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from fewstep_sr.diffusion import add_noise, alpha_bar_at, predict_x0
from pipelines.training import distillation
from pipelines.training.bases import PROMPT_FILE
from pipelines.training.common import denoiser, draw
from pipelines.training.latents import Encoder
from pipelines.training.task import Task


def small_unet(channels: tuple[int, ...] = (64, 64, 64), width: int = 64) -> UNet2DConditionModel:
    """A UNet with random weights, whose blocks add nothing yet; attention everywhere but at the highest resolution, heads of 32 channels.

    The first convolution adds constants, for the same reason as a small VAE's (:func:`tools.miniature.autoencoder.small_vae`).
    """
    lower = len(channels) - 1
    unet = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=tuple(channel // 32 for channel in channels),  # number of heads, in diffusers' naming
        use_linear_projection=True,
    )
    nn.init.normal_(unet.conv_in.bias)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
    return unet


def stable_diffusion_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise table."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="epsilon"
    )


class BaseUNetTask(Task):
    """Noise prediction on the latents of a frozen VAE (Ho et al., NeurIPS 2020, equation 14).

    ``low_timesteps`` draws timesteps as the square of even ones, so that half of them are below 250, where restoration happens.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, prompt_embeds: torch.Tensor, low_timesteps: bool = False):
        self.unet, self.vae, self.prompt_embeds = unet, vae.requires_grad_(False).eval(), prompt_embeds
        self.low_timesteps = low_timesteps
        self.frozen, self._encode = [vae], Encoder(vae)
        self.phases = {"unet": unet}

    def loss(self, phase, batch, generator):
        latents, noise = self._encode(batch["hq"], batch.get("number")).mean, draw(batch["hq"], generator)
        timesteps = distillation.draw_timesteps(len(latents), generator)
        if self.low_timesteps:
            timesteps = timesteps**2 // 1000
        timesteps = timesteps.to(latents.device, non_blocking=True)
        return distillation.regulariser_loss(latents, noise, timesteps, denoiser(self.phases[phase]), self._prompt(latents)), {}

    def sample(self, batch):
        """The pictures, and what one step makes of them from timesteps 200, 400 and 600."""
        latents = self._encode(batch["hq"]).mean
        noise = draw(batch["hq"], torch.Generator().manual_seed(0))
        rows = [torch.cat(list(batch["hq"]), -1)]
        for timestep in (200, 400, 600):
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            alpha_bar = alpha_bar_at(timestep, latents)
            noisy = add_noise(latents, noise, alpha_bar)
            x0 = predict_x0(noisy, denoiser(self.unet)(noisy, timesteps, self._prompt(latents)), alpha_bar)
            restored = self.vae.decode((x0 / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
            rows.append(torch.cat(list(restored / 2 + 0.5), -1))
        return torch.cat(rows, -2)

    def save(self, folder: Path) -> None:
        """A base in diffusers' layout, without text encoder."""
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        stable_diffusion_scheduler().save_pretrained(folder / "scheduler")
        save_file({"prompt_embeds": self.prompt_embeds.cpu().contiguous()}, folder / PROMPT_FILE)

    def _prompt(self, latents: torch.Tensor) -> torch.Tensor:
        return self.prompt_embeds.to(latents).expand(len(latents), -1, -1)
