"""A VAE's encoder or decoder on tiles of one picture, with what it takes from the whole picture held equal across the tiles.

Stable Diffusion's VAE looks at the whole picture in two places: group normalisation averages over it, and the attention in its middle sees
all of it. A tile by itself has other averages than its neighbour, which shifts the tone. So a reduced pass comes first: a mosaic that stands for the
picture goes through the network and leaves its statistics, with which the tiles are normalised. While the tiles run, sums tell what the picture's
statistics are, and so by how much the mosaic's were off at each layer. Where that is too much, the mosaic goes through the network once more, each
layer's statistics are corrected by it, and the tiles run again. Measured statistics by themselves would not do, since they change with the layers
before, which were off as well; but by how much they are off is much the same then. docs/performance.md compares it with other ways.

The network is copied shallowly, so that its layers and weights are shared, wherever they are, and nobody else notices.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .mosaic import Mosaic, cells_of, spread_step

MAX_KEYS = 4096
"""Cells to which a tile attends besides its own, about."""

Statistics = tuple[torch.Tensor, torch.Tensor]
"""Mean and variance of each group, float32, (groups,)."""

Keys = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values (1, n, C), and the logarithms of their weights, (n,)."""

Share = tuple[slice, slice]
"""Rows and columns of a tile, in cells: what no other tile counts."""


