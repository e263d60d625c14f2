"""Colour correction: give a restored picture the colours of the low-quality one.

Pictures are (B, 3, H, W), RGB in [0, 1], content and reference of one size; only results of ``ycbcr`` are clamped.
"""

from __future__ import annotations

from collections.abc import Callable

from ..lazy import F, torch


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
    take_chroma = _take_chroma()
    take_luma = torch.eye(3, dtype=torch.float64) - take_chroma
    return (_mix(take_luma, content) + _mix(take_chroma, reference)).clamp(0.0, 1.0)


def luma(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The content's luma (BT.601), untouched, with the reference's chroma: the low frequencies of :func:`wavelet`, of the chroma alone.

    Unlike :func:`ycbcr`, which takes the chroma pixel by pixel, it leaves the reference's chroma noise and JPEG blocks behind.
    """
    return content + _mix(_take_chroma(), wavelet(content, reference) - content)


def _take_chroma() -> torch.Tensor:
    """The linear map (3, 3) of RGB that keeps Cb and Cr and sets the luma to 0."""
    forward = torch.tensor(_RGB_TO_YCBCR, dtype=torch.float64)
    chroma = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    return torch.linalg.inv(forward) @ chroma @ forward


def _mix(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,bchw->bohw", matrix.to(image), image)


def lab(content: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Colour transfer (Reinhard et al., IEEE CG&A 2001, eqs. 10 and 11) in CIELAB: :func:`adain` of lightness, a* and b*, which go together less than
    red, green and blue. What the transfer takes out of sRGB's gamut comes back outside [0, 1].
    """
    return lab_to_rgb(adain(rgb_to_lab(content), rgb_to_lab(reference)))


# IEC 61966-2-1 (sRGB), linear RGB to XYZ; each row is divided by the white point D65, so that white is (1, 1, 1).
_RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
# CIE 15:2004, section 8.2.1.1: (L*, a*, b*) + (16, 0, 0) is this matrix times (f(X), f(Y), f(Z)).
_F_TO_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
_DELTA = 6 / 29


def _matrix(rows: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _rgb_to_xyz() -> torch.Tensor:
    matrix = _matrix(_RGB_TO_XYZ)
    return matrix / matrix.sum(1, keepdim=True)


def rgb_to_lab(image: torch.Tensor) -> torch.Tensor:
    """sRGB (B, 3, H, W) in [0, 1] to CIELAB under D65: L* in [0, 100], a* and b*."""
    linear = torch.where(image <= 0.04045, image / 12.92, ((image.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    xyz = _mix(_rgb_to_xyz(), linear)
    f = torch.where(xyz > _DELTA**3, xyz.clamp(min=_DELTA**3) ** (1 / 3), xyz / (3 * _DELTA**2) + 4 / 29)
    return _mix(_matrix(_F_TO_LAB), f) - torch.tensor([16.0, 0.0, 0.0]).to(image)[:, None, None]


def lab_to_rgb(image: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`rgb_to_lab`, not clamped."""
    f = _mix(torch.linalg.inv(_matrix(_F_TO_LAB)), image + torch.tensor([16.0, 0.0, 0.0]).to(image)[:, None, None])
    xyz = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    linear = _mix(torch.linalg.inv(_rgb_to_xyz()), xyz)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


COLOR_FIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "adain": adain,
    "wavelet": wavelet,
    "ycbcr": ycbcr,
    "lab": lab,
    "luma": luma,
}
PIXEL_BY_PIXEL = frozenset({"wavelet", "ycbcr", "luma"})
"""Those that need the content's proportions of the reference; the others take only statistics from it."""


def fix_color(image: torch.Tensor, reference: torch.Tensor, method: str = "adain", strength: float = 1.0) -> torch.Tensor:
    """Correct ``image`` (B, 3, H, W) towards the colours of ``reference`` (1 or B, 3, h, w), in [0, 1], float32 computation.

    Args:
        image: the restored picture.
        reference: the low-quality picture, of any size: it is brought to the image's (bicubic, antialiased).
        method: ``"adain"`` (OSEDiff's default), ``"wavelet"``, ``"ycbcr"``, ``"lab"`` or ``"luma"``: a name in :data:`COLOR_FIXES`.
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
