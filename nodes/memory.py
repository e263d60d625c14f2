"""Peak memory of the networks' calls, from their dimensions: the activations that live at the same time where they are most.

``benchmarks/footprint.py`` counts such peaks tensor by tensor and ``tests/nodes/test_memory.py`` holds these to it. ComfyUI's own estimates, which
allow for any kind of attention and for workspaces, are 1.3 (UNet) to 4.6 times as high (VAE): with them half of a card's memory stays unused.
"""

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .checks import LATENT_CHANNELS, PIXELS_PER_CELL

MARGIN = 1.1
"""For what is not counted: small tensors, what the allocator loses, workspaces of convolutions."""

UNET_ACTIVATIONS = 26
"""Of the first level's channels, in the feed-forward layer of its last transformer: 16 of GEGLU's, the rest what waits meanwhile."""

PREDICTOR_ACTIVATIONS = 10
"""Of the first level's channels."""

TAGGER_ACTIVATIONS = 3
"""Of the tagging head's widest layer."""


def vae_memory(vae, method: str, height: int, width: int) -> int:
    """Bytes that ``method`` ("encode" or "decode") of one image of so many latent pixels takes; ComfyUI's estimate for a VAE of another kind.

    And on AMD, where convolutions have large workspaces.
    """
    coder = getattr(vae.first_stage_model, f"{method}r", None)  # TAESD has none of this name
    pixels = height * width * PIXELS_PER_CELL**2
    if isinstance(coder, Encoder | Decoder) and isinstance(coder.conv_in, torch.nn.Conv2d) and not comfy.model_management.is_amd():
        return int(MARGIN * coder_activations(coder) * pixels * comfy.model_management.dtype_size(vae.vae_dtype))
    if method == "encode":
        return vae.memory_used_encode((1, 3, height * PIXELS_PER_CELL, width * PIXELS_PER_CELL), vae.vae_dtype)
    return vae.memory_used_decode((1, LATENT_CHANNELS, height, width), vae.vae_dtype)


def coder_activations(coder: Encoder | Decoder) -> float:
    """Elements for each pixel of the image in the hungriest residual block: what goes in, the same normalised, and what comes out."""
    levels = coder.down if isinstance(coder, Encoder) else coder.up
    return max((2 * block.in_channels + block.out_channels) / 4**i for i, level in enumerate(levels) for block in level.block)


def unet_memory(model, shape: list[int]) -> float:
    """Bytes that a call of a MODEL on latents of ``shape`` takes; ComfyUI's estimate, with half as much again, for other networks than Stable Diffusion's."""
    network, depth = model.diffusion_model, model.model_config.unet_config.get("transformer_depth")
    fused = comfy.model_management.xformers_enabled() or comfy.model_management.pytorch_attention_flash_attention()
    if type(network) is UNetModel and depth and depth[0] and fused and not comfy.model_management.is_amd():
        batch, _, height, width = shape
        elements = UNET_ACTIVATIONS * network.model_channels * batch * height * width
        return MARGIN * elements * comfy.model_management.dtype_size(model.get_dtype_inference())
    return model.memory_required(shape) * 1.5
