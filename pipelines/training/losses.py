"""The losses of InvSR's training besides L2: the Gaussian constraint and the discriminator's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sr.posterior import Posterior

LATENT_BOUND = 10.0
"""The discriminator sees latents clamped to this (InvSR)."""


def gaussian_constraint(posterior: Posterior) -> torch.Tensor:
    """Kullback-Leibler divergence of the noise map to the standard normal, mean over its values."""
    mean, logvar = posterior
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def hinge_loss(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """The discriminator's: each map of logits of real latents shall be above 1, each of fake ones below -1. Mean over values, then maps."""
    return torch.stack([0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) for r, f in zip(real, fake, strict=True)]).mean()


def adversarial_loss(fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the discriminator's logits cost the predictor: it wants them large."""
    return -torch.stack([logits.mean() for logits in fake]).mean()
