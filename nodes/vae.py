"""VAE encode and decode that keep every picture's exact size."""

import copy

import comfy.model_management
import torch
from comfy.ldm.models.autoencoder import DiagonalGaussianRegularizer, EmptyRegularizer
from comfy_api.latest import io

from ..sr.canvas import pad_for_vae, padded_side
from ..sr.posterior import Posterior, draw_noise
from .checks import LATENT_CHANNELS, PIXELS_PER_CELL, require_finite, require_image, require_latent, require_vae

SIZE_KEY = "fewstep_sr_size"
"""LATENT's extra key: (height, width) in pixels of the picture that was encoded, before padding."""


def picture_size(latent: dict) -> tuple[int, int]:
    """Height and width in pixels of the picture in a LATENT, without the padding; the whole latent where it was resized since or is another node's."""
    height, width = (side * PIXELS_PER_CELL for side in latent["samples"].shape[-2:])
    known = latent.get(SIZE_KEY)
    if known and (padded_side(known[0]), padded_side(known[1])) == (height, width):
        return known
    return height, width


def _tile_size_input(what: str) -> io.Int.Input:
    return io.Int.Input(
        "tile_size",
        default=0,
        min=0,
        max=8192,
        step=64,
        advanced=True,
        tooltip=f"{what} in overlapping tiles of this many pixels (at least 128). 0: whole where it fits into free memory, else in the largest tiles that do.",
    )


def _choose_tile(tile_size: int, vae, memory_used, shape, pixels_per_unit: int) -> int:
    """Tile side in pixels, or 0 for the whole picture. ``shape`` is what goes into the VAE, one picture of it."""
    if tile_size and (tile_size < 128 or tile_size % 64):
        raise ValueError(f"tile_size: found {tile_size}, expected 0 or a multiple of 64 from 128 on.")
    if tile_size:
        return tile_size
    free = vae.patcher.get_free_memory(vae.device)
    if memory_used((1, *shape[1:]), vae.vae_dtype) <= free:
        return 0
    tile = 2048
    while tile > 256 and memory_used((1, shape[1], tile // pixels_per_unit, tile // pixels_per_unit), vae.vae_dtype) > free:
        tile //= 2
    return tile


class FewStepSRVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRVAEEncode",
            display_name="VAE Encode (Few-Step SR)",
            category="FewStepSR",
            description="Encodes an enlarged picture of any size. Sides are padded by reflection to whole latent cells, and the size is remembered, "
            "so that VAE Decode (Few-Step SR) gives exactly the size that went in.",
            search_aliases=["vae encode", "osediff", "invsr", "latent", "pad"],
            inputs=[
                io.Image.Input("pixels", tooltip="The low-quality picture, already enlarged to the output's size (Upscale Image By, bicubic, 4)."),
                io.Vae.Input("vae", tooltip="OSEDiff: the VAE from Load OSEDiff. InvSR: the checkpoint's own."),
                io.Combo.Input(
                    "posterior",
                    options=["mean", "sample"],
                    default="mean",
                    tooltip="mean: the same latent each time. sample: a draw with the seed, as the published programs do; the difference is small.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="For posterior 'sample' alone."),
                _tile_size_input("Encode"),
            ],
            outputs=[io.Latent.Output(tooltip="The picture's latent, which carries the real size.")],
        )

    @classmethod
    def execute(cls, pixels, vae, posterior="mean", seed=0, tile_size=0) -> io.NodeOutput:
        require_vae(vae)
        picture = require_image(pixels, "pixels")
        padded = pad_for_vae(picture)
        tile = _choose_tile(tile_size, vae, vae.memory_used_encode, padded.shape, 1)
        samples = _encode(_moments_vae(vae), padded.movedim(1, -1), tile).float()  # VAE takes BHWC
        samples = require_finite(samples, "VAE Encode (Few-Step SR)", "--fp32-vae or --bf16-vae")
        distribution = Posterior.from_moments(samples)
        latent = distribution.mean if posterior == "mean" else distribution.sample(draw_noise(distribution.mean.shape, seed))
        return io.NodeOutput({"samples": latent.contiguous(), SIZE_KEY: tuple(picture.shape[-2:])})


def _encode(vae, padded: torch.Tensor, tile: int) -> torch.Tensor:
    return vae.encode_tiled(padded, tile_x=tile, tile_y=tile, overlap=tile // 4) if tile else vae.encode(padded)


def _moments_vae(vae):
    """A shallow copy of VAE whose encode gives mean and log-variance (B, 8, h, w). Weights are shared; the given VAE stays as it is."""
    network = vae.first_stage_model
    if not isinstance(getattr(network, "regularization", None), DiagonalGaussianRegularizer):
        raise ValueError(
            f"vae: found {type(network).__name__}, which has no posterior, expected Stable Diffusion's AutoencoderKL. Use the checkpoint's VAE."
        )
    unregularized = copy.copy(network)
    unregularized._modules = {**network._modules, "regularization": EmptyRegularizer()}
    moments = copy.copy(vae)
    moments.first_stage_model = unregularized
    moments.latent_channels = 2 * LATENT_CHANNELS
    return moments


class FewStepSRVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRVAEDecode",
            display_name="VAE Decode (Few-Step SR)",
            category="FewStepSR",
            description="Decodes a latent and crops the padding that VAE Encode (Few-Step SR) added: the picture has exactly the size that went in.",
            search_aliases=["vae decode", "osediff", "invsr", "crop"],
            inputs=[
                io.Latent.Input("samples", tooltip="The restored latent."),
                io.Vae.Input("vae", tooltip="Any Stable Diffusion VAE; the one that encoded is a good choice."),
                _tile_size_input("Decode"),
            ],
            outputs=[io.Image.Output(tooltip="The picture, in [0, 1].")],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0) -> io.NodeOutput:
        require_vae(vae)
        latent = require_latent(samples, "samples")
        tile = _choose_tile(tile_size, vae, vae.memory_used_decode, latent.shape, PIXELS_PER_CELL) // PIXELS_PER_CELL
        images = vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=tile // 4) if tile else vae.decode(latent)
        height, width = picture_size(samples)
        images = require_finite(images[:, :height, :width], "VAE Decode (Few-Step SR)", "--fp32-vae or --bf16-vae")
        return io.NodeOutput(images.to(comfy.model_management.intermediate_device()))
