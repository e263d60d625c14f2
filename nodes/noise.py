"""A NOISE that is not random: the methods' start states in the form that ComfyUI's samplers take."""

from collections.abc import Callable

import comfy.utils
import torch


class PredictedNoise:
    """A fixed NOISE tensor (B, 4, h, w) on the CPU, in the sampler's scaled space.

    Args:
        require: raises ValueError where the sampler's latent is not the one that this noise goes with.
    """

    def __init__(self, noise: torch.Tensor, require: Callable[[torch.Tensor], None], seed: int = 0):
        self.noise = noise
        self.require = require
        self.seed = seed

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """The noise for ``input_latent``, repeated to its batch. Raises ValueError where the latent has another size."""
        samples = input_latent["samples"]
        if samples.shape[-2:] != self.noise.shape[-2:]:
            (h, w), (found_h, found_w) = self.noise.shape[-2:], samples.shape[-2:]
            raise ValueError(
                f"noise: it was made for a latent of {w} x {h} cells and met one of {found_w} x {found_h}. "
                "Wire the same LATENT into the start state and the sampler."
            )
        self.require(samples)
        return comfy.utils.repeat_to_batch_size(self.noise, samples.shape[0])
