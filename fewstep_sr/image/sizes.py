"""Any picture size: pad by reflection to what the networks need, remember the real size, crop back."""

import torch

VAE_MULTIPLE = 8
"""Pixels per latent cell of Stable Diffusion's VAE."""

MIN_SIDE = 3 * VAE_MULTIPLE
"""Two cells are one after the UNet's first halving, and one cell leaves group normalisation nothing to average where a group is one channel."""


def size_of(image: torch.Tensor) -> tuple[int, int]:
    """Height and width of (..., H, W)."""
    height, width = image.shape[-2:]
    return height, width


def padded_side(size: int) -> int:
    """Pixels to which a side of ``size`` pixels is padded: whole latent cells, three at least."""
    return max(-(-size // VAE_MULTIPLE) * VAE_MULTIPLE, MIN_SIDE)


def reflect_pad(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Extend (B, C, H, W) to (B, C, height, width) at the bottom and right by reflection without repeating the border.

    Sides of any size work, a single pixel too: where one reflection is too short, it is reflected again.
    """
    return _reflect(_reflect(image, height, dim=-2), width, dim=-1)


def _reflect(image: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    length = image.shape[dim]
    if size < length:
        raise ValueError(f"cannot pad a side of {length} pixels to {size}: expected at least {length}.")
    if size == length:
        return image
    period = max(2 * (length - 1), 1)
    index = torch.arange(size, device=image.device) % period
    return image.index_select(dim, torch.minimum(index, period - index).clamp(max=length - 1))


def same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (height, width) may be one picture's: within a tenth, and sides under 16 are too coarse to tell."""
    (height, width), (other_height, other_width) = size, other
    return min(*size, *other) < 16 or 0.9 < (width / height) / (other_width / other_height) < 1.1


def pad_for_vae(image: torch.Tensor) -> torch.Tensor:
    """:func:`reflect_pad` of (B, C, H, W) to the size that Stable Diffusion's VAE and UNet need."""
    return reflect_pad(image, padded_side(image.shape[-2]), padded_side(image.shape[-1]))
