"""InvSR's noise predictor f_w(y0, t) (Yue et al., CVPR 2025): the low-quality picture and a timestep in, a noise map out.

A time-aware encoder of two or more resolution levels with self-attention after every residual block. It sees the picture at a quarter
of the output's size, two pixels per latent cell, and predicts mean and log-variance of the noise map. Module names are those of the
published weights (diffusers' conventions), so that a state dict loads as it is.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .indices import dimension, layer_counts
from .posterior import Posterior

# Not visible in the weights' shapes; the same in every published configuration.
HEAD_DIM = 64
NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class NoisePredictorConfig:
    """Dimensions of a noise predictor, all of them visible in its weights' shapes."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (256, 512)
    layers_per_block: tuple[int, ...] = (3, 3)
    time_channels: int = 256
    temb_channels: int = 512

    @property
    def pixels_per_cell(self) -> int:
        """Pixels of the low-quality picture for each side of a latent cell: 2 for the published two resolution levels."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, torch.Tensor]) -> "NoisePredictorConfig":
        """Read the dimensions off ``state_dict``. Raises ValueError where a tensor is missing or no network of this kind has its shape."""
        try:
            layers = layer_counts(state_dict, r"encoder\.down_blocks\.(\w+)\.resnets\.(\w+)\.conv1\.weight", "its encoder")
            moments = dimension(state_dict, "encoder.conv_out.weight", 0, ndim=4)
            config = cls(
                in_channels=dimension(state_dict, "encoder.conv_in.weight", 1, ndim=4),
                latent_channels=moments // 2,
                block_out_channels=tuple(
                    dimension(state_dict, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0, ndim=4) for i in range(len(layers))
                ),
                layers_per_block=layers,
                time_channels=dimension(state_dict, "encoder.time_embedding.linear_1.weight", 1, ndim=2),
                temb_channels=dimension(state_dict, "encoder.time_embedding.linear_1.weight", 0, ndim=2),
            )
        except ValueError as error:
            raise ValueError(f"noise predictor: {error}") from None
        if moments != 8 or config.in_channels != 3 or any(c % HEAD_DIM for c in config.block_out_channels) or config.time_channels % 2:
            raise ValueError(
                f"noise predictor: found {config.in_channels} input and {moments} output channels, blocks of {config.block_out_channels[:8]} and "
                f"{config.time_channels} time channels; expected 3 input channels, 8 output channels (mean and log-variance of 4), blocks of "
                f"multiples of {HEAD_DIM} and an even number of time channels."
            )
        return config


class NoisePredictor(nn.Module):
    """The network. ``operations`` supplies Linear, Conv2d and GroupNorm: ``torch.nn``, or ``comfy.ops`` under ComfyUI's memory management."""

    def __init__(self, config: NoisePredictorConfig, dtype: torch.dtype | None = None, device=None, operations=nn):
        super().__init__()
        self.config = config
        self.encoder = TimeAwareEncoder(config, operations=operations, dtype=dtype, device=device)

    def forward(self, image: torch.Tensor, timestep: int | torch.Tensor) -> Posterior:
        """Predict the noise map that makes ``image`` a state of the diffusion trajectory (the noise of InvSR's eq. 8).

        Args:
            image: low-quality picture (B, 3, 2h, 2w) in [-1, 1], ``config.pixels_per_cell`` (2) pixels for each side of the h x w latent cells.
            timestep: index of the noise schedule (0 to 999), a number or a tensor of shape (1,) or (B,).

        Returns:
            Posterior of shape (B, 4, h, w), in the scaled latent space in which the sampler works.

        Raises:
            ValueError: height or width covers no whole number of latent cells.
        """
        cell = self.config.pixels_per_cell
        if image.shape[-2] % cell or image.shape[-1] % cell:
            raise ValueError(
                f"image: found {image.shape[-1]} x {image.shape[-2]} pixels, expected multiples of {cell}: {cell} for each latent pixel."
            )
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.full((1,), timestep, device=image.device)  # filled there: no copy that waits for the device
        timestep = timestep.to(image.device).reshape(-1).expand(image.shape[0])
        return Posterior.from_moments(self.encoder(image, timestep))


