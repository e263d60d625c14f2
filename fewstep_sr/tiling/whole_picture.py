"""A VAE's encoder or decoder on tiles of one picture, with what it takes from the whole picture held equal across the tiles.

Stable Diffusion's VAE looks at the whole picture in two places: group normalisation averages over it, and the attention in its middle sees
all of it. A tile by itself has other averages than its neighbour, which shifts the tone. So a reduced pass comes first: a mosaic of blocks from all
over the picture (see mosaic.py) goes through the network and leaves its statistics. Every tile then is normalised with these, and attends to the
mosaic's keys and values besides its own. docs/performance.md compares it with other reduced passes.

The network is copied shallowly, so that its layers and weights are shared, wherever they are, and nobody else notices.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .mosaic import Mosaic

MAX_KEYS = 4096
"""Cells of the mosaic to which a tile attends."""


class WholePicture:
    """What the tiles of one picture share: statistics for each normalisation, keys and values for each attention."""

    def __init__(self):
        self.collecting = False
        self._statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._keys: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cells = 0
        self._mosaic: Mosaic | None = None

    def collect(self, network: Callable[[torch.Tensor], torch.Tensor], reduced: torch.Tensor, cells: int, mosaic: Mosaic | None = None) -> None:
        """Run the reduced pass on ``reduced`` (1, C, h, w), which stands for a picture of ``cells`` cells. Tiles that follow are parts of that picture.

        ``mosaic`` says how much each element of it counts; without one all count the same.
        """
        self._statistics, self._keys, self._cells, self._mosaic = {}, {}, cells, mosaic
        if mosaic is not None:
            mosaic.start()
        self.collecting = True
        try:
            network(reduced)
        finally:
            self.collecting = False

    def normalize(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Group normalisation of (B, C, h, w) with the whole picture's mean and variance."""
        if self.collecting:
            self._statistics[norm] = _group_statistics(x, norm.num_groups, self._weights(x.shape[2:].numel()).to(x.device))
        mean, var = (values.repeat_interleave(x.shape[1] // norm.num_groups) for values in self._statistics[norm])
        weight, bias = _affine(norm, x)
        return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)

    def _weights(self, count: int) -> torch.Tensor:
        """How much each of so many elements of the reduced pass counts."""
        return torch.full((count,), 1 / count) if self._mosaic is None else self._mosaic.weights(count)

    def attend(self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of tiles (B, n, C) over themselves and the whole picture, of which the mosaic's cells are a sample.

        Each of the sample's cells stands for many outside the tile: its logit grows by the logarithm of their number.
        """
        if self.collecting:
            sample = _sample(self._weights(k.shape[1]), min(k.shape[1], MAX_KEYS)).to(k.device)
            self._keys[block] = k[:, sample], v[:, sample]
            return F.scaled_dot_product_attention(q, *self._keys[block])
        tokens = q.shape[1]
        sample_k, sample_v = (t.expand(len(q), -1, -1) for t in self._keys[block])
        weight = math.log(max(self._cells - tokens, 1) / sample_k.shape[1])
        bias = F.pad(q.new_full((sample_k.shape[1],), weight), (tokens, 0)).expand(len(q), tokens, -1)
        return F.scaled_dot_product_attention(q, torch.cat([k, sample_k], 1), torch.cat([v, sample_v], 1), attn_mask=bias)


def _group_statistics(x: torch.Tensor, groups: int, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each group of (1, C, h, w), float32, (groups,), by the elements' weights (h * w,). One group at a time, to keep copies small."""
    means, variances = [], []
    for group in x.reshape(groups, -1, len(weights)):
        means.append((group.float() @ weights).mean())
        variances.append(((group.float() - means[-1]).square_() @ weights).mean())
    return torch.stack(means), torch.stack(variances)


def _sample(weights: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of ``count`` elements, spread evenly, each as often as its share in ``weights``, which add up to one."""
    positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(weights.double().cumsum(0), positions).clamp(max=len(weights) - 1)


def _affine(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias as the layer applies them, float32: asked of the layer itself, since they may be patched, cast or elsewhere.

    Of a probe with mean 0 and variance 1 the layer makes weight + bias where it is 1 and -weight + bias where it is -1.
    """
    probe = x.new_tensor([1.0, -1.0]).expand(1, x.shape[1], 1, 2).contiguous()
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
