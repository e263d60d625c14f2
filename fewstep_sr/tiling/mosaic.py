"""A small picture that stands for a large one, so that a network that runs on it finds the large one's statistics.

Blocks from all over the picture lie side by side, at full resolution and in their order. Where two of them meet, activations are those of an edge that the picture
does not have, so the cells there do not count. The others stand for as many cells as there are of their kind: a mosaic has a larger share of border than its
picture, and along borders activations are large.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

BLOCK = 6
"""Side of the mosaic's blocks in cells: larger ones are fewer, and stand less well for what is between them; smaller ones have more edges."""

EDGE = 1
"""Cells along a block's sides that do not count, since the picture goes on there and the block does not."""

BORDER = 3
"""Cells along the picture's borders that stand for themselves alone."""


@dataclass(frozen=True)
class Mosaic:
    """A picture that stands for a larger one.

    Args:
        picture: (1, C, h, w), with some elements for each cell along a side.
        rows, columns: how many of the larger picture's each row and column of cells stands for; 0 for those that do not count.
    """

    picture: torch.Tensor
    rows: Sequence[float]
    columns: Sequence[float]

    @classmethod
    def whole(cls, picture: torch.Tensor, scale: int = 1) -> "Mosaic":
        """A picture (1, C, H, W) that stands for itself."""
        height, width = cells_of(picture, scale)
        return cls(picture, [1.0] * height, [1.0] * width)

    @property
    def cells(self) -> float:
        """How many cells the larger picture has."""
        return sum(self.rows) * sum(self.columns)

    @property
    def is_whole(self) -> bool:
        """Whether it is the larger picture itself."""
        return len(self.rows) * len(self.columns) == self.cells

    def weights(self, height: int, width: int) -> torch.Tensor:
        """Of elements (height, width), each cell being some of them along a side, float32 where the picture is; their sum is 1."""
        along = []
        for weights, length in ((self.rows, height), (self.columns, width)):
            scale = length // len(weights)
            along.append(torch.tensor(weights).repeat_interleave(scale) / (sum(weights) * scale))
        return (along[0][:, None] * along[1]).to(self.picture.device)

    def sample(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of at most so many cells that count, in rows of the picture, and the logarithms of their weights, whose sum is 1."""
        columns = [column for column, weight in enumerate(self.columns) if weight]
        cells = [(row, column) for row, weight in enumerate(self.rows) if weight for column in columns]
        step = spread_step(len(cells), most, len(columns))
        weights = [self.rows[row] * self.columns[column] for row, column in cells[::step]]
        indices = [row * len(self.columns) + column for row, column in cells[::step]]
        return torch.tensor(indices), torch.tensor([math.log(weight / sum(weights)) for weight in weights])


def mosaic(picture: torch.Tensor, cells: int, scale: int = 1) -> Mosaic:
    """Blocks from all over (1, C, H, W), which has ``scale`` elements for each cell along a side, put together to at most ``cells`` cells, or 12 x 12.

    Rows and columns of blocks are spread evenly, the outer ones along the picture's borders. Each channel gets the whole picture's mean and deviation,
    of which they are a sample. A picture of no more than ``cells`` cells is its own mosaic.
    """
    sides = cells_of(picture, scale)
    if math.prod(sides) <= cells:
        return Mosaic.whole(picture, scale)
    shorter, longer = sorted(sides)
    short = _spread(shorter, round(shorter * math.sqrt(cells / math.prod(sides)) / BLOCK))
    long = _spread(longer, cells // len(short[0]) // BLOCK)
    reduced = picture
    (rows, row_weights), (columns, column_weights) = (short, long) if sides[0] == shorter else (long, short)
    for dim, indices in ((-2, rows), (-1, columns)):
        elements = torch.tensor([cell * scale + i for cell in indices for i in range(scale)])
        reduced = reduced.index_select(dim, elements.to(picture.device))
    result = Mosaic(reduced, row_weights, column_weights)
    weights = result.weights(*reduced.shape[-2:])
    mean = (reduced * weights).sum((-2, -1), keepdim=True)
    std = ((reduced - mean).square() * weights).sum((-2, -1), keepdim=True).sqrt()
    whole_std, whole_mean = torch.std_mean(picture, dim=(-2, -1), keepdim=True)
    # Where the blocks missed all that happens, what they have is not blown up.
    return replace(result, picture=(reduced - mean) * (whole_std / std.clamp(min=1e-6)).clamp(0.5, 2) + whole_mean)


def _spread(length: int, blocks: int) -> tuple[list[int], list[float]]:
    """Indices of the cells of so many blocks along one axis, two at least, and how many of ``length`` cells each of them stands for."""
    blocks = max(2, blocks)
    if blocks * BLOCK >= length:
        return list(range(length)), [1.0] * length
    starts = [round(i * (length - BLOCK) / (blocks - 1)) for i in range(blocks)]
    counted = [[start + EDGE, start + BLOCK - EDGE] for start in starts]
    counted[0][0], counted[-1][1] = BORDER, length - BORDER
    between = [BORDER, *((end + start) / 2 for (_, end), (start, _) in pairwise(counted)), length - BORDER]
    weights = dict.fromkeys((*range(BORDER), *range(length - BORDER, length)), 1.0)
    for (first, last), (start, end) in zip(counted, pairwise(between), strict=True):
        weights |= dict.fromkeys(range(first, last), (end - start) / (last - first))
    indices = [cell for start in starts for cell in range(start, start + BLOCK)]
    return indices, [weights.get(cell, 0.0) for cell in indices]


def spread_step(cells: int, most: int, width: int) -> int:
    """Between cells of rows of ``width`` of which at most so many are taken. Had it a divisor in common with the width, they would stand in columns."""
    step = math.ceil(cells / most)
    while math.gcd(step, width) > 1:
        step += 1
    return step


def cells_of(x: torch.Tensor, scale: int) -> tuple[int, int]:
    """Height and width in cells of (B, C, H, W), which has ``scale`` elements for each cell along a side."""
    return x.shape[-2] // scale, x.shape[-1] // scale
