"""Variational score distillation in latent space (OSEDiff, eqs. 6 to 9; Wang et al., ProlificDreamer, NeurIPS 2023).

Two copies of the base judge the generator's latents. The frozen one knows what pictures look like; the regulariser learns, as a low-rank update,
what the generator's own latents look like. The difference of their predictions pulls the generator's latents towards pictures.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fewstep_sr.methods.schedule import NUM_TRAIN_TIMESTEPS, alphas_cumprod

MIN_TIMESTEP, MAX_TIMESTEP = 20, 980
"""The distillation draws its timesteps from here (the first included, the last not); the regulariser's own loss from all."""

GUIDANCE = 7.5

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``noise_pred = denoiser(noisy_latents, timesteps, prompt_embeds)``."""


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The state at ``timesteps`` (B,): sqrt(a) * latents + sqrt(1 - a) * noise."""
    alpha = _alpha(timesteps, latents)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def predict_x0(noisy_latents: torch.Tensor, noise_pred: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The clean latents that the state and the predicted noise imply."""
    alpha = _alpha(timesteps, noisy_latents)
    return (noisy_latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()


def _alpha(timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return alphas_cumprod().to(like)[timesteps.to(like.device)].view(-1, 1, 1, 1)


def draw_timesteps(batch: int, generator: torch.Generator, low: int = 0, high: int = NUM_TRAIN_TIMESTEPS) -> torch.Tensor:
    """Timesteps (B,) from ``low`` to ``high - 1``, on the CPU."""
    return torch.randint(low, high, (batch,), generator=generator)


def distillation_loss(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    frozen: Denoiser,
    regulariser: Denoiser,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """A loss whose gradient with respect to the latents is the distillation's, times 2 / latents.numel().

    That gradient, (x0 of the regulariser - x0 of the frozen one) / mean distance of the latents to the frozen one's x0, goes through neither network:
    it depends on how they judge, not on how to change their judgement.

    Args:
        latents: (B, 4, h, w), the generator's, times the scaling factor.
        noise: standard normal, as ``latents``.
        timesteps: (B,), from 20 to 979.
        guidance: classifier-free guidance of the frozen one; 1 needs no negative prompt.
    """
    with torch.no_grad():
        noisy = add_noise(latents, noise, timesteps)
        x0_regulariser = predict_x0(noisy, regulariser(noisy, timesteps, prompt_embeds).float(), timesteps)
        noise_pred = frozen(noisy, timesteps, prompt_embeds).float()
        if guidance != 1:
            negative = frozen(noisy, timesteps, negative_prompt_embeds).float()
            noise_pred = negative + guidance * (noise_pred - negative)
        x0_frozen = predict_x0(noisy, noise_pred, timesteps)
        distance = (latents - x0_frozen).abs().mean(dim=(1, 2, 3), keepdim=True)
        target = latents - (x0_regulariser - x0_frozen) / distance
    return F.mse_loss(latents, target)


def regulariser_loss(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, regulariser: Denoiser, prompt_embeds: torch.Tensor
) -> torch.Tensor:
    """How well the regulariser predicts the noise in the generator's latents: the loss that it learns with. The generator gets no gradient."""
    noise_pred = regulariser(add_noise(latents.detach(), noise, timesteps), timesteps, prompt_embeds)
    return F.mse_loss(noise_pred.float(), noise.float())
