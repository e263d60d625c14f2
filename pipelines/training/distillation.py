"""Score distillation in latent space: variational (OSEDiff, eqs. 9 and 10; Wang et al., ProlificDreamer, NeurIPS 2023) and of the classifier alone
(PiSA-SR; Yu et al., ICLR 2024).

Two copies of the base judge the generator's latents. The frozen one knows what pictures look like; the regulariser learns, as a low-rank update,
what the generator's own latents look like. The difference of their predictions pulls the generator's latents towards pictures. Classifier score
distillation has no regulariser: the frozen one's own prediction for the negative prompt stands in its place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fewstep_sr.diffusion import NUM_TRAIN_TIMESTEPS, add_noise, alpha_bar_at, predict_x0

MIN_TIMESTEP, MAX_TIMESTEP = 20, 980
"""The distillation draws its timesteps from here (the first included, the last not); the regulariser's own loss from all."""

CLASSIFIER_TIMESTEPS = 20, 500
"""Of classifier score distillation, likewise (PiSA-SR, scripts/train/train_pisasr.sh: 0.02 and 0.5 of a thousand)."""

GUIDANCE = 7.5

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``noise_pred = denoiser(noisy_latents, timesteps, prompt_embeds)``."""


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
    negative_prompt_embeds: torch.Tensor | None,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """A loss whose gradient with respect to the latents is the distillation's (OSEDiff, eq. 10), times 2 / latents.numel().

    That gradient, (x0 of the regulariser - x0 of the frozen one) / mean distance of the latents to the frozen one's x0, goes through neither network:
    it depends on how they judge, not on how to change their judgement.

    Args:
        latents: (B, 4, h, w), the generator's, times the scaling factor.
        noise: standard normal, as ``latents``.
        timesteps: (B,), from 20 to 979.
        guidance: classifier-free guidance of the frozen one; 1 needs no negative prompt.
    """
    with torch.no_grad():
        alpha_bar = alpha_bar_at(timesteps, latents)
        noisy = add_noise(latents, noise, alpha_bar)
        x0_regulariser = predict_x0(noisy, regulariser(noisy, timesteps, prompt_embeds).float(), alpha_bar)
        noise_pred = frozen(noisy, timesteps, prompt_embeds).float()
        if guidance != 1:
            if negative_prompt_embeds is None:
                raise ValueError(f"negative_prompt_embeds: found none with guidance {guidance:g}. Give the negative prompt, or guidance 1.")
            negative = frozen(noisy, timesteps, negative_prompt_embeds).float()
            noise_pred = negative + guidance * (noise_pred - negative)
        target = _pulled(latents, x0_regulariser, predict_x0(noisy, noise_pred, alpha_bar))
    return F.mse_loss(latents, target)


def classifier_distillation_loss(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    frozen: Denoiser,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Classifier score distillation, by which PiSA-SR's semantic set learns (section 3.3, as its program computes it).

    As :func:`distillation_loss`, with the frozen network's prediction for the negative prompt in place of the regulariser's: what pulls is the
    guidance alone, and nothing does where both prompts predict the same.

    Args:
        latents: (B, 4, h, w), the generator's, times the scaling factor.
        timesteps: (B,), from 20 to 499.
        prompt_embeds, negative_prompt_embeds: what the pictures show, and what they shall not look like.
    """
    with torch.no_grad():
        alpha_bar = alpha_bar_at(timesteps, latents)
        noisy = add_noise(latents, noise, alpha_bar)
        positive, negative = (frozen(noisy, timesteps, embeds).float() for embeds in (prompt_embeds, negative_prompt_embeds))
        guided = negative + guidance * (positive - negative)
        target = _pulled(latents, predict_x0(noisy, negative, alpha_bar), predict_x0(noisy, guided, alpha_bar))
    return F.mse_loss(latents, target)


def _pulled(latents: torch.Tensor, x0_fake: torch.Tensor, x0_real: torch.Tensor) -> torch.Tensor:
    """Latents from which the gradient leads away: (fake - real) / mean distance of the latents to the real."""
    distance = (latents - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return latents - (x0_fake - x0_real) / distance


def regulariser_loss(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, regulariser: Denoiser, prompt_embeds: torch.Tensor
) -> torch.Tensor:
    """How well the regulariser predicts the noise in the generator's latents: the loss that it learns with (OSEDiff, eq. 9). The generator gets no gradient."""
    noisy = add_noise(latents.detach(), noise, alpha_bar_at(timesteps, latents))
    noise_pred = regulariser(noisy, timesteps, prompt_embeds)
    return F.mse_loss(noise_pred.float(), noise.float())
