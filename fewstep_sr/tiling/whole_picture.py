"""A VAE's encoder or decoder on tiles of one picture, with what it takes from the whole picture held equal across the tiles.

Stable Diffusion's VAE looks at the whole picture in two places: group normalisation averages over it, and the attention in its middle sees
all of it. A tile by itself has other averages than its neighbour, which shifts the tone. So a reduced pass comes first: a mosaic of small
blocks from all over the picture, at full resolution and in their places, goes through the network and leaves its statistics. Every tile then is
normalised with these, and attends to the mosaic's keys and values besides its own. docs/performance.md compares it with other reduced passes.

The network is copied shallowly, so that its layers and weights are shared, wherever they are, and nobody else notices.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 4
"""Side of the mosaic's blocks in cells: larger ones leave more of the picture out, smaller ones have more edges that are not the picture's."""

MAX_KEYS = 4096
"""Cells of the mosaic to which a tile attends."""


class WholePicture:
    """What the tiles of one picture share: statistics for each normalisation, keys and values for each attention."""

    def __init__(self):
        self.collecting = False
        self._statistics: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._keys: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cells = 0

    def collect(self, network: Callable[[torch.Tensor], torch.Tensor], reduced: torch.Tensor, cells: int) -> None:
        """Run the reduced pass on ``reduced`` (1, C, h, w), which stands for a picture of ``cells`` cells. Tiles that follow are parts of that picture."""
        self._statistics, self._keys, self._cells = {}, {}, cells
        self.collecting = True
        try:
            network(reduced)
        finally:
            self.collecting = False

    def normalize(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Group normalisation of (B, C, h, w) with the whole picture's mean and variance."""
        if self.collecting:
            self._statistics[norm] = _group_statistics(x, norm.num_groups)
        mean, var = (values.repeat_interleave(x.shape[1] // norm.num_groups) for values in self._statistics[norm])
        weight, bias = _affine(norm, x)
        return F.batch_norm(x, mean, var, weight, bias, eps=norm.eps)

    def attend(self, block: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of tiles (B, n, C) over themselves and the whole picture, of which the mosaic's cells are a sample.

        Each of the sample's cells stands for many outside the tile: its logit grows by the logarithm of their number.
        """
        if self.collecting:
            stride = math.ceil(k.shape[1] / MAX_KEYS)
            self._keys[block] = k[:, ::stride].contiguous(), v[:, ::stride].contiguous()
            return F.scaled_dot_product_attention(q, k, v)
        tokens = q.shape[1]
        sample_k, sample_v = (t.expand(len(q), -1, -1) for t in self._keys[block])
        weight = math.log(max(self._cells - tokens, 1) / sample_k.shape[1])
        bias = F.pad(q.new_full((sample_k.shape[1],), weight), (tokens, 0)).expand(len(q), tokens, -1)
        return F.scaled_dot_product_attention(q, torch.cat([k, sample_k], 1), torch.cat([v, sample_v], 1), attn_mask=bias)


def _group_statistics(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each group of (1, C, h, w), float32, (groups,)."""
    var, mean = torch.var_mean(x.float().reshape(groups, -1), dim=1, correction=0)
    return mean, var


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
