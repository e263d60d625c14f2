"""What a weight file is, read off its dictionary: code decides on a kind's ``id``, people read its phrase.

A method's own kind stands in its record; :func:`fewstep_sr.methods.identify` asks those first and then the kinds below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..bases import TEXT_WIDTHS
from ..lazy import torch
from .strict import printable


@dataclass(frozen=True)
class FileKind:
    """A kind of weight file. ``matches(state)`` recognises it by the keys, and is asked in the order of the list.

    ``lacking`` is what running it would take, for files that are known and not read as they are.
    """

    id: str
    phrase: str
    matches: Callable[[Mapping], bool]
    lacking: str = ""

    @property
    def found(self) -> str:
        """The phrase for an error, with what is lacking."""
        return f"{self.phrase} ({self.lacking})" if self.lacking else self.phrase


def strip_wrappers(key: str) -> str:
    """A state dict key without what DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", key)


def without_wrappers(state: Mapping, what: str) -> dict:
    """A state dict with :func:`strip_wrappers` on each key.

    Raises:
        ValueError: two keys become the same, of which one would be lost. ``what`` names the file.
    """
    stripped: dict = {}
    for key, value in state.items():
        short = strip_wrappers(key) if isinstance(key, str) else key
        if short in stripped:
            raise ValueError(f"{what}: {short} is there twice, with and without wrappers such as 'module.' before it; the file is damaged.")
        stripped[short] = value
    return stripped


def has_key(pattern: str) -> Callable[[Mapping], bool]:
    """Whether any key, wrappers taken off, holds the regular expression."""
    search = re.compile(pattern).search
    return lambda state: any(search(strip_wrappers(key)) for key in state if isinstance(key, str))


def unwrap(state: Mapping) -> Mapping | None:
    """The state dict inside a training checkpoint, or None."""
    return next((state[k] for k in ("state_dict", "params_ema", "params", "model") if isinstance(state.get(k), Mapping)), None)


def is_pisasr(state: Mapping) -> bool:
    """Whether an adapter has PiSA-SR's two sets, "pix" and "sem"."""
    inner = state.get("state_dict_unet")
    keys = [str(key) for key in (*state, *(inner if isinstance(inner, Mapping) else ()))]
    return any(re.search(r"_(pix|sem)($|\.)", key) for key in keys)


def _holds(state: Mapping, wrapper: str, *keys: str) -> Mapping | None:
    """The dictionary under ``wrapper`` where it has all these keys, else None."""
    inner = state.get(wrapper)
    return inner if isinstance(inner, Mapping) and {strip_wrappers(str(key)) for key in inner}.issuperset(keys) else None


def _is_adcsr_decoder(state: Mapping) -> bool:
    """A training checkpoint with a decoder under diffusers' names that is narrower than Stable Diffusion's, whose finest level is 128 wide."""
    inner = _holds(state, "state_dict", "decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.conv_norm_out.weight")
    width = inner and next((value for key, value in inner.items() if strip_wrappers(str(key)) == "decoder.conv_norm_out.weight"), None)
    return isinstance(width, torch.Tensor) and width.ndim == 1 and width.shape[0] < 128


def _is_vosr_decoder(state: Mapping) -> bool:
    return _holds(state, "model_state_dict", "conv_in.weight", "up_blocks.0.resnets.0.conv1.weight", "conv_norm_out.weight") is not None


def _has_light_decoder(state: Mapping) -> bool:
    """Whether a whole VAE's decoder begins narrower than its encoder ends."""
    narrow, wide = (state.get(key) for key in ("decoder.conv_in.weight", "encoder.conv_out.weight"))
    if not isinstance(narrow, torch.Tensor) or not isinstance(wide, torch.Tensor) or {narrow.ndim, wide.ndim} != {4}:
        return False
    return narrow.shape[0] < wide.shape[1]


def _is_merged_osediff(state: Mapping) -> bool:
    return isinstance(state.get("unet"), Mapping) and "vae" in state


# The narrower kinds come first: those that a method's own kind could be taken for, then all others.
ADCSR_DECODER = FileKind("adcsr-decoder", "AdcSR's half-width decoder for Stable Diffusion's VAE", _is_adcsr_decoder)
VOSR_DECODER = FileKind("vosr-decoder", "VOSR's half-width decoder for Stable Diffusion's VAE", _is_vosr_decoder)

LOOKALIKES = (
    FileKind("adcsr-osediff", "AdcSR's merged OSEDiff (a whole UNet and VAE under 'unet' and 'vae'), not an adapter", _is_merged_osediff),
    ADCSR_DECODER,
    VOSR_DECODER,
)

