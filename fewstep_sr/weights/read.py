"""Reading weight files without running them, and saying what a file is when it is not what was asked for.

Pickled files (.pkl, .pt, .pth, .ckpt) go through ``torch.load(weights_only=True)`` and nothing else: a file cannot run code here.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..methods.bases import TEXT_WIDTHS

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_weights(path: str | Path) -> tuple[dict, dict[str, str]]:
    """Read a weight file on the CPU, by what it holds and not by its extension.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote (zip or the older format).

    Returns:
        The file's dictionary (tensors memory-mapped where the format allows) and its metadata (safetensors only, else empty).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, no weight file at all, or refused because it holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        head = file.read(1024)
    if problem := _not_weights(head):
        raise ValueError(f"{path.name}: {problem}")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _read_pickled(path, zipped=head.startswith(_ZIP)), {}
    raise ValueError(f"{path.name}: not a weight file (it starts with {head[:8]!r}); expected safetensors or a file written by torch.save.")


def _not_weights(head: bytes) -> str | None:
    text = head.lstrip().lower()
    if not head:
        return "the file is empty; the download failed. Download it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page saved under a weight file's name. Use the page's download link for the file itself."
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights. Run 'git lfs pull', or download the file from its page."
    if text.startswith((b"{", b"[")):
        return "this is a JSON text, not weights. Download the weight file itself."
    return None


def _read_safetensors(path: Path) -> tuple[dict, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: the safetensors file is damaged or cut off ({error}). Download it again.") from None


def _read_pickled(path: Path, zipped: bool) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise ValueError(f"{path.name}: the file is cut off. Download it again.") from None
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({culprit.group(1)})" if culprit else ""
        raise ValueError(
            f"{path.name}: refused, because the pickle holds Python objects{found} that could run code; "
            "expected tensors, numbers and text alone. Use a safetensors file from a source you trust."
        ) from None
    except (RuntimeError, EOFError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path.name}: the file is damaged or cut off ({reason}). Download it again.") from None
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise ValueError(f"{path.name}: found a single {type(content).__name__}, expected a dictionary of tensors.")
    return dict(content)


def describe(state: Mapping) -> str:
    """Say in words what a weight file's dictionary is: "a LoRA for Stable Diffusion XL", "an InvSR noise predictor" and so on."""
    nested = next((state[k] for k in ("state_dict", "params_ema", "params", "model") if isinstance(state.get(k), Mapping)), None)
    keys = {str(k) for k in state}
    if {"vae", "unet"} <= keys and isinstance(state["unet"], Mapping):
        return "AdcSR's merged OSEDiff (a whole UNet and VAE under 'unet' and 'vae'), not an adapter"
    if any(re.search(r"_(pix|sem)$", k) for k in keys) or any("_pix." in k or "_sem." in k for k in state.get("state_dict_unet", ())):
        return "a PiSA-SR adapter"
    if {"rank_unet", "state_dict_unet"} <= keys or any("lora_A.default_encoder" in k for k in keys):
        return "an OSEDiff adapter"
    if nested is not None:
        return describe(nested)
    if "state_dict_dis" in keys:
        return "a training checkpoint of a discriminator"
    flat = {strip_wrappers(k): v for k, v in state.items() if isinstance(k, str)}
    for pattern, phrase in _FAMILIES:
        if any(re.search(pattern, k) for k in flat):
            return phrase + _for_base(flat, phrase)
    first = ", ".join(sorted(keys)[:3]) or "none"
    return f"an unknown file with {len(keys)} entries ({first}, ...)"


# First match wins: the narrower kinds come first.
_FAMILIES = (
    (r"^encoder\.down_blocks\.0\.resnets\.0\.time_emb_proj\.", "an InvSR noise predictor"),
    (r"^(feature_in|out_blocks|hidden_compress_layer)\.|discriminator", "a discriminator, which only training uses"),
    (r"^(visual_encoder|tagging_head)\..*\.lora_[AB]$", "DAPE's low-rank weights for the RAM tagger"),
    (r"^reweight_scale$", "RAM++, another tagger"),
    (r"^label_embed\.weight$", "Tag2Text, another tagger"),
    (r"lora_unet_|lora_te|\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.|\.lora_linear_layer\.", "a LoRA"),
    (r"^(conditioner\.embedders\.1\.|model\.diffusion_model\.label_emb\.)", "a Stable Diffusion XL checkpoint"),
    (r"^add_embedding\.linear_1\.", "a UNet of Stable Diffusion XL"),
    (r"^(control_model\.|controlnet_cond_embedding\.|input_hint_block\.)", "a ControlNet"),
    (r"^model\.diffusion_model\.(input_blocks|output_blocks)\.", "a whole checkpoint"),
    (r"^model\.diffusion_model\.", "a checkpoint of another diffusion model"),
    (r"^(down_blocks\.0\.(attentions|resnets)\.|input_blocks\.0\.0\.)", "a whole UNet"),
    (r"^(first_stage_model\.|encoder\.down\.0\.block\.|decoder\.up_blocks\.0\.)", "a VAE"),
    (r"^(lin0\.model\.|net\.slice1\.)", "weights of a perceptual loss (LPIPS), which only training uses"),
    (r"^(visual_encoder\.patch_embed|tagging_head\.)", "an image tagger (RAM or DAPE)"),
    (r"^(body\.0\.rdb1|model\.1\.sub\.0\.RDB1|conv_body\.|layers\.0\.residual_group\.)", "a GAN or transformer upscaler, for models/upscale_models"),
)


def _for_base(flat: Mapping, phrase: str) -> str:
    """Which base a LoRA, UNet or checkpoint belongs to, read off the width of its text conditioning; empty where nothing tells."""
    if phrase not in ("a LoRA", "a whole UNet", "a whole checkpoint"):
        return ""
    if any("lora_te2_" in k or "add_embedding" in k for k in flat):
        return f" for {TEXT_WIDTHS[2048]}"
    for key, tensor in flat.items():
        if re.search(r"attn2[._]to_k\.(lora_A\.(\w+\.)?|lora_down\.|lora\.down\.)?weight$", key):
            return f" for {TEXT_WIDTHS.get(tensor.shape[1], f'a model with a text width of {tensor.shape[1]}')}"
    if phrase == "a LoRA" and any(re.search(r"double_blocks|single_blocks|joint_blocks|transformer\.", k) for k in flat):
        return " for a diffusion transformer"
    return ""


def strip_wrappers(key: str) -> str:
    """A state dict key without what DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", key)
