"""The losses besides L1 and L2: the Gaussian constraint and the discriminator's of InvSR, and the likeness of pictures' edges and textures."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fewstep_sr.networks.posterior import Posterior

LATENT_BOUND = 10.0
"""The discriminator sees latents clamped to this (InvSR)."""


def gaussian_constraint(posterior: Posterior) -> torch.Tensor:
    """Kullback-Leibler divergence of the noise map to the standard normal, mean over its values."""
    return 0.5 * posterior.mean.square().mean() + variance_constraint(posterior)


def variance_constraint(posterior: Posterior) -> torch.Tensor:
    """The part of :func:`gaussian_constraint` that the variance has: how far it is from 1, whatever the mean. L2 alone would have no noise at all."""
    return 0.5 * (posterior.logvar.exp() - 1 - posterior.logvar).mean()


def hinge_loss(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """The discriminator's: each map of logits of real latents shall be above 1, each of fake ones below -1. Mean over values, then maps."""
    return torch.stack([0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) for r, f in zip(real, fake, strict=True)]).mean()


def adversarial_loss(fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the discriminator's logits cost the predictor: it wants them large."""
    return -torch.stack([logits.mean() for logits in fake]).mean()


def gradient_loss(a: torch.Tensor, b: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """Mean absolute error of the differences between neighbours, summed over rows and columns and ``scales`` halvings: edges count, not tone alone."""
    loss = a.new_zeros(())
    for _ in range(scales):
        for dim in (-2, -1):
            loss = loss + (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def gradient_similarity(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean gradient magnitude similarity of pictures (B, 3, H, W) in [0, 1], 1 for equal ones (Xue et al., TIP 2014, eq. 4, on luma at half the size).

    It compares how strong edges are, not where exactly light turns to dark: a picture that is unsure of its texture does better with some than with none.
    """
    magnitudes = [_gradient_magnitude(pictures) for pictures in (found, expected)]
    constant = 170 / 255**2
    product = magnitudes[0] * magnitudes[1]
    return ((2 * product + constant) / (magnitudes[0].square() + magnitudes[1].square() + constant)).mean()


def texture_loss(found: torch.Tensor, expected: torch.Tensor, scales: int = 2) -> torch.Tensor:
    """Mean distance, in natural logarithms, of how strong the fine detail of pictures (B, 3, H, W) in [-1, 1] is around each 8th pixel, at ``scales`` halvings.

    Detail is what a mean of 3 x 3 pixels takes out of the luma; its mean square is over 16 x 16 of the picture's pixels. Where texture can't be known, distances of pixels are least
    without any; this one is least with as much as there was. Detail below an eight-bit step is as good as none.
    """
    found, expected = _luma(found), _luma(expected)
    loss = found.new_zeros(())
    for scale in range(scales):
        side = 16 >> scale
        energies = [F.avg_pool2d((luma - F.avg_pool2d(luma, 3, 1, 1)).square()[..., 1:-1, 1:-1], side, side // 2) for luma in (found, expected)]
        floor = (2 / 255) ** 2
        loss = loss + ((energies[0] + floor) / (energies[1] + floor)).log().abs().mean() / scales
        found, expected = F.avg_pool2d(found, 2), F.avg_pool2d(expected, 2)
    return loss


def _luma(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * pictures.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _gradient_magnitude(pictures: torch.Tensor) -> torch.Tensor:
    """Prewitt's, of the luma of pictures (B, 3, H, W) at half their size."""
    luma = F.avg_pool2d(_luma(pictures), 2)
    across = pictures.new_tensor([[-1.0, 0.0, 1.0]] * 3) / 3
    gradients = F.conv2d(luma, torch.stack([across, across.T])[:, None], padding=1)
    return (gradients.square().sum(1) + 1e-8).sqrt()
