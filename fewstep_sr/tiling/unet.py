"""A UNet's predictions on overlapping tiles of the latents, a few at a time, blended into one."""

from collections.abc import Callable, Sequence

import torch

from .batching import Runtime, run_in_groups
from .tiles import Tile, TileLayout

Item = tuple[int, Tile]
"""An image of the batch and a tile of it."""


def list_items(images: Sequence[int], layout: TileLayout) -> list[Item]:
    """Every tile of these images, in the order in which they are predicted."""
    return [(image, tile) for image in images for tile in layout.tiles]


def cut_items(latents: torch.Tensor, items: Sequence[Item]) -> torch.Tensor:
    """The tiles (n, C, h, w) out of latents (B, C, H, W)."""
    return torch.cat([tile.cut(latents[image : image + 1]) for image, tile in items])


def take(rows: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
    """``rows[images]`` along the batch axis, without an index that is copied to the device at each call."""
    return torch.cat([rows[image : image + 1] for image in images])


def predict_in_tiles(
    predict: Callable[[Sequence[Item]], Sequence[torch.Tensor]],
    blended: Sequence[torch.Tensor],
    layout: TileLayout,
    group: int,
    runtime: Runtime,
    images: Sequence[int] | None = None,
) -> None:
    """Predict every tile and add it to the results, weighted by its window.

    Args:
        predict: gives for a group of n items one tensor (n, C, h, w) for each of ``blended``.
        blended: zeros (B, C, H, W) to add to, one for each of the predictions that ``predict`` gives (one for each conditioning, say).
        group: how many items go into one call, fewer where memory runs out.
        images: those of the batch that are predicted, None for all; the others stay zeros.
    """
    items = list_items(range(len(blended[0])) if images is None else images, layout)

    def add(part: Sequence[Item]) -> None:
        for canvas, predictions in zip(blended, predict(part), strict=True):
            for (image, tile), prediction in zip(part, predictions.to(canvas.dtype), strict=True):
                tile.cut(canvas[image]).add_(prediction * layout.window(tile, device=prediction.device).to(prediction.dtype))

    run_in_groups(items, group, add, runtime, runtime.progress(len(items)))
