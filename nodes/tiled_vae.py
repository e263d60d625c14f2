"""ComfyUI's VAE on pictures of any size and number: whole where they fit into memory, else in tiles."""

import copy
from collections.abc import Callable
from functools import partial

import comfy.model_management
import torch
from comfy.ldm.models.autoencoder import DiagonalGaussianRegularizer, EmptyRegularizer
from comfy.ldm.modules.diffusionmodules.model import AttnBlock
from einops import rearrange

from ..fewstep_sr.image.sizes import pad_for_vae, padded_side
from ..fewstep_sr.tiling.vae import MIN_TILE, TiledCoder
from ..fewstep_sr.tiling.whole_picture import WholePicture
from .checks import LATENT_CHANNELS, PIXELS_PER_CELL
from .memory import vae_memory
from .page import quoted
from .per_image import each_vae
from .runtime import ComfyUI

MAX_TILE = 256
"""Side of the largest tiles that are chosen from free memory, in cells."""

MAX_GROUP = 4
"""Tiles in one call, so that memory does not grow with the picture or the batch."""


def encode_moments(vae, pictures: torch.Tensor, tile_size: int = 0) -> torch.Tensor:
    """Mean and log-variance (B, 8, h, w) of pictures (B, 3, H, W) in [0, 1], float32 on the CPU. Sides are padded to what the VAE needs.

    Args:
        tile_size: side of the tiles in pixels; 0 chooses from free memory, the whole picture where it fits.

    Raises:
        ValueError: the VAE has no posterior, or no tiles have this size.
    """
    moments = torch.empty(0)
    for own, images in each_vae(vae, len(pictures)):
        if images is None:
            return _encode(own, pictures, tile_size)
        coded = _encode(own, pictures[images], tile_size)
        moments = moments if len(moments) else coded.new_zeros(len(pictures), *coded.shape[1:])
        moments[images] = coded
    return moments


def _encode(vae, pictures: torch.Tensor, tile_size: int) -> torch.Tensor:
    network = vae.first_stage_model
    if not isinstance(getattr(network, "regularization", None), DiagonalGaussianRegularizer):
        raise ValueError(
            f"vae: found {type(network).__name__}, which has no posterior, expected Stable Diffusion's AutoencoderKL. Use the checkpoint's VAE."
        )
    unregularized = copy.copy(network)
    unregularized._modules = {**network._modules, "regularization": EmptyRegularizer()}
    moments = torch.zeros(len(pictures), 2 * LATENT_CHANNELS, *(padded_side(side) // PIXELS_PER_CELL for side in pictures.shape[-2:]))
    _run(vae, unregularized, "encode", lambda i: pad_for_vae(pictures[i : i + 1]), moments, vae.process_input, tile_size)
    return moments


def decode_pictures(vae, latents: torch.Tensor, tile_size: int = 0, clamp: bool = True) -> torch.Tensor:
    """Pictures (B, 3, 8h, 8w) of latents (B, 4, h, w), float32 on the CPU; ``tile_size`` as in :func:`encode_moments`.

    They are in [0, 1], and a little outside without ``clamp``.
    """
    pictures = torch.zeros(len(latents), 3, *(side * PIXELS_PER_CELL for side in latents.shape[-2:]))
    _run(vae, vae.first_stage_model, "decode", lambda i: latents[i : i + 1], pictures, lambda x: x, tile_size)
    for picture in pictures:
        picture.copy_(vae.process_output(picture) if clamp else picture / 2 + 0.5)
    return pictures


def _run(vae, network, method: str, source: Callable[[int], torch.Tensor], result: torch.Tensor, prepare: Callable, tile_size: int) -> None:
    """Add the network's answer for each picture of ``source`` to ``result``."""
    scale_in, scale_out = (PIXELS_PER_CELL, 1) if method == "encode" else (1, PIXELS_PER_CELL)
    memory_used = partial(vae_memory, vae, method)
    tile = _choose_tile(tile_size, vae, memory_used, *(side // scale_out for side in result.shape[-2:]))

    def to_dtype(part: torch.Tensor) -> torch.Tensor:
        return prepare(part).to(vae.vae_dtype)

    def call(network, part: torch.Tensor) -> torch.Tensor:
        return getattr(network, method)(part.to(vae.device)).float()

    def fitting(height: int, width: int) -> int:
        return min(MAX_GROUP, int(vae.patcher.get_free_memory(vae.device) // memory_used(height, width)))

    coder = TiledCoder(network, call, _share_attention, scale_in, scale_out, fitting, ComfyUI(), vae.device, prepare=to_dtype)
    coder.run(source, result, tile)


def _share_attention(copied, block, whole: WholePicture) -> None:
    if isinstance(block, AttnBlock):

        def attend(q, k, v):  # BCHW
            attended = whole.attend(block, *(rearrange(t, "b c h w -> b (h w) c") for t in (q, k, v)))
            return rearrange(attended, "b (h w) c -> b c h w", h=q.shape[-2])

        copied.optimized_attention = attend


def _choose_tile(tile_size: int, vae, memory_used: Callable[[int, int], int], height: int, width: int) -> int:
    """Side of the tiles in cells, and the VAE on its device with room for one.

    Without a ``tile_size`` it is the whole picture where that fits, else the largest tile that does.
    """
    if not isinstance(tile_size, int) or (tile_size and (tile_size < 128 or tile_size % 64)):
        raise ValueError(f"tile_size: found {quoted(tile_size)}, expected 0 or a multiple of 64 from 128 on.")
    total, whole = comfy.model_management.get_total_memory(vae.device), memory_used(height, width)
    side = tile_size // PIXELS_PER_CELL or (max(height, width) if whole < 0.8 * total else 64)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory_used(min(side, height), min(side, width)))
    if tile_size:
        return side
    free = vae.patcher.get_free_memory(vae.device)
    if whole <= free:
        return max(height, width, MIN_TILE)
    tile = MAX_TILE
    while tile > MIN_TILE and memory_used(min(tile, height), min(tile, width)) > free:
        tile -= 8
    return tile
