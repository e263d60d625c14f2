"""What the values of an image may be: what the nodes and the pipelines check alike."""

import torch


def require_pixel_values(picture: torch.Tensor, name: str, beyond: float = 1.0) -> None:
    """Refuse pixels that are not finite, or not scaled to [0, 1]. Values outside by ``beyond`` at most, which bicubic enlargement makes, may be."""
    low, high = picture.amin(), picture.amax()  # unlike aminmax they make no copy
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(f"{name}: found values that are not numbers (NaN or infinity). Look at what made the picture.")
    if low < -beyond or high > 1 + beyond:
        raise ValueError(f"{name}: found values from {low:.4g} to {high:.4g}, expected [0, 1]. Divide 8-bit values by 255.")
