"""HYPIR (Lin et al., arXiv 2025) on Stable Diffusion 2.1: a LoRA fine-tuned adversarially from the diffusion prior, one step, one knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bases import TEXT_WIDTHS
from ..diffusion import NUM_TRAIN_TIMESTEPS, alpha_bar_at, predict_x0
from ..lazy import torch
from ..weights.kinds import FileKind
from ..weights.lora import Adapter, metadata_alpha, one_adapter, read_lora
from ..weights.save import save_safetensors
from .method import CODSR, Method, OneStep, Paper, Published, Source, Widget, control
from .osediff import OSEDIFF

TIMESTEP = 200
"""Index of the noise schedule, counted from 0, both of the network's call and, as published, of the formula."""


def one_step(z_lq: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The restored latents, (z_L - sqrt(1 - a_c) eps(z_L, 200)) / sqrt(a_c), nothing noised before.

    The network is called at 200 whatever the strength is; ``alpha_bar`` is of the schedule at ``coeff_t``, the strength: a smaller one takes less
    of the same prediction off.
    """
    return predict_x0(z_lq, noise_pred, alpha_bar)


def _equation(z_lq: torch.Tensor, noise_preds: Sequence[torch.Tensor], timestep: int, coeff_t: int) -> torch.Tensor:
    return one_step(z_lq, noise_preds[0], alpha_bar_at(coeff_t, z_lq))


@dataclass(frozen=True)
class HYPIRAdapter(Adapter):
    """One LoRA set on the UNet, with scale 1 (alpha is the rank). The VAE is the base's."""


def _matches(state: Mapping) -> bool:
    keys = {str(key) for key in state}
    flat = "conv_out.lora_A.default.weight" in keys or "unet.conv_out.lora_A.default.weight" in keys
    return flat and all(".lora_A.default." in key or ".lora_B.default." in key for key in keys)


def _parse(state: Mapping, metadata: Mapping[str, str], name: str) -> HYPIRAdapter:
    """The published file is a flat dictionary; the safetensors layout has ``unet.`` in front of its keys."""
    unet = {str(k).removeprefix("unet."): v for k, v in state.items()}
    return HYPIRAdapter(unet=one_adapter(read_lora(unet, f"{name}: UNet", metadata_alpha(metadata, name, None)), f"{name}: UNet"))


def save_adapter(adapter: HYPIRAdapter, path: str | Path) -> None:
    """Write the adapter as safetensors: the published keys with ``unet.`` in front, alpha and rank in the metadata."""
    halves = {f"unet.{layer}.lora_A.default.weight": low_rank.down for layer, low_rank in adapter.unet.items()}
    halves |= {f"unet.{layer}.lora_B.default.weight": low_rank.up for layer, low_rank in adapter.unet.items()}
    first = next(iter(adapter.unet.values()))
    save_safetensors(halves, path, {"family": "HYPIR adapter", "rank_unet": str(first.rank), "lora_alpha": f"{first.alpha:g}"})


def _summary(adapter: HYPIRAdapter) -> list[str]:
    width = adapter.context_dim
    return [
        f"  rank: {adapter.rank_unet} on {len(adapter.unet)} layers of the UNet; scale {next(iter(adapter.unet.values())).scale:g}",
        f"  fits: {TEXT_WIDTHS.get(width or 0, 'a base of another kind')}, cross-attention dimension {width}",
        "  non-commercial use only",
    ]


HYPIR = Method(
    key="hypir",
    title="HYPIR",
    paper=Paper(
        authors="Xinqi Lin, Fanghua Yu, Jinfan Hu, Zhiyuan You, Wu Shi, Jimmy S. Ren, Jinjin Gu, Chao Dong",
        title="Harnessing Diffusion-Yielded Score Priors for Image Restoration",
        venue="arXiv 2025",
        url="https://arxiv.org/abs/2507.20590",
        code="https://github.com/XPixelGroup/HYPIR",
    ),
    base=OSEDIFF.base,
    weights=Source(
        what="HYPIR's adapter for Stable Diffusion 2.1",
        folder="hypir",
        names=("HYPIR_sd2.safetensors", "HYPIR_sd2.pth"),
        licence="non-commercial use only, https://github.com/XPixelGroup/HYPIR",
        size="about 2 GB in float32 at rank 256",
        repository="lxq007/HYPIR",
        file="HYPIR_sd2.pth",
    ),
    kind=FileKind("hypir", "a HYPIR adapter", _matches),
    contents="a flat dictionary of LoRA weights for the UNet, conv_out among them",
    source="HYPIR_sd2.pth is at huggingface.co/lxq007/HYPIR; non-commercial use only.",
    parse=_parse,
    save=save_adapter,
    summary=_summary,
    pipeline="HYPIRPipeline",
    color_fix="wavelet",
    guided=False,
    one_step=OneStep(TIMESTEP, _equation, controls=("coeff_t",), prompt="a sentence, or empty"),
    options=(
        control(
            "coeff_t",
            "strength as a timestep: lower values stay closer to the image, 200 as published",
            TIMESTEP,
            Widget(
                0,
                NUM_TRAIN_TIMESTEPS - 1,
                "strength, as a timestep of the noise schedule. 200 is the published value; lower values stay closer to the image.",
            ),
        ),
    ),
    published=(
        Published("realsr", {"lpips": 0.3046, "musiq": 66.42, "maniqa-pipal": 0.6510}, CODSR),
        Published("drealsr", {"psnr": 26.04, "lpips": 0.3356, "dists": 0.2333, "niqe": 6.39, "musiq": 61.03}, CODSR),
    ),
)
