"""A picture made smaller for its statistics: blocks from all over it at full resolution, and how much each of their elements counts.

Cutting a picture to blocks changes what a network makes of it in two ways that would spoil the statistics, both where its activations are large. A smaller picture
has a larger share of border, so a band along each border is kept as it is and the rest is thinned, and every element counts as many times as the picture has
of its kind. And blocks meet in seams that the picture does not have, so what lies within reach of one does not count.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

BLOCK = 8
"""Side of the blocks in cells, about: larger ones are spread over the picture more thinly, of smaller ones less lies beyond the seams' reach."""

BORDER = 4
"""Cells along each border that are kept."""

REACH, MAX_REACH = 2, 1
"""How far a seam reaches: elements of the coarsest resolution so far, and cells at most, lest too few be left."""


class Mosaic:
    """Blocks from all over a picture of ``height`` x ``width`` cells, of no more than ``cells`` cells together where both sides have 16 or more.

    Rows and columns of blocks are spread evenly and keep their places. A picture of no more than ``cells`` cells is its own mosaic.
    """

    def __init__(self, height: int, width: int, cells: int):
        self.rows, self.columns = (_Axis(length, kept) for length, kept in zip((height, width), _kept_sides(height, width, cells), strict=True))
        self._coarsest = math.inf

    def cut(self, picture: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The mosaic (B, C, h, w) of a picture (B, C, H, W), which has ``scale`` elements for each cell along a side.

        Each channel gets the whole picture's mean and standard deviation, of which the blocks are a sample.
        """
        if self.rows.complete and self.columns.complete:
            return picture
        rows, columns = (axis.elements(scale).to(picture.device) for axis in (self.rows, self.columns))
        reduced = picture.index_select(-2, rows).index_select(-1, columns)
        weights = self._weights(scale, 0).to(reduced)
        mean = (reduced * weights).sum((-2, -1), keepdim=True)
        std = ((reduced - mean).square_() * weights).sum((-2, -1), keepdim=True).sqrt()
        whole_std, whole_mean = torch.std_mean(picture, dim=(-2, -1), keepdim=True)
        # Where the blocks missed all that happens, what they have is not blown up.
        return (reduced - mean) * (whole_std / std.clamp(min=1e-6)).clamp(0.5, 2) + whole_mean

    def start(self) -> None:
        """A network begins with the mosaic: its seams have not spread yet."""
        self._coarsest = math.inf

    def weights(self, count: int) -> torch.Tensor:
        """How much each of ``count`` elements, row by row, of the network's activations counts, float32; they add up to one.

        Asked in the order of the network's layers, since a seam that has spread at a coarse resolution stays as wide at a finer one.
        """
        scale = math.isqrt(count // (len(self.rows.cells) * len(self.columns.cells)))
        self._coarsest = min(self._coarsest, scale)
        return self._weights(scale, min(REACH / self._coarsest, MAX_REACH)).flatten()

    def _weights(self, scale: int, reach: float) -> torch.Tensor:
        weights = self.rows.weights(scale, reach)[:, None] * self.columns.weights(scale, reach)
        return weights / weights.sum()


@dataclass(frozen=True)
class _Axis:
    """One axis of a mosaic that keeps about ``kept`` of ``length`` cells."""

    length: int
    kept: int

    @property
    def complete(self) -> bool:
        return self.kept >= self.length

    @cached_property
    def cells(self) -> torch.Tensor:
        """The picture's cells that it has, in order."""
        if self.complete:
            return torch.arange(self.length)
        inner, taken = self.length - 2 * BORDER, self.kept - 2 * BORDER
        blocks = max(1, round(taken / BLOCK))
        starts = [BORDER + round((i + 0.5) * inner / blocks - taken // blocks / 2) for i in range(blocks)]
        parts = [
            torch.arange(BORDER),
            *(torch.arange(start, start + taken // blocks) for start in starts),
            torch.arange(self.length - BORDER, self.length),
        ]
        return torch.cat(parts)

    def elements(self, scale: int) -> torch.Tensor:
        return (self.cells[:, None] * scale + torch.arange(scale)).flatten()

    def weights(self, scale: int, reach: float) -> torch.Tensor:
        """How many of the picture's elements each of the mosaic's stands for, with ``scale`` of them for a cell: none within ``reach`` cells of a seam."""
        position = (torch.arange(len(self.cells) * scale) + 0.5) / scale
        seams = (self.cells.diff() != 1).nonzero() + 1
        counted = ((position - seams).abs() > reach).all(0)
        border = ((position < BORDER) | (position > len(self.cells) - BORDER)) & counted
        inner = counted & ~border
        return border + inner * ((self.length * scale - border.sum()) / inner.sum().clamp(min=1))


def _kept_sides(height: int, width: int, cells: int) -> tuple[int, int]:
    """Cells of each side that a mosaic of ``cells`` cells keeps, in proportion; a side that is short anyway keeps what its border bands and a block need."""
    if height * width <= cells:
        return height, width
    short, long = sorted((height, width))
    kept_short = max(int(short * math.sqrt(cells / (height * width))), min(short, 2 * BORDER + BLOCK))
    kept_long = min(max(cells // kept_short, 2 * BORDER + BLOCK), long)
    return (kept_short, kept_long) if height <= width else (kept_long, kept_short)
