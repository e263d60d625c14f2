"""Writing the methods' weights as safetensors: one file without code in it, which :mod:`fewstep_sr.weights.checkpoints` reads like the published ones."""

from pathlib import Path

import torch

from .checkpoints import LORA_ALPHA, LowRank, NoisePredictorWeights, OSEDiffAdapter
from .save import save_safetensors

VAE_GROUP = "default_encoder"


def unet_group(layer: str) -> str:
    """The name under which OSEDiff's training registers the low-rank update of a UNet layer: three groups by the layer's place."""
    if "down_blocks" in layer or "conv_in" in layer:
        return "default_encoder"
    if "up_blocks" in layer or "conv_out" in layer:
        return "default_decoder"
    return "default_others"


def save_osediff_adapter(adapter: OSEDiffAdapter, path: str | Path) -> None:
    """Write an adapter: the published inner keys under ``unet.`` and ``vae.``, ranks, alpha and timestep in the metadata."""
    tensors = {f"unet.conv_in.base_layer.{name.removeprefix('conv_in.')}": tensor for name, tensor in adapter.unet_replaced.items()}
    for layer, low_rank in adapter.unet.items():
        tensors |= _halves(f"unet.{layer}", low_rank, unet_group(layer))
    for layer, low_rank in adapter.vae.items():
        tensors |= _halves(f"vae.{layer}", low_rank, VAE_GROUP)
    ranks = {"rank_unet": str(adapter.rank_unet), "rank_vae": str(adapter.rank_vae)}
    save_safetensors(tensors, path, {"family": "OSEDiff adapter", **ranks, "lora_alpha": str(LORA_ALPHA), "timestep": str(adapter.timestep)})


def _halves(layer: str, low_rank: LowRank, group: str) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.{group}.weight": low_rank.down, f"{layer}.lora_B.{group}.weight": low_rank.up}


def save_noise_predictor(weights: NoisePredictorWeights, path: str | Path) -> None:
    """Write a noise predictor under its published keys."""
    save_safetensors(weights.state_dict, path, {"family": "InvSR noise predictor"})
