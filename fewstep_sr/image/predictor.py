"""The low-quality picture in the size in which InvSR's noise predictor sees it."""

import torch
import torch.nn.functional as F

from .sizes import VAE_MULTIPLE, reflect_pad, same_proportions, size_of


def fit_picture(picture: torch.Tensor, size: tuple[int, int], cells: tuple[int, int], pixels_per_cell: int = 2) -> torch.Tensor:
    """Bring the picture to the enlarged one's size in the predictor's pixels, and pad it by reflection where the latent is.

    Args:
        picture: (B, 3, H, W), of any size.
        size: (height, width) in pixels of the enlarged picture, before padding.
        cells: (height, width) of its latent.
        pixels_per_cell: the predictor's pixels for each side of a latent cell.

    Returns:
        (B, 3, height, width), ``pixels_per_cell`` times ``cells``.

    Raises:
        ValueError: the two pictures' proportions differ, so that they are not one picture.
    """
    height, width = (max(1, round(side * pixels_per_cell / VAE_MULTIPLE)) for side in size)
    fitted = (height, width)
    if size_of(picture) != fitted:
        if not same_proportions(size_of(picture), fitted):
            raise ValueError(
                f"image: found {picture.shape[-1]} x {picture.shape[-2]} pixels, but the latent's picture has other proportions "
                f"({fitted[1]} x {fitted[0]} as the predictor sees it). Give the same picture, before it is upscaled."
            )
        picture = F.interpolate(picture, size=fitted, mode="bicubic", align_corners=False, antialias=True)
    return reflect_pad(picture, cells[0] * pixels_per_cell, cells[1] * pixels_per_cell)
