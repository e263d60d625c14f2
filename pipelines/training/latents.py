"""Latents of training pictures by a frozen VAE."""

import math

import torch
from diffusers import AutoencoderKL

from fewstep_sr.networks.posterior import Posterior


class Encoder:
    """A frozen VAE's posteriors. Those of crops that come again (``--crops``) are kept: encoding is most of what a step on small networks costs."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, pictures: torch.Tensor, numbers: torch.Tensor | None = None) -> Posterior:
        """
        Args:
            pictures: (B, 3, H, W) in [0, 1].
            numbers: of the crops (B,), where they come again.

        Returns:
            Posterior (B, 4, H / 8, W / 8) of the latents times the scaling factor, float32.
        """
        if numbers is None:
            return Posterior.from_moments(self._encode(pictures))
        kept: list[int] = numbers.tolist()
        new = [row for row, number in enumerate(kept) if number not in self._kept]
        if new:
            for row, moments in zip(new, self._encode(pictures[new]).cpu(), strict=True):
                self._kept[kept[row]] = moments.clone()
        return Posterior.from_moments(torch.stack([self._kept[number] for number in kept]).to(pictures.device))

    @torch.no_grad()
    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode((pictures * 2 - 1).to(self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return torch.cat([posterior.mean.float() * scale, posterior.logvar.float() + 2 * math.log(scale)], dim=1)
