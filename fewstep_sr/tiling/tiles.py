"""Overlapping tiles of a canvas, and windows that blend what a network made of each into one result.

A tile is cut, given to the network and blended away before the next one, so that memory depends on the tile and not on the canvas.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Tile:
    """A rectangle of the canvas, in cells."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, canvas: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """A view of the tile in (..., H, W), which has ``scale`` elements for each cell along a side."""
        return canvas[..., self.top * scale : (self.top + self.height) * scale, self.left * scale : (self.left + self.width) * scale]


@dataclass(frozen=True)
class TileLayout:
    """Equal overlapping tiles that cover a canvas of ``height`` x ``width`` cells.

    Tiles are as many as ``overlap`` demands and spread evenly, so that the last one is no sliver: where the canvas is no whole number of
    strides they overlap more. A side of the canvas that is no longer than ``tile`` is covered by one tile of its own length.

    Args:
        height, width: the canvas, in cells.
        tile: side of a tile, in cells.
        overlap: cells that neighbours share at least, fewer than ``tile``.
        margin: cells along a border with a neighbour that do not count in the blend, fewer than half the overlap.
    """

    height: int
    width: int
    tile: int
    overlap: int
    margin: int = 0

    def __post_init__(self):
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap: found {self.overlap} with tiles of {self.tile}, expected from 0 to {self.tile - 1}.")
        if self.margin and not 0 < 2 * self.margin < self.overlap:
            raise ValueError(f"margin: found {self.margin} with an overlap of {self.overlap}, expected less than half of it.")

    @cached_property
    def tops(self) -> list[int]:
        return self._starts(self.height)

    @cached_property
    def lefts(self) -> list[int]:
        return self._starts(self.width)

    def _starts(self, length: int) -> list[int]:
        if length <= self.tile:
            return [0]
        last = math.ceil((length - self.overlap) / (self.tile - self.overlap)) - 1
        return [round(i * (length - self.tile) / last) for i in range(last + 1)]

    @cached_property
    def tiles(self) -> list[Tile]:
        height, width = min(self.tile, self.height), min(self.tile, self.width)
        return [Tile(top, left, height, width) for top in self.tops for left in self.lefts]

    def window(self, tile: Tile, scale: int = 1, device: torch.device | None = None) -> torch.Tensor:
        """Weights (h, w) of a tile, float32, with ``scale`` elements for each cell along a side. The windows of all tiles add up to one.

        They fall to the borders that have a neighbour, as a squared sine over the overlap without its margins, and stay flat at the canvas's own borders.
        Those of all tiles go to ``device`` together, at the first call.
        """
        if (scale, device) not in self._axes:
            axes = (_windows(tuple(starts), side, scale, self.margin) for starts, side in ((self.tops, tile.height), (self.lefts, tile.width)))
            self._axes[scale, device] = tuple(axis.to(device) for axis in axes)
        rows, columns = self._axes[scale, device]
        return rows[self.tops.index(tile.top)][:, None] * columns[self.lefts.index(tile.left)]

    @cached_property
    def _axes(self) -> dict[tuple[int, torch.device | None], tuple[torch.Tensor, ...]]:
        """Windows along both axes, by scale and device."""
        return {}

    def share(self, tile: Tile) -> Tile:
        """The part of the canvas that is nearer to this tile's middle than to any neighbour's. The shares of all tiles cover the canvas once."""
        top, bottom = _share(self.tops, tile.top, tile.height)
        left, right = _share(self.lefts, tile.left, tile.width)
        return Tile(top, left, bottom - top, right - left)


def _share(starts: list[int], start: int, side: int) -> tuple[int, int]:
    number = starts.index(start)
    first = start if number == 0 else (starts[number - 1] + side + start) // 2
    last = start + side if number == len(starts) - 1 else (start + side + starts[number + 1]) // 2
    return first, last


def _windows(starts: tuple[int, ...], side: int, scale: int, margin: int) -> torch.Tensor:
    """Windows along one axis, (tiles, side * scale): products of these blend a grid, because its weights' sum is a product, too."""
    starts, side, margin = tuple(start * scale for start in starts), side * scale, margin * scale
    position = torch.arange(side, dtype=torch.float64) + 0.5
    windows = torch.ones(len(starts), side, dtype=torch.float64)
    for i, start in enumerate(starts):
        if i > 0:
            windows[i] *= _ramp(position, starts[i - 1] + side - start, margin)
        if i < len(starts) - 1:
            windows[i] *= _ramp(side - position, start + side - starts[i + 1], margin)
    total = torch.zeros(starts[-1] + side, dtype=torch.float64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + side] += window
    return torch.stack([window / total[start : start + side] for start, window in zip(starts, windows, strict=True)]).float()


def _ramp(distance: torch.Tensor, overlap: int, margin: int) -> torch.Tensor:
    """From 0 as far as ``margin`` from a border to 1 as far from the overlap's end."""
    return (((distance - margin) / (overlap - 2 * margin)).clamp(0, 1) * torch.pi / 2).sin() ** 2
