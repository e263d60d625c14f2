"""Stable Diffusion's noise schedule and its forward process, in both parameterisations that the field uses: each formula once.

The papers write a state as z_t = sqrt(a) z_0 + sqrt(1 - a) eps, with a the cumulative product of alphas at timestep t ("variance preserving").
Samplers such as ComfyUI's and diffusers' Euler keep it divided by sqrt(a), which is z_0 + sigma eps ("sigma space"). Latents are multiplied
by the VAE's scaling factor in both. Wherever ``alpha_bar`` is an argument it is a number, or a tensor that broadcasts against the latents.

Timesteps are indices of the schedule, 0 (almost clean) to 999 (almost noise).
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from .lazy import torch

NUM_TRAIN_TIMESTEPS = 1000

Level = TypeVar("Level", float, "torch.Tensor")
"""A noise level: one for all latents, or a tensor that broadcasts against them."""


@cache
def alphas_cumprod() -> torch.Tensor:
    """The cumulative product of alphas, shape (1000,), float32: "scaled linear" betas from 0.00085 to 0.012 (Rombach et al., CVPR 2022)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


@cache
def sigmas() -> torch.Tensor:
    """:func:`sigma_of` each timestep, shape (1000,), float32, ascending."""
    return sigma_of(alphas_cumprod().double()).float()


def alpha_bar_at(timesteps: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    """The schedule at ``timesteps`` (B,) or a single one, shaped (B, 1, 1, 1), on the device and in the dtype of ``like``."""
    index = torch.as_tensor(timesteps, device=like.device).reshape(-1)
    return alphas_cumprod().to(like, non_blocking=True)[index].view(-1, 1, 1, 1)


def sigma_of(alpha_bar: Level) -> Level:
    """Standard deviation of the noise relative to the signal, sqrt((1 - a) / a)."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def alpha_bar_of(sigma: Level) -> Level:
    """Inverse of :func:`sigma_of`, 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma**2)


def add_noise(z0: torch.Tensor, noise: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """Forward process, z_t = sqrt(a) z_0 + sqrt(1 - a) eps (Ho et al., NeurIPS 2020, eq. 4), (B, 4, h, w)."""
    return alpha_bar**0.5 * z0 + (1 - alpha_bar) ** 0.5 * noise


def predict_x0(z_t: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The clean latents that a state and the noise predicted in it imply, z_0 = (z_t - sqrt(1 - a) eps) / sqrt(a) (Ho et al., 2020, eq. 15)."""
    return (z_t - (1 - alpha_bar) ** 0.5 * noise_pred) / alpha_bar**0.5


def to_sigma_space(z_t: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """A state as Euler samplers keep it, z_t / sqrt(a) = z_0 + sigma eps."""
    return z_t / alpha_bar**0.5


def from_sigma_space(state: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """A sampler's state as the papers write it and the UNet takes it, sqrt(a) (z_0 + sigma eps) = z_t."""
    return alpha_bar**0.5 * state


def sigma_to_index(sigma: float) -> int:
    """The timestep whose sigma is nearest (in log sigma, as samplers space it).

    Raises ValueError where none is near: a sigma of zero or outside the schedule has no timestep.
    """
    schedule = sigmas()
    low, high = schedule[0].item(), schedule[-1].item()
    if not low * 0.999 <= sigma <= high * 1.001:
        raise ValueError(
            f"sigma {sigma:.6g} is outside Stable Diffusion's noise schedule ({low:.6g} to {high:.6g}). Wire the SIGMAS of 'Few-Step Scheduler' here."
        )
    return int((schedule.log() - torch.tensor(sigma).log()).abs().argmin())
