"""OMGSR-S (Wu et al., arXiv:2508.08227): OSEDiff's one step at a timestep in the middle of the schedule, which fits low-quality latents better.

Its adapter comes as a folder of two that PEFT wrote, one for the UNet and one for the VAE's encoder; both scales are 1. As an OSEDiff adapter with its
own timestep it runs on the same nodes and pipeline.
"""

import json
import re
from pathlib import Path

from ..weights.lora import PEFT_ALPHA, LowRank, one_adapter, read_lora
from ..weights.read import read_weights
from ..weights.strict import printable
from .osediff import OSEDiffAdapter

TIMESTEP = 273
"""Index of the noise schedule, counted from 0 (``configs/omgsr_s_512.yml`` of its authors)."""

_UNET, _VAE = "unet_lora_adapter", "vae_encoder_lora_adapter"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG = 1 << 20


def read_omgsr(folder: str | Path) -> OSEDiffAdapter:
    """The adapter in a folder as OMGSR-S's training writes it, with alpha 8 as OSEDiff's files have it: what that changes is in the factors.

    Raises:
        FileNotFoundError: one of the four files is missing.
        ValueError: a file is damaged, or no such adapter.
    """
    folder = Path(folder)
    unet = _read(folder / _UNET, "")
    vae = _read(folder / _VAE, "encoder.")
    return OSEDiffAdapter(unet=unet, vae=vae, timestep=TIMESTEP)


def _read(folder: Path, prefix: str) -> dict[str, LowRank]:
    for name in (_WEIGHTS, _CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{printable(str(folder.parent))}: found no {folder.name}/{name}, expected OMGSR-S's folder with {_UNET} and {_VAE}. "
                "Give the folder that holds both."
            )
    name = f"{folder.name}/{_WEIGHTS}"
    state, _ = read_weights(folder / _WEIGHTS)
    layers = {re.sub(r"^base_model\.model\.", prefix, key): value for key, value in state.items()}
    alpha = _alpha(folder)
    found = one_adapter(read_lora(layers, name, alpha), name)
    return {layer: LowRank(low_rank.down, low_rank.up * (alpha / PEFT_ALPHA)) for layer, low_rank in found.items()}


def _alpha(folder: Path) -> float:
    """``lora_alpha`` of PEFT's configuration, where alpha / rank is the scale of every layer."""
    path = folder / _CONFIG
    name = f"{folder.name}/{_CONFIG}"
    try:
        config = json.loads(path.read_bytes()[:_MAX_CONFIG])
        alpha = float(config["lora_alpha"])
        others = [option for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(option)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{name}: found no lora_alpha in it, expected PEFT's configuration; the file is damaged.") from None
    if not 0 < alpha < float("inf") or others:
        raise ValueError(f"{name}: found {', '.join(others) or f'lora_alpha {alpha:g}'}, expected a plain LoRA with a positive lora_alpha.")
    return alpha
