"""Diagonal Gaussian posteriors: of the VAE encoder over latents, of InvSR's noise predictor over noise maps."""

from reprlib import repr as shorten
from typing import NamedTuple

import torch


class Posterior(NamedTuple):
    """A diagonal Gaussian, ``mean`` and ``logvar`` of one shape (B, C, H, W)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    @classmethod
    def from_moments(cls, moments: torch.Tensor) -> "Posterior":
        """Split a network's output (B, 2C, H, W) into mean and log-variance, the latter clamped to [-30, 20] (Rombach et al., 2022)."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """Reparametrised draw, mean + std * noise; ``noise`` (1 or B, C, H, W) is standard normal."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


def draw_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standard normal (1, C, H, W) for a batch of shape (B, C, H, W), from a CPU generator: the same on every device.

    One draw serves all pictures of a batch, so that the frames of a still video stay still.

    Raises:
        ValueError: the seed is none.
    """
    try:
        generator = torch.Generator(device="cpu").manual_seed(seed)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"seed: found {shorten(seed)}, expected a whole number from 0 to 2**64 - 1.") from error
    return torch.randn((1, *shape[1:]), generator=generator, device="cpu", dtype=torch.float32)
