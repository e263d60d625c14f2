"""Swin Transformer (Liu et al., ICCV 2021): self-attention inside windows that move by half a window from block to block.

The picture is square and of one size, at which the last stage is a single window. Module names are those of the published weights.
Position offsets and window masks are computed where they are needed: buffers would not follow weights that are loaded piece by piece.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .indices import dimension, layer_counts

PATCH = 4  # pixels along a side of the first stage's cells
MLP_RATIO = 4
MAX_STAGES = 8  # the channels double from one to the next
MASKED = -100.0  # the reference's stand-in for minus infinity, finite in half precision


@dataclass(frozen=True)
class SwinConfig:
    """Dimensions of a Swin Transformer, all of them visible in its weights' shapes. The defaults are Swin-L at 384 pixels."""

    embed_dim: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (6, 12, 24, 48)
    window_size: int = 12

    @property
    def image_size(self) -> int:
        """Side of the picture in pixels."""
        return PATCH * self.window_size * 2 ** (len(self.depths) - 1)

    @property
    def out_channels(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], prefix: str) -> "SwinConfig":
        """Read the dimensions off the entries under ``prefix``. Raises ValueError where one is missing or no network of this kind has its shape."""
        depths = layer_counts(state_dict, re.escape(prefix) + r"layers\.(\w+)\.blocks\.(\w+)\.norm1\.weight", prefix.rstrip("."))
        tables = [f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(len(depths))]
        rows = dimension(state_dict, tables[0], 0, ndim=2)
        config = cls(
            embed_dim=dimension(state_dict, f"{prefix}patch_embed.proj.weight", 0, ndim=4),
            depths=depths,
            num_heads=tuple(dimension(state_dict, table, 1, ndim=2) for table in tables),
            window_size=(math.isqrt(rows) + 1) // 2,
        )
        whole_heads = all(config.embed_dim * 2**i % heads == 0 for i, heads in enumerate(config.num_heads))
        if len(depths) > MAX_STAGES or (2 * config.window_size - 1) ** 2 != rows or not whole_heads:
            raise ValueError(
                f"{prefix.rstrip('.')}: found {len(depths)} stages from {config.embed_dim} channels on, with {config.num_heads[:8]} heads and {rows} "
                f"relative positions; expected at most {MAX_STAGES} stages, heads that divide the channels, and (2 w - 1)² positions."
            )
        return config


class SwinTransformer(nn.Module):
    """The network. ``operations`` supplies Linear, Conv2d and LayerNorm: ``torch.nn``, or ``comfy.ops`` under ComfyUI's memory management."""

    def __init__(self, config: SwinConfig, operations=nn, **kw):
        super().__init__()
        self.patch_embed: Any = nn.ModuleDict(
            {
                "proj": operations.Conv2d(3, config.embed_dim, PATCH, stride=PATCH, **kw),
                "norm": operations.LayerNorm(config.embed_dim, **kw),
            }
        )
        self.layers: Any = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            channels = config.embed_dim * 2**i
            stage: Any = nn.ModuleDict({"blocks": nn.ModuleList()})
            last = i == len(config.depths) - 1
            for j in range(depth):
                shift = config.window_size // 2 if j % 2 and not last else 0  # the last stage has but one window
                stage["blocks"].append(SwinBlock(channels, heads, config.window_size, shift, operations, **kw))
            if not last:
                stage["downsample"] = PatchMerging(channels, operations, **kw)
            self.layers.append(stage)
        self.norm = operations.LayerNorm(config.out_channels, **kw)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Features (B, 1 + n, C) of a picture (B, 3, side, side): the mean of all cells first, then the n cells of the last stage."""
        hidden = self.patch_embed["norm"](rearrange(self.patch_embed["proj"](image), "b c h w -> b h w c"))
        for stage in self.layers:
            for block in stage["blocks"]:
                hidden = block(hidden)
            if "downsample" in stage:
                hidden = stage["downsample"](hidden)
        cells = rearrange(self.norm(hidden), "b h w c -> b (h w) c")
        return torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)


class SwinBlock(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shift: int, operations, **kw):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = operations.LayerNorm(channels, **kw)
        self.attn = WindowAttention(channels, heads, window, operations, **kw)
        self.norm2 = operations.LayerNorm(channels, **kw)
        self.mlp = nn.ModuleDict(
            {"fc1": operations.Linear(channels, MLP_RATIO * channels, **kw), "fc2": operations.Linear(MLP_RATIO * channels, channels, **kw)}
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.shape[1] // self.window
        moved = self.norm1(hidden).roll((-self.shift, -self.shift), dims=(1, 2))
        windows = rearrange(moved, "b (y p) (x q) c -> b (y x) (p q) c", p=self.window, q=self.window)
        mask = shift_mask(hidden.shape[1], self.window, self.shift, hidden.device) if self.shift else None
        windows = self.attn(windows, mask)
        moved = rearrange(windows, "b (y x) (p q) c -> b (y p) (x q) c", y=rows, p=self.window)
        hidden = hidden + moved.roll((self.shift, self.shift), dims=(1, 2))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class WindowAttention(nn.Module):
    """Self-attention inside each window, with a learnt bias for every relative position (eq. 4)."""

    def __init__(self, channels: int, heads: int, window: int, operations, **kw):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads, **kw))
        self.qkv = operations.Linear(channels, 3 * channels, **kw)
        self.proj = operations.Linear(channels, channels, **kw)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Windows (B, w, n, C) of n cells each; ``mask`` (w, n, n) is added to the attention logits."""
        count = windows.shape[1]
        q, k, v = rearrange(self.qkv(windows), "b w n (three m d) -> three b (w m) n d", three=3, m=self.heads)
        table = self.relative_position_bias_table.to(windows)
        bias = rearrange(table[relative_positions(self.window, table.device)], "i j m -> 1 m i j")
        bias = bias.expand(count, -1, -1, -1) if mask is None else bias + mask.to(bias)[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=rearrange(bias, "w m i j -> 1 (w m) i j"))
        return self.proj(rearrange(attended, "b (w m) n d -> b w n (m d)", w=count))


class PatchMerging(nn.Module):
    """Four neighbouring cells become one of twice the channels."""

    def __init__(self, channels: int, operations, **kw):
        super().__init__()
        self.norm = operations.LayerNorm(4 * channels, **kw)
        self.reduction = operations.Linear(4 * channels, 2 * channels, bias=False, **kw)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(rearrange(hidden, "b (y p) (x q) c -> b y x (q p c)", p=2, q=2)))


def relative_positions(window: int, device) -> torch.Tensor:
    """For each pair of a window's n cells the row of the bias table that belongs to their offset, (n, n)."""
    cells = torch.cartesian_prod(*[torch.arange(window, device=device)] * 2)
    dy, dx = (cells[:, None] - cells[None, :] + window - 1).unbind(-1)
    return dy * (2 * window - 1) + dx


def shift_mask(side: int, window: int, shift: int, device) -> torch.Tensor:
    """Which cells of a window come from opposite edges of the moved picture and must not see each other, (w, n, n)."""
    band = torch.zeros(side, device=device)
    band[-window:-shift], band[-shift:] = 1, 2
    region = rearrange(3 * band[:, None] + band, "(y p) (x q) -> (y x) (p q)", p=window, q=window)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, MASKED)
