"""Colour correction: give a restored picture the colours of the low-quality one.

Pictures are (B, 3, H, W), RGB in [0, 1], content and reference of one size; results of ``adain`` and ``wavelet`` are not clamped.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def adain(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Adaptive instance normalisation (Huang and Belongie, ICCV 2017): the reference's mean and standard deviation per channel."""
    content_mean, content_std = _mean_std(content)
    reference_mean, reference_std = _mean_std(reference)
    return (content - content_mean) / content_std * reference_std + reference_mean


def _mean_std(image: torch.Tensor, eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = image.shape[-2] * image.shape[-1]
    # One pixel has no unbiased variance.
    variance = image.var(dim=(-2, -1), keepdim=True, correction=min(1, pixels - 1))
    return image.mean(dim=(-2, -1), keepdim=True), (variance + eps).sqrt()


def wavelet(content: torch.Tensor, reference: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """The content's detail on the reference's low frequencies: à trous wavelet transform of ``levels`` scales (StableSR, Wang et al., 2024)."""
    return content - _low_frequencies(content, levels) + _low_frequencies(reference, levels)


def _low_frequencies(image: torch.Tensor, levels: int) -> torch.Tensor:
    tap = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    channels = image.shape[1]
    kernel = torch.outer(tap, tap).expand(channels, 1, 3, 3)
    for level in range(levels):
        radius = 2**level
        image = F.conv2d(F.pad(image, (radius,) * 4, mode="replicate"), kernel, groups=channels, dilation=radius)
    return image


# ITU-R BT.601, studio swing, for RGB in [0, 1] and YCbCr in [0, 255].
_RGB_TO_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


def ycbcr(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The content's luma with the reference's chroma (BT.601), clamped to [0, 1] as MATLAB's conversion does.

    The conversion's offsets cancel, so only its matrix is needed.
    """
    forward = torch.tensor(_RGB_TO_YCBCR, dtype=torch.float64)
    luma = torch.zeros(3, 3, dtype=torch.float64)
    luma[0, 0] = 1
    take_luma = torch.linalg.inv(forward) @ luma @ forward
    take_chroma = torch.eye(3, dtype=torch.float64) - take_luma
    return (_mix(take_luma, content) + _mix(take_chroma, reference)).clamp(0.0, 1.0)


def _mix(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,bchw->bohw", matrix.to(image), image)


COLOR_FIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"adain": adain, "wavelet": wavelet, "ycbcr": ycbcr}


def fix_color(image: torch.Tensor, reference: torch.Tensor, method: str = "wavelet", strength: float = 1.0) -> torch.Tensor:
    """Correct ``image`` (B, 3, H, W) towards the colours of ``reference`` (1 or B, 3, h, w), in [0, 1], float32 computation.

    Args:
        image: the restored picture.
        reference: the low-quality picture, of any size: it is brought to the image's (bicubic, antialiased).
        method: ``"adain"`` (OSEDiff's default), ``"wavelet"`` or ``"ycbcr"`` (InvSR's options).
        strength: 0 leaves the image as it is, 1 is the full correction.

    Raises:
        ValueError: an unknown method, or a reference batch that is neither 1 nor the image's.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(COLOR_FIXES)}.")
    if reference.shape[0] not in (1, image.shape[0]):
        raise ValueError(f"reference: found a batch of {reference.shape[0]} pictures, expected 1 or {image.shape[0]}, as many as in image.")
    content = image.float()
    reference = reference.to(content)
    if reference.shape[-2:] != content.shape[-2:]:
        reference = F.interpolate(reference, size=content.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
    fixed = COLOR_FIXES[method](content, reference)
    return torch.lerp(content, fixed, strength).clamp(0.0, 1.0)


LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""


def is_gray(image: torch.Tensor) -> bool:
    """Whether every pixel of (B, 3, H, W) is a grey."""
    return torch.equal(image[:, 0], image[:, 1]) and torch.equal(image[:, 0], image[:, 2])


def to_gray(image: torch.Tensor) -> torch.Tensor:
    """The luma (ITU-R BT.601) of (B, 3, H, W) in all three channels."""
    return torch.einsum("c,bchw->bhw", torch.tensor(LUMA).to(image), image).unsqueeze(1).expand_as(image)