class TimeAwareEncoder(nn.Module):
    def __init__(self, config: NoisePredictorConfig, operations, **kw):
        super().__init__()
        channels = config.block_out_channels
        self.time_channels = config.time_channels
        self.time_embedding = TimestepEmbedding(config.time_channels, config.temb_channels, operations, **kw)
        self.conv_in = operations.Conv2d(config.in_channels, channels[0], 3, padding=1, **kw)
        self.down_blocks = nn.ModuleList()
        for i, out_channels in enumerate(channels):
            in_channels = channels[max(i - 1, 0)]
            last = i == len(channels) - 1
            self.down_blocks.append(
                DownBlock(in_channels, out_channels, config.layers_per_block[i], config.temb_channels, not last, operations, **kw)
            )
        self.mid_block = MidBlock(channels[-1], config.temb_channels, operations, **kw)
        self.conv_norm_out = operations.GroupNorm(NORM_GROUPS, channels[-1], eps=NORM_EPS, **kw)
        self.conv_out = operations.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1, **kw)

    def forward(self, image: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedding(sinusoidal_embedding(timestep, self.time_channels).to(image.dtype))
        hidden = self.conv_in(image)
        for block in self.down_blocks:
            hidden = block(hidden, temb)
        hidden = self.mid_block(hidden, temb)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, operations, **kw):
        super().__init__()
        self.linear_1 = operations.Linear(in_channels, out_channels, **kw)
        self.linear_2 = operations.Linear(out_channels, out_channels, **kw)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


def sinusoidal_embedding(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Cosines, then sines of the timestep at geometrically spaced frequencies (Ho et al., 2020), shape (B, channels), float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, temb_channels: int, downsample: bool, operations, **kw):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, temb_channels, operations, **kw) for i in range(layers)
        )
        self.attentions = nn.ModuleList(SelfAttention(out_channels, operations, **kw) for _ in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, operations, **kw)] if downsample else [])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for resnet, attention in zip(self.resnets, self.attentions):
            hidden = attention(resnet(hidden, temb))
        for downsample in self.downsamplers:
            hidden = downsample(hidden)
        return hidden


class MidBlock(nn.Module):
    def __init__(self, channels: int, temb_channels: int, operations, **kw):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, temb_channels, operations, **kw) for _ in range(2))
        self.attentions = nn.ModuleList([SelfAttention(channels, operations, **kw)])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        before, after = self.resnets
        return after(self.attentions[0](before(hidden, temb)), temb)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, operations, **kw):
        super().__init__()
        self.norm1 = operations.GroupNorm(NORM_GROUPS, in_channels, eps=NORM_EPS, **kw)
        self.conv1 = operations.Conv2d(in_channels, out_channels, 3, padding=1, **kw)
        self.time_emb_proj = operations.Linear(temb_channels, out_channels, **kw)
        self.norm2 = operations.GroupNorm(NORM_GROUPS, out_channels, eps=NORM_EPS, **kw)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **kw)
        self.conv_shortcut = operations.Conv2d(in_channels, out_channels, 1, **kw) if in_channels != out_channels else None

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return residual + self.conv2(F.silu(self.norm2(hidden)))


class SelfAttention(nn.Module):
    def __init__(self, channels: int, operations, **kw):
        super().__init__()
        self.group_norm = operations.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, **kw)
        self.to_q = operations.Linear(channels, channels, **kw)
        self.to_k = operations.Linear(channels, channels, **kw)
        self.to_v = operations.Linear(channels, channels, **kw)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels, **kw)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        height = hidden.shape[-2]
        tokens = rearrange(self.group_norm(hidden), "b c h w -> b (h w) c")
        q, k, v = (rearrange(project(tokens), "b n (m d) -> b m n d", d=HEAD_DIM) for project in (self.to_q, self.to_k, self.to_v))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b m n d -> b n (m d)")
        return hidden + rearrange(self.to_out[0](attended), "b (h w) c -> b c h w", h=height)


class Downsample(nn.Module):
    def __init__(self, channels: int, operations, **kw):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, **kw)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # One row and one column of zeros at the bottom and right, as in the VAE's encoder.
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))