class WholePicture:
    """What the tiles of one picture share: statistics for each normalisation, keys and values for each attention."""

    def __init__(self):
        self._mosaic: Mosaic | None = None
        self._weights: dict[tuple[int, int], torch.Tensor] = {}
        self._found: dict[nn.GroupNorm, Statistics] = {}
        self._statistics: dict[nn.GroupNorm, Statistics] = {}
        self._keys: dict[nn.Module, Keys] = {}
        self._sample = self._log_weights = torch.empty(0)
        self._cells = 0.0
        self._corrections: dict[nn.GroupNorm, tuple[Statistics, Statistics]] = {}
        self._sums: dict[nn.GroupNorm, torch.Tensor] = {}
        self._watched: dict[nn.GroupNorm, torch.Tensor] = {}
        self._tiles_keys: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._watched_keys: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._watching = False
        self._shares: Sequence[Share] = ()
        self._tile = (1, 1)
        self._picked = self._open_cells = torch.empty(0)
        self._masks: tuple[torch.Tensor, ...] = ()

    def collect(self, network: Callable[[torch.Tensor], object], mosaic: Mosaic) -> None:
        """Run the reduced pass. Tiles that follow are parts of the picture that ``mosaic`` stands for."""
        self._corrections = {}
        self._collect(network, mosaic)

    def watch(
        self, network: Callable[[torch.Tensor], torch.Tensor], tiles: torch.Tensor, shares: Sequence[Share], scale: int = 1, compiled: bool = False
    ) -> torch.Tensor:
        """The network's answer for tiles (n, C, h, w), with ``scale`` elements for each cell along a side, of whose ``shares`` sums and a sample of keys are kept.

        Those of all tiles cover the picture once. Nothing is kept where the network fails. A ``compiled`` network needs one graph for all tiles and pictures:
        what differs among them comes to it as tensors.
        """
        self._watched, self._watched_keys, self._shares, self._tile = {}, {}, shares, cells_of(tiles, scale)
        self._picked = self._pick(len(tiles))
        if compiled:
            self._masks, self._open_cells = self._mask_shares(), torch.full((1,), self._cells, device=self._device)
            self._keep_sizes_open()
        self._watching = True
        try:
            answer = network(tiles)
        finally:
            self._watching, self._masks = False, ()
        for norm, sums in self._watched.items():
            self._sums[norm] = self._sums[norm] + sums if norm in self._sums else sums
        for block, found in self._watched_keys.items():
            self._tiles_keys.setdefault(block, []).append(found)
        return answer

    def off(self) -> float:
        """By how much the mosaic's statistics are off from those of the watched tiles, in the picture's deviations, at the layer where it is most."""
        found = []
        for norm, (true_mean, true_var) in self._true().items():
            mean, var = self._statistics[norm]
            shift = (mean - true_mean).square() / (true_var + norm.eps)
            stretch = ((var + norm.eps) / (true_var + norm.eps)).log() / 2
            found.append((shift + stretch.square()).mean().sqrt())
        return torch.stack(found).max().item() if found else 0.0

    def correct(self, network: Callable[[torch.Tensor], object], mosaic: Mosaic) -> None:
        """Run the reduced pass again, each layer's statistics corrected by what the watched tiles had. Keys are theirs."""
        self._corrections, keys = {norm: (self._found[norm], true) for norm, true in self._true().items()}, self._tiles_keys
        self._collect(network, mosaic)
        for block, found in keys.items():
            k, v = (torch.cat(tensors, 1) for tensors in zip(*found, strict=True))
            self._keys[block] = k, v, k.new_full(k.shape[1:2], -math.log(k.shape[1]))

    def _true(self) -> dict[nn.GroupNorm, Statistics]:
        """The picture's statistics, by the sums of its watched tiles."""
        found = {}
        for norm, (count, total, squares) in self._sums.items():
            mean = total / count
            found[norm] = mean, (squares / count - mean.square()).clamp(min=0)
        return found

    def _collect(self, network: Callable[[torch.Tensor], object], mosaic: Mosaic) -> None:
        self._found, self._statistics, self._keys, self._sums, self._tiles_keys, self._mosaic = {}, {}, {}, {}, {}, mosaic
        self._cells = mosaic.cells
        self._sample, self._log_weights = mosaic.sample(MAX_KEYS)
        try:
            network(mosaic.picture)
        finally:
            self._mosaic, self._weights = None, {}

    def normalize(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Group normalisation of (B, C, h, w) or (B, C, h * w) with the whole picture's mean and variance."""
        if self._mosaic:
            self._found[norm] = self._moments(x, norm.num_groups, self._mosaic)
            self._statistics[norm] = self._corrected(norm, self._found[norm])
        elif self._watching:
            self._watched[norm] = (self._masked_sums_of if self._masks else self._sums_of)(x, norm.num_groups)
        mean, var = (values.repeat_interleave(x.shape[1] // norm.num_groups) for values in self._statistics[norm])
        weight, bias = _affine(norm, x)
        return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)

    def _corrected(self, norm: nn.GroupNorm, found: Statistics) -> Statistics:
        if norm not in self._corrections:
            return found
        (mean, var), ((before_mean, before_var), (true_mean, true_var)) = found, self._corrections[norm]
        growth = (var + norm.eps) / (before_var + norm.eps)
        return mean + (true_mean - before_mean) * growth.sqrt(), true_var * growth

    def _sums_of(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Of each group of the tiles' shares: how many elements, their sum and the sum of their squares, float32, (3, groups)."""
        scale = math.isqrt(x[0, 0].numel() // math.prod(self._tile))
        tiles = x.reshape(len(x), groups, -1, *(side * scale for side in self._tile))
        found = x.new_zeros(3, groups, dtype=torch.float32)
        for tile, share in zip(tiles, self._shares, strict=True):
            rows, columns = (slice(side.start * scale, side.stop * scale) for side in share)
            part = tile[:, :, rows, columns]
            found[0] += part[0].numel()
            found[1] += part.sum((1, 2, 3), dtype=torch.float32)
            found[2] += torch.linalg.vector_norm(part, dim=(1, 2, 3), dtype=torch.float32).square()
        return found

    def _masked_sums_of(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """The same of all elements, those outside the shares as zeros: a compiled network makes no copies for it."""
        rows, columns = self._masks if x.ndim == 3 else map(_stretch, self._masks, x.shape[2:])
        mask = (rows[:, :, None] & columns[:, None]).reshape(len(x), 1, 1, -1)
        counted = x.reshape(len(x), groups, x.shape[1] // groups, -1).float().where(mask, 0)
        count = (mask.sum(dtype=torch.float32) * counted.shape[2]).expand(groups)
        return torch.stack([count, counted.sum((0, 2, 3)), counted.square().sum((0, 2, 3))])

    def _mask_shares(self) -> tuple[torch.Tensor, ...]:
        """Of each tile the rows and the columns of its share, (tiles, h) and (tiles, w), made where they are needed."""
        masks = []
        for shares, length in zip(zip(*self._shares, strict=True), self._tile, strict=True):
            cells = torch.arange(length, device=self._device)
            masks.append(torch.stack([(cells >= share.start) & (cells < share.stop) for share in shares]))
        return tuple(masks)

    def _pick(self, tiles: int) -> torch.Tensor:
        """Which of all tiles' cells are kept as keys, (n,): of each tile's share as many as are its part of MAX_KEYS."""
        cells = torch.arange(tiles * math.prod(self._tile), device=self._device).view(-1, *self._tile)
        shares = [tile[share] for tile, share in zip(cells, self._shares, strict=True)]
        return torch.cat([share.flatten()[:: spread_step(math.ceil(self._cells), MAX_KEYS, share.shape[1])] for share in shares])

    def _keep_sizes_open(self) -> None:
        """A compiled network gets no other graph where another tile has another size, or another picture another number of keys."""
        sides = [(mask, 1) for mask in self._masks] + [(self._picked, 0)]
        for k, v, log_weights in self._keys.values():
            sides += [(k, 1), (v, 1), (log_weights, 0)]
        for tensor, dim in sides:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)

    @property
    def _device(self) -> torch.device:
        """Where the network is, as the reduced pass has found it."""
        return next((mean.device for mean, _ in self._statistics.values()), torch.device("cpu"))

    def _moments(self, x: torch.Tensor, groups: int, mosaic: Mosaic) -> Statistics:
        """Mean and variance of each group over the picture that the mosaic's (1, C, h, w) or (1, C, h * w) stands for, float32, (groups,)."""
        scale = math.isqrt(x[0, 0].numel() // (len(mosaic.rows) * len(mosaic.columns)))
        size = len(mosaic.rows) * scale, len(mosaic.columns) * scale
        if size not in self._weights:
            self._weights[size] = mosaic.weights(*size).to(x.device)
        weights, found = self._weights[size], []
        for group in x.reshape(groups, -1, *size):  # one after the other, since each takes copies of it in float32
            group = group.float()
            mean = (group * weights).sum() / len(group)
            found.append(torch.stack([mean, ((group - mean).square_() * weights).sum() / len(group)]))
        mean, var = torch.stack(found, 1)
        return mean, var

    def attend(self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of tiles (B, n, C) over themselves and the whole picture, of which the mosaic's cells are a sample; the mosaic's own over that alone.

        Each of the sample's cells stands for many outside the tile: its logit grows by the logarithm of their number.
        """
        if self._mosaic:
            sample, log_weights = self._sample.to(k.device), self._log_weights.to(q)
            sample_k, sample_v, _ = self._keys[block] = k.index_select(1, sample), v.index_select(1, sample), log_weights
            return F.scaled_dot_product_attention(q, sample_k, sample_v, attn_mask=log_weights.expand(len(q), q.shape[1], -1))
        if self._watching:
            picked_k, picked_v = (t.flatten(0, 1).index_select(0, self._picked)[None] for t in (k, v))
            self._watched_keys[block] = picked_k, picked_v
        tokens = q.shape[1]
        *sampled, log_weights = self._keys[block]
        sample_k, sample_v = (t.expand(len(q), -1, -1) for t in sampled)
        outside = (self._open_cells - tokens).clamp(min=1).log().to(q) if self._masks else math.log(max(self._cells - tokens, 1))
        bias = F.pad(log_weights + outside, (tokens, 0)).expand(len(q), tokens, -1)
        return F.scaled_dot_product_attention(q, torch.cat([k, sample_k], 1), torch.cat([v, sample_v], 1), attn_mask=bias)


def _affine(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias as the layer applies them, float32: asked of the layer itself, since they may be patched, cast or elsewhere.

    Of a probe with mean 0 and variance 1 the layer makes weight + bias where it is 1 and -weight + bias where it is -1.
    """
    probe = x.new_ones(1, x.shape[1], 1, 2)
    probe[..., 1] = -1
    plus, minus = norm(probe).float().flatten(1).view(-1, 2).unbind(1)
    return (plus - minus) / 2 * math.sqrt(1 + norm.eps), (plus + minus) / 2


def _stretch(mask: torch.Tensor, length: int) -> torch.Tensor:
    """(n, cells) as (n, length), each cell being some elements."""
    return mask.index_select(1, torch.arange(length, device=mask.device) * mask.shape[1] // length)


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
