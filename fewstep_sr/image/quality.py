"""How near an image is to its original: PSNR, SSIM and GMSD, which need no weights.

PSNR and SSIM are computed as the papers on these methods do: on the luma Y of ITU-R BT.601 in studio swing, over the whole image, without a border.
Images are (B, 3, H, W), RGB in [0, 1]; each function gives one number for each image, (B,), in float64.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from .color import LUMA

_STUDIO_SWING = (65.481, 128.553, 24.966)
_BLACK = 16.0
_WINDOW, _SIGMA = 11, 1.5
MIN_SIDE = _WINDOW
"""Pixels: SSIM's window must fit in."""


def to_8_bit(image: torch.Tensor) -> torch.Tensor:
    """The values that a file of 8 bits holds, still in [0, 1], float32. Published figures are of such files."""
    return (image.float().clamp(0, 1) * 255).round() / 255


def psnr(image: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in decibels, on Y, not rounded. The mean squared error counts 1e-8 at least, so that equal images have 80."""
    error = (_luma(image) - _luma(original)).double() / 255
    return -10 * torch.log10(error.square().mean((1, 2, 3)) + 1e-8)


def ssim(image: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004, eq. 13), on Y rounded to 8 bits: Gaussian window of 11 pixels with standard deviation 1.5, where it lies
    wholly inside; K1 = 0.01, K2 = 0.03. Structure of opposite sign counts as none.
    """
    x, y = (_luma(picture).round().double() for picture in (image, original))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = ((2 * covariance + c2) / (variances + c2)).clamp(min=0)
    return (luminance * structure).mean((1, 2, 3))


def gmsd(image: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude similarity deviation (Xue et al., IEEE TIP 2014, eqs. 1 to 6): 0 for equal images, the lower the better.

    On the luma rounded to 8 bits, averaged over squares of 2 x 2 pixels, with Prewitt's filters and the constant 170.
    """
    m_r, m_d = (_gradient(F.avg_pool2d(_gray(picture), 2)) for picture in (original, image))
    similarity = (2 * m_r * m_d + 170) / (m_r**2 + m_d**2 + 170)
    return similarity.flatten(1).std(1)


def _luma(image: torch.Tensor) -> torch.Tensor:
    """Y (B, 1, H, W) of BT.601 in [16, 235]."""
    return torch.einsum("c,bchw->bhw", torch.tensor(_STUDIO_SWING).to(image), image)[:, None] + _BLACK


def _gray(image: torch.Tensor) -> torch.Tensor:
    return rearrange((torch.einsum("c,bchw->bhw", torch.tensor(LUMA).to(image), image) * 255).round(), "b h w -> b 1 h w").double()


def _blur(image: torch.Tensor) -> torch.Tensor:
    """SSIM's Gaussian window, as two passes."""
    offsets = torch.arange(_WINDOW, dtype=image.dtype, device=image.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(image, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _gradient(image: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=image.dtype, device=image.device) / 3
    filters = torch.stack([kernel, kernel.T])[:, None]
    return F.conv2d(image, filters, padding=1).square().sum(1, keepdim=True).sqrt()


METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"psnr": psnr, "ssim": ssim, "gmsd": gmsd}


def compare(image: torch.Tensor, original: torch.Tensor) -> dict[str, torch.Tensor]:
    """All of :data:`METRICS` by name, of the values that files of 8 bits would hold, (B,) each.

    Args:
        original: (1 or B, 3, H, W).

    Raises:
        ValueError: sizes or batches differ, or a side is shorter than SSIM's window.
    """
    require_alike(image, original)
    image, original = to_8_bit(image), to_8_bit(original)
    rows = [{name: metric(one, other) for name, metric in METRICS.items()} for one, other in zip(*_pairs(image, original), strict=True)]
    return {name: torch.cat([row[name] for row in rows]) for name in METRICS}


def _pairs(image: torch.Tensor, original: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """One image at a time: batches of video are long, and SSIM takes several copies in float64."""
    return image.split(1), original.expand(len(image), -1, -1, -1).split(1)


def require_alike(image: torch.Tensor, original: torch.Tensor, names: tuple[str, str] = ("image", "original")) -> None:
    """Refuse what cannot be compared pixel by pixel.

    Raises:
        ValueError: as said.
    """
    (height, width), (other_height, other_width) = image.shape[-2:], original.shape[-2:]
    if (height, width) != (other_height, other_width):
        raise ValueError(
            f"{names[0]}: found {width} x {height} pixels, expected {other_width} x {other_height}, as {names[1]} has. "
            "Figures compare pixel by pixel: use images of one size."
        )
    if original.shape[0] not in (1, image.shape[0]):
        raise ValueError(f"{names[1]}: found {original.shape[0]} images, expected 1 or {image.shape[0]}, as many as in {names[0]}.")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{names[0]}: found {width} x {height} pixels, expected {MIN_SIDE} a side at least: SSIM's window must fit in.")
