"""Any picture size: pad by reflection to what the networks need, remember the real size, crop back."""

import torch


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


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


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """:func:`reflect_pad` of (B, C, H, W) to the next multiple of ``multiple`` on both sides."""
    return reflect_pad(image, round_up(image.shape[-2], multiple), round_up(image.shape[-1], multiple))
