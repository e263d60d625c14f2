"""A VAE's encoder or decoder on tiles of one picture, with what it takes from the whole picture held equal across the tiles.

Stable Diffusion's VAE looks at the whole picture in two places: group normalisation averages over it, and the attention in its middle sees
all of it. A tile by itself has other averages than its neighbour, which shifts the tone. So a reduced pass comes first: a mosaic of small
blocks from all over the picture, at full resolution and in their places, goes through the network and leaves its statistics. Normalised with these,
the tiles are measured: they tell by how much the mosaic's statistics are off at each layer, and what the attention's keys and values are.
Measured statistics by themselves would not do, since they change with the layers before, which were off as well. But by how much they are off is
much the same then. So the mosaic goes through the network again, and each layer's statistics are corrected by that in turn. Now the tiles run
for good. docs/performance.md compares it with other ways.

The network is copied shallowly, so that its layers and weights are shared, wherever they are, and nobody else notices.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 4
"""Side of the mosaic's blocks in cells: larger ones leave more of the picture out, smaller ones have more edges that are not the picture's."""

BORDER = 2
"""Cells along a mosaic's borders that stand for as many along the picture's, where activations are large: a mosaic has a larger share of border."""

MAX_KEYS = 4096
"""Cells outside a tile to which it attends, about."""

Moments = tuple[int, torch.Tensor, torch.Tensor]
"""Cells of the picture, and the mean and variance of each group over them, float32, (groups,)."""

Keys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values (1, n, C)."""


@dataclass(frozen=True)
class Part:
    """A rectangle of what goes through a network, in cells: rows and columns of an ``item`` of the batch. It stands for ``cells`` of the picture."""

    item: int
    rows: slice
    columns: slice
    cells: int


