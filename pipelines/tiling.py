"""Large pictures and batches: the networks on tiles of a canvas, and on a few pictures at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import nn

from fewstep_sr.image.sizes import VAE_MULTIPLE, pad_for_vae, padded_side, size_of
from fewstep_sr.tiling.batching import Runtime
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.unet import Item, cut_items, predict_in_tiles
from fewstep_sr.tiling.vae import TiledCoder
from fewstep_sr.tiling.whole_picture import WholePicture

from .compiled import Compiler, call_plainly

GROUP_CELLS = 128**2
"""Latent cells in one call, where a single tile or picture has no more by itself: memory then does not grow with the batch."""


def fitting(height: int, width: int) -> int:
    """How many tiles or pictures of so many cells go through a network in one call."""
    return max(1, GROUP_CELLS // (height * width))


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``tile`` latent cells a side, those of the UNet with ``overlap``. What fits into one tile is not tiled; without a ``tile`` nothing is.

    With a ``compiler`` tiles and images go through the networks one at a time: other numbers of them would need graphs of their own.
    """

    tile: int | None = None
    overlap: int = 0
    compiler: Compiler | None = None

    def encode(self, vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device, runtime: Runtime) -> torch.Tensor:
        """Mean and log-variance (B, 8, h, w) of pictures (B, 3, H, W) in [0, 1] of any size, float32 on the CPU."""

        def prepare(part):
            return (part * 2 - 1).to(vae.dtype)

        def call(network, part):
            return network.encode(part.to(device)).latent_dist.parameters.float()

        def compiled(network, part):
            return self.call(_encode, part.to(device), network.encoder, network.quant_conv).float()

        whole = self._untiled(vae)
        channels, *sides = vae.config.latent_channels, *pictures.shape[-2:]
        moments = torch.zeros(len(pictures), 2 * channels, *(padded_side(side) // VAE_MULTIPLE for side in sides))
        compiles = compiled if self._compiles(whole) else None
        coder = TiledCoder(whole, call, _share_attention, VAE_MULTIPLE, 1, fitting, runtime, device, compiles, prepare)
        coder.run(lambda i: pad_for_vae(pictures[i : i + 1]), moments, self._side(moments))
        return moments

    def decode(self, vae: AutoencoderKL, latents: torch.Tensor, device: torch.device, runtime: Runtime) -> torch.Tensor:
        """Pictures (B, 3, 8h, 8w) in [-1, 1] of the VAE's own latents (B, 4, h, w), float32 on the CPU."""

        def prepare(part):
            return part.to(vae.dtype)

        def call(network, part):
            return network.decode(part.to(device)).sample.float()

        def compiled(network, part):
            return self.call(_decode, part.to(device), network.decoder, network.post_quant_conv).float()

        whole = self._untiled(vae)
        pictures = torch.zeros(len(latents), 3, *(side * VAE_MULTIPLE for side in latents.shape[-2:]))
        compiles = compiled if self._compiles(whole) else None
        coder = TiledCoder(whole, call, _share_attention, 1, VAE_MULTIPLE, fitting, runtime, device, compiles, prepare)
        coder.run(lambda i: latents[i : i + 1], pictures, self._side(latents))
        return pictures

    def predict(self, network: Callable[[torch.Tensor, list[int]], torch.Tensor], latents: torch.Tensor, runtime: Runtime) -> torch.Tensor:
        """The UNet's predictions for ``latents`` (B, 4, h, w), float32: ``network(tiles, pictures)`` is called with the tiles and whose they are."""
        layout = TileLayout(*size_of(latents), tile=self._side(latents), overlap=self.overlap)
        blended = torch.zeros_like(latents, dtype=torch.float32)

        def predict(items: Sequence[Item]) -> list[torch.Tensor]:
            return [network(cut_items(latents, items), [picture for picture, _ in items])]

        group = self.fitting(layout.tiles[0].height, layout.tiles[0].width)
        predict_in_tiles(predict, [blended], layout, group, runtime)
        return blended

    def call(self, function: Callable, image: torch.Tensor, *args, **kwargs) -> Any:
        """``function(image, ...)``, compiled where there is a compiler."""
        return (self.compiler or call_plainly)(function, image, *args, **kwargs)

    def _compiles(self, vae: AutoencoderKL) -> bool:
        """Whether a VAE is compiled: not where it has its own tiles or slices."""
        return self.compiler is not None and not (vae.use_tiling or vae.use_slicing)

    def fitting(self, height: int, width: int) -> int:
        """How many tiles or pictures of so many cells go through a network in one call."""
        return 1 if self.compiler else fitting(height, width)

    def _side(self, latents: torch.Tensor) -> int:
        return self.tile or max(latents.shape[-2:])

    def _untiled(self, vae: AutoencoderKL) -> AutoencoderKL:
        """The VAE, without the tiles and slices of its own that a user may have switched on where it is tiled here."""
        if self.tile is None:
            return vae
        untiled = copy.copy(vae)
        untiled.use_tiling = untiled.use_slicing = False
        return untiled


def _encode(image: torch.Tensor, encoder: nn.Module, quant_conv: nn.Module | None) -> torch.Tensor:
    moments = encoder(image)
    return moments if quant_conv is None else quant_conv(moments)


def _decode(latents: torch.Tensor, decoder: nn.Module, post_quant_conv: nn.Module | None) -> torch.Tensor:
    return decoder(latents if post_quant_conv is None else post_quant_conv(latents))


class _SharedAttention:
    """A processor for the attention in the middle of diffusers' VAE: one head, normalised before, added to what came in."""

    def __init__(self, block: Attention, whole: WholePicture):
        self.block, self.whole = block, whole

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, temb=None) -> torch.Tensor:
        x = rearrange(hidden_states, "b c h w -> b (h w) c")
        normalized = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        attended = self.whole.attend(self.block, attn.to_q(normalized), attn.to_k(normalized), attn.to_v(normalized))
        out = rearrange(attn.to_out[0](attended), "b (h w) c -> b c h w", h=hidden_states.shape[-2])
        return (out + hidden_states) / attn.rescale_output_factor


def _share_attention(copied, block, whole: WholePicture) -> None:
    if isinstance(block, Attention):
        copied.processor = _SharedAttention(block, whole)