TAGGER = FileKind("tagger", "an image tagger (RAM or DAPE)", has_key(r"^(visual_encoder\.patch_embed|tagging_head\.)"))
DAPE = FileKind("dape", "DAPE's LoRA weights for the RAM tagger", has_key(r"^(visual_encoder|tagging_head)\..*\.lora_[AB]$"))
LORA = FileKind("lora", "a LoRA", has_key(r"lora_unet_|lora_te|\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.|\.lora_linear_layer\."))
UNET = FileKind("unet", "a whole UNet", has_key(r"^(down_blocks\.0\.(attentions|resnets)\.|input_blocks\.0\.0\.)"))
VAE = FileKind("vae", "a VAE", has_key(r"^(first_stage_model\.|encoder\.down\.0\.block\.|(decoder\.up|encoder\.down)_blocks\.0\.)"))
LIGHT_VAE = FileKind("light-vae", "a VAE with a half-width decoder", _has_light_decoder)
TAESD = FileKind(
    "taesd", "TAESD, a tiny autoencoder for previews", has_key(r"^(taesd_(en|de)coder\.|(en|de)coder\.layers\.0\.weight|\d+\.conv\.0\.weight)")
)
CHECKPOINT = FileKind("checkpoint", "a whole checkpoint", has_key(r"^model\.diffusion_model\.(input_blocks|output_blocks)\."))
UNKNOWN = FileKind("unknown", "an unknown file", lambda state: True)

OTHERS = (
    FileKind("discriminator-checkpoint", "a training checkpoint of a discriminator", has_key(r"^state_dict_dis$")),
    FileKind(
        "discriminator",
        "a discriminator, which only training uses",
        has_key(r"^(feature_in|out_blocks|hidden_compress_layer)\.|discriminator"),
    ),
    DAPE,
    FileKind("ram++", "RAM++, another tagger", has_key(r"^reweight_scale$")),
    FileKind("tag2text", "Tag2Text, another tagger", has_key(r"^label_embed\.weight$")),
    LORA,
    FileKind(
        "sdxl-checkpoint",
        "a Stable Diffusion XL checkpoint",
        has_key(r"^(conditioner\.embedders\.1\.|model\.diffusion_model\.label_emb\.)"),
    ),
    FileKind("sdxl-unet", "a UNet of Stable Diffusion XL", has_key(r"^add_embedding\.linear_1\.")),
    FileKind("controlnet", "a ControlNet", has_key(r"^(control_model\.|controlnet_cond_embedding\.|input_hint_block\.)")),
    CHECKPOINT,
    FileKind("other-checkpoint", "a checkpoint of another diffusion model", has_key(r"^model\.diffusion_model\.")),
    UNET,
    LIGHT_VAE,
    VAE,
    TAESD,
    FileKind("lpips", "weights of a perceptual loss (LPIPS), which only training uses", has_key(r"^(lin0\.model\.|net\.slice1\.)")),
    TAGGER,
    FileKind(
        "upscaler",
        "a GAN or transformer upscaler, for models/upscale_models",
        has_key(r"^(body\.0\.rdb1|model\.1\.sub\.0\.RDB1|conv_body\.|layers\.0\.residual_group\.)"),
    ),
)


def with_base(kind: FileKind, state: Mapping) -> FileKind:
    """The kind with the base that a LoRA, UNet or checkpoint belongs to in its phrase, where the cross-attention dimension or the names tell."""
    if kind not in (LORA, UNET, CHECKPOINT):
        return kind
    keys = {strip_wrappers(key): value for key, value in state.items() if isinstance(key, str)}
    if any("lora_te2_" in key or "add_embedding" in key for key in keys):
        return replace(kind, phrase=f"{kind.phrase} for {TEXT_WIDTHS[2048]}")
    for key, tensor in keys.items():
        if re.search(r"attn2[._]to_k\.(lora_A\.(\w+\.)?|lora_down\.|lora\.down\.)?weight$", key) and getattr(tensor, "ndim", 0) > 1:
            base = TEXT_WIDTHS.get(tensor.shape[1], f"a model with a cross-attention dimension of {tensor.shape[1]}")
            return replace(kind, phrase=f"{kind.phrase} for {base}")
    if kind == LORA and any(re.search(r"double_blocks|single_blocks|joint_blocks|transformer\.", key) for key in keys):
        return replace(kind, phrase=f"{kind.phrase} for a diffusion transformer")
    return kind


def unknown(state: Mapping) -> FileKind:
    """:data:`UNKNOWN` with the first keys in its phrase."""
    first = ", ".join(sorted(printable(str(key)[:60]) for key in state)[:3]) or "none"
    return replace(UNKNOWN, phrase=f"an unknown file with {len(state)} entries ({first}, ...)")