class WholePicture:
    """What the tiles of one picture share: statistics for each normalisation, keys and values for each attention."""

    def __init__(self):
        self.collecting = False
        self._learn: Callable[[nn.GroupNorm, Moments], None] | None = None
        self._parts: Sequence[Part] = ()
        self._size = (1, 1)
        self._statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._measured: dict[nn.Module, Moments] = {}
        self._keys: dict[nn.Module, Keys] = {}
        self._sampled: dict[nn.Module, Keys] = {}
        self._measured_keys: dict[nn.Module, list[Keys]] = {}
        self._cells = 0

    def collect(self, network: Callable[[torch.Tensor], torch.Tensor], reduced: torch.Tensor, size: tuple[int, int], scale: int = 1) -> None:
        """Run the reduced pass. Tiles that follow are parts of its picture.

        Args:
            reduced: (1, C, h, w), with ``scale`` elements for each cell along a side.
            size: height and width of the picture that it stands for, in cells.
        """
        self._statistics, self._keys, self._measured, self._measured_keys, self._cells = {}, {}, {}, {}, math.prod(size)
        self._run_reduced(network, reduced, size, scale, self._take)

    def measure(self, network: Callable[[torch.Tensor], object], tiles: torch.Tensor, parts: Sequence[Part], scale: int = 1) -> None:
        """Run tiles (n, C, h, w) for the statistics of their ``parts`` alone; those of all tiles cover the picture once. Nothing changes where it fails."""
        found: dict[nn.Module, Moments] = {}
        self._sampled = {}
        self._run(network, tiles, parts, scale, found.__setitem__)
        for norm, moments in found.items():
            self._measured[norm] = _pooled([self._measured[norm], moments]) if norm in self._measured else moments
        for block, sampled in self._sampled.items():
            self._measured_keys.setdefault(block, []).append(sampled)

    def correct(self, network: Callable[[torch.Tensor], torch.Tensor], reduced: torch.Tensor, size: tuple[int, int], scale: int = 1) -> None:
        """Run the reduced pass again, as in :meth:`collect`, with each layer's statistics corrected by what was measured."""
        self._run_reduced(network, reduced, size, scale, self._take_corrected)
        self._keys = {
            block: (torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1)) for block, found in self._measured_keys.items()
        }

    def _run_reduced(self, network, reduced: torch.Tensor, size: tuple[int, int], scale: int, learn) -> None:
        self.collecting = True
        try:
            self._run(network, reduced, _bands(_cells(reduced, scale), size), scale, learn)
        finally:
            self.collecting = False

    def _run(self, network, x: torch.Tensor, parts: Sequence[Part], scale: int, learn) -> None:
        self._parts, self._size, self._learn = parts, _cells(x, scale), learn
        try:
            network(x)
        finally:
            self._learn = None

    def _take(self, norm: nn.GroupNorm, found: Moments) -> None:
        self._statistics[norm] = found[1:]

    def _take_corrected(self, norm: nn.GroupNorm, found: Moments) -> None:
        (_, mean, var), (_, true_mean, true_var), (before_mean, before_var) = found, self._measured[norm], self._statistics[norm]
        growth = (var + norm.eps) / (before_var + norm.eps)
        self._statistics[norm] = mean + (true_mean - before_mean) * growth.sqrt(), true_var * growth

    def normalize(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Group normalisation of (B, C, h, w) with the whole picture's mean and variance."""
        if self._learn:
            self._learn(norm, _moments(x, norm.num_groups, self._parts, self._size))
        mean, var = (values.repeat_interleave(x.shape[1] // norm.num_groups) for values in self._statistics[norm])
        weight, bias = _affine(norm, x)
        return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)

    def attend(self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of tiles (B, n, C) over themselves and the whole picture, of which the mosaic's cells, or the measured tiles', are a sample.

        Each of the sample's cells stands for many outside the tile: its logit grows by the logarithm of their number.
        """
        if self.collecting:
            stride = math.ceil(k.shape[1] / MAX_KEYS)
            self._keys[block] = k[:, ::stride].contiguous(), v[:, ::stride].contiguous()
            return F.scaled_dot_product_attention(q, k, v)
        if self._learn:
            self._sampled[block] = self._sample(k), self._sample(v)
        tokens = q.shape[1]
        sample_k, sample_v = (t.expand(len(q), -1, -1) for t in self._keys[block])
        weight = math.log(max(self._cells - tokens, 1) / sample_k.shape[1])
        bias = F.pad(q.new_full((sample_k.shape[1],), weight), (tokens, 0)).expand(len(q), tokens, -1)
        return F.scaled_dot_product_attention(q, torch.cat([k, sample_k], 1), torch.cat([v, sample_v], 1), attn_mask=bias)

    def _sample(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, n, C) of the measured parts of (B, cells, C), as many as are the parts' share of MAX_KEYS."""
        cells, stride = tokens.unflatten(1, self._size), math.ceil(self._cells / MAX_KEYS)
        return torch.cat([cells[part.item, part.rows, part.columns].flatten(0, 1)[::stride] for part in self._parts])[None]


def _moments(x: torch.Tensor, groups: int, parts: Sequence[Part], size: tuple[int, int]) -> Moments:
    """Those of ``parts`` of (B, C, h, w) or (B, C, h * w), which has some elements for each cell of ``size``."""
    scale = math.isqrt(x[0, 0].numel() // math.prod(size))
    x = x.reshape(*x.shape[:2], size[0] * scale, size[1] * scale)
    found = []
    for part in parts:
        rows, columns = (slice(side.start * scale, side.stop * scale) for side in (part.rows, part.columns))
        cut = x[part.item, :, rows, columns].unflatten(0, (groups, -1)).float()
        var, mean = torch.var_mean(cut, dim=(1, 2, 3), correction=0)
        found.append((part.cells, mean, var))
    return _pooled(found)


def _pooled(moments: Sequence[Moments]) -> Moments:
    """Those of all cells together."""
    cells, mean, var = moments[0]
    for more, other_mean, other_var in moments[1:]:
        share = more / (cells + more)
        mean, var = mean + (other_mean - mean) * share, torch.lerp(var, other_var, share) + (other_mean - mean) ** 2 * share * (1 - share)
        cells += more
    return cells, mean, var


def _bands(size: tuple[int, int], whole: tuple[int, int]) -> list[Part]:
    """The parts of a mosaic of ``size`` cells that stand for the borders, corners and middle of the ``whole`` picture."""
    rows, columns = (_bands_along(length, standing_for) for length, standing_for in zip(size, whole, strict=True))
    return [Part(0, row, column, height * width) for row, height in rows for column, width in columns]


def _bands_along(length: int, whole: int) -> list[tuple[slice, int]]:
    """Along one axis: cells, and how many of the picture's they stand for."""
    inner = slice(BORDER, length - BORDER)
    if length >= whole or inner.stop <= inner.start:
        return [(slice(0, length), whole)]
    return [(slice(0, BORDER), BORDER), (inner, whole - 2 * BORDER), (slice(inner.stop, length), BORDER)]


def _cells(x: torch.Tensor, scale: int) -> tuple[int, int]:
    return x.shape[-2] // scale, x.shape[-1] // scale


def _affine(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias as the layer applies them, float32: asked of the layer itself, since they may be patched, cast or elsewhere.

    Of a probe with mean 0 and variance 1 the layer makes weight + bias where it is 1 and -weight + bias where it is -1.
    """
    probe = x.new_ones(1, x.shape[1], 1, 2)
    probe[..., 1] = -1
    plus, minus = norm(probe).float().flatten(1).view(-1, 2).unbind(1)
    return (plus - minus) / 2 * math.sqrt(1 + norm.eps), (plus + minus) / 2


class _SharedNorm(nn.Module):
    def __init__(self, norm: nn.GroupNorm, whole: WholePicture):
        super().__init__()
        self.norm, self.whole = norm, whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole.normalize(self.norm, x)


def share_whole_picture(network: nn.Module, whole: WholePicture, attention: Callable[[nn.Module, nn.Module, WholePicture], None]) -> nn.Module:
    """A shallow copy of ``network`` whose normalisations and attention use ``whole``.

    ``attention(copied, block, whole)`` is called with each copied module and its original, to replace the attention of those that have one.
    What the copy gets may hold the original, but not the copy: without circles all is gone with the last reference to the network.
    """
    if isinstance(network, nn.GroupNorm):
        return _SharedNorm(network, whole)
    if not network._modules:
        return network
    shared = copy.copy(network)
    shared._modules = {name: None if child is None else share_whole_picture(child, whole, attention) for name, child in network._modules.items()}
    attention(shared, network, whole)
    return shared


def mosaic(picture: torch.Tensor, cells: int, scale: int = 1) -> torch.Tensor:
    """Blocks from all over (B, C, H, W), which has ``scale`` elements for each cell along a side, put together to about ``cells`` cells.

    Rows and columns of blocks are spread evenly; each channel gets the whole picture's mean and deviation, of which they are a sample.
    A picture of no more than ``cells`` cells is its own mosaic.
    """
    height, width = (side // scale for side in picture.shape[-2:])
    reduction = math.sqrt(cells / (height * width))
    if reduction >= 1:
        return picture
    reduced = picture
    for dim, length in ((-2, height), (-1, width)):
        reduced = reduced.index_select(dim, _spread(length, reduction, scale).to(picture.device))
    (std, mean), (whole_std, whole_mean) = (torch.std_mean(part, dim=(-2, -1), keepdim=True) for part in (reduced, picture))
    # Where the blocks missed all that happens, what they have is not blown up.
    return (reduced - mean) * (whole_std / std.clamp(min=1e-6)).clamp(0.5, 2) + whole_mean


def _spread(length: int, reduction: float, scale: int) -> torch.Tensor:
    """Indices along one axis of blocks that cover ``reduction`` of ``length`` cells."""
    blocks = max(1, round(length * reduction / BLOCK))
    block = min(BLOCK, length)
    starts = [round((i + 0.5) * length / blocks - block / 2) for i in range(blocks)]
    return torch.cat([torch.arange(start * scale, (start + block) * scale) for start in starts])
