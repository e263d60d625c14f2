"""PiSA-SR (Sun et al., CVPR 2025): two LoRA sets on one UNet, one for the pixels' fidelity and one for semantic detail, each with a knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bases import TEXT_WIDTHS
from ..files import written_whole
from ..lazy import torch
from ..weights.kinds import FileKind, is_pisasr
from ..weights.lora import PEFT_ALPHA, Adapter, LowRank, metadata_alpha, one_adapter, read_lora
from ..weights.save import save_safetensors
from .method import CODSR, Method, OneStep, Paper, Published, Source, Widget, control
from .osediff import OSEDIFF, unet_group

TIMESTEP = 1
"""Index of the noise schedule, counted from 0, that the UNet's time embedding is given. The formula has no noise level."""

SETS = ("pix", "sem")


def residual_step(z_lq: torch.Tensor, eps_pix: torch.Tensor, eps_full: torch.Tensor, pixel: float = 1.0, semantic: float = 1.0) -> torch.Tensor:
    """The restored latents, z_H = z_L - (pixel eps_pix + semantic (eps_full - eps_pix)) (section 3.4, with the published knobs).

    The network's output is what the latents have too much: no noise level is involved. Both knobs weigh outputs, not LoRA weights; at (1, 1)
    ``eps_full`` alone counts.

    Args:
        z_lq: latents (B, 4, h, w) of the upscaled low-quality images by the base's encoder, times the scaling factor.
        eps_pix: what the UNet with the pixel set alone predicts at ``z_lq`` and :data:`TIMESTEP`.
        eps_full: likewise with both sets.
    """
    return z_lq - (pixel * eps_pix + semantic * (eps_full - eps_pix))


def calls(pixel: float, semantic: float) -> tuple[tuple[str, ...], ...]:
    """The LoRA sets that act in each call of the network that :func:`residual_step` needs at these knobs.

    One prediction is left where the weight of the other, ``pixel - semantic`` of ``eps_pix`` or ``semantic`` of ``eps_full``, is 0.
    """
    if pixel == semantic:
        return (SETS,)
    return (SETS[:1],) if semantic == 0 else (SETS[:1], SETS)


def _equation(z_lq: torch.Tensor, noise_preds: Sequence[torch.Tensor], timestep: int, pixel: float, semantic: float) -> torch.Tensor:
    return residual_step(z_lq, noise_preds[0], noise_preds[-1], pixel, semantic)


@dataclass(frozen=True)
class PiSASRAdapter(Adapter):
    """Both sets: ``unet`` is the pixel set, ``semantic`` the semantic one on top of it. The VAE is the base's."""

    semantic: dict[str, LowRank] | None = None

    def __post_init__(self):
        if not self.semantic:
            raise ValueError("semantic: found no second LoRA set, expected PiSA-SR's two.")

    @property
    def sets(self) -> dict[str, dict[str, LowRank]]:
        return dict(zip(SETS, (self.unet, self.semantic or {}), strict=True))


def peft_name(layer: str, which: str) -> str:
    """PEFT's name of the adapter that holds a layer's update of the set ``"pix"`` or ``"sem"``."""
    return f"{unet_group(layer)}_{which}"


def _parse(state: Mapping, metadata: Mapping[str, str], name: str) -> PiSASRAdapter:
    """The published layout has both sets in ``state_dict_unet``; the safetensors layout has the same keys under ``unet.``."""
    unet = state.get("state_dict_unet")
    if not isinstance(unet, Mapping):
        unet = {k.removeprefix("unet."): v for k, v in state.items() if str(k).startswith("unet.")}
    adapters = read_lora(unet, f"{name}: UNet", metadata_alpha(metadata, name))
    found = {which: {key: layers for key, layers in adapters.items() if key.endswith(f"_{which}")} for which in SETS}
    if missing := [which for which in SETS if not found[which]]:
        raise ValueError(f"{name}: UNet: the set {missing[0]!r} is missing, expected PiSA-SR's two, 'pix' and 'sem'; the file is incomplete.")
    pix, sem = (one_adapter(found[which], f"{name}: UNet, set {which!r}") for which in SETS)
    return PiSASRAdapter(unet=pix, semantic=sem)


def save_adapter(adapter: PiSASRAdapter, path: str | Path) -> None:
    """Write both sets as safetensors under their published keys, ``unet.`` in front, with alpha and ranks in the metadata."""
    tensors: dict[str, torch.Tensor] = {}
    for which, layers in zip(SETS, (adapter.unet, adapter.semantic or {}), strict=True):
        for layer, low_rank in layers.items():
            for half, tensor in (("A", low_rank.down), ("B", low_rank.up)):
                tensors[f"unet.{layer}.lora_{half}.{peft_name(layer, which)}.weight"] = tensor
    first = next(iter(adapter.unet.values()))
    ranks = {"lora_rank_unet_pix": str(adapter.rank_unet), "lora_rank_unet_sem": str(_rank_sem(adapter))}
    save_safetensors(tensors, path, {"family": "PiSA-SR adapter", **ranks, "lora_alpha": f"{first.alpha:g}"})


def save_published(adapter: PiSASRAdapter, path: str | Path) -> None:
    """Write both sets as the authors' training does, which their own program reads: one dictionary with the layers' names, ranks and tensors.

    Raises:
        ValueError: alpha is not PEFT's default, for which this layout has no place.
    """
    state: dict = {"lora_rank_unet_pix": adapter.rank_unet, "lora_rank_unet_sem": _rank_sem(adapter), "state_dict_unet": {}}
    for which, layers in zip(SETS, (adapter.unet, adapter.semantic or {}), strict=True):
        for group in ("encoder", "decoder", "others"):
            state[f"unet_lora_{group}_modules_{which}"] = [layer for layer in layers if unet_group(layer) == f"default_{group}"]
        for layer, low_rank in layers.items():
            if low_rank.alpha != PEFT_ALPHA:
                raise ValueError(f"lora_alpha: found {low_rank.alpha:g}, expected {PEFT_ALPHA:g} in the published layout. Save safetensors.")
            for half, tensor in (("A", low_rank.down), ("B", low_rank.up)):
                state["state_dict_unet"][f"{layer}.lora_{half}.{peft_name(layer, which)}.weight"] = tensor.contiguous()
    with written_whole(path) as partial:
        torch.save(state, partial)


def _rank_sem(adapter: PiSASRAdapter) -> int:
    return next(iter((adapter.semantic or {}).values())).rank


def _summary(adapter: PiSASRAdapter) -> list[str]:
    width = adapter.context_dim
    return [
        f"  rank: {adapter.rank_unet} for pixels, {_rank_sem(adapter)} for semantics, on {len(adapter.unet)} layers of the UNet",
        f"  fits: {TEXT_WIDTHS.get(width or 0, 'a base of another kind')}, cross-attention dimension {width}",
    ]


PISASR = Method(
    key="pisasr",
    title="PiSA-SR",
    paper=Paper(
        authors="Lingchen Sun, Rongyuan Wu, Zhiyuan Ma, Shuaizheng Liu, Qiaosi Yi, Lei Zhang",
        title="Pixel-level and Semantic-level Adjustable Super-resolution: A Dual-LoRA Approach",
        venue="CVPR 2025",
        url="https://arxiv.org/abs/2412.03017",
        code="https://github.com/csslc/PiSA-SR",
    ),
    base=OSEDIFF.base,
    weights=Source(
        what="PiSA-SR's adapter",
        folder="pisasr",
        names=("pisa_sr.safetensors", "pisa_sr.pkl"),
        licence="Apache-2.0, https://github.com/csslc/PiSA-SR",
        size="about 34 MB (computed from tensor shapes)",
        url="https://github.com/csslc/PiSA-SR",
        by_hand=True,
    ),
    kind=FileKind("pisasr", "a PiSA-SR adapter", is_pisasr),
    contents="two sets of LoRA weights for the UNet, 'pix' and 'sem'",
    source="pisa_sr.pkl is linked from github.com/csslc/PiSA-SR.",
    parse=_parse,
    save=save_adapter,
    summary=_summary,
    pipeline="PiSASRPipeline",
    color_fix="adain",
    guided=False,
    one_step=OneStep(TIMESTEP, _equation, calls, ("pixel", "semantic"), prompt="empty, as published"),
    options=(
        control(
            "pixel",
            "weight of the pixel-level prediction: higher values remove more degradation",
            1.0,
            Widget(-10.0, 10.0, "weight of the pixel-level prediction. Higher values remove more degradation.", step=0.05, usual=(0, 2)),
        ),
        control(
            "semantic",
            "weight of the semantic-level prediction: less keeps more of the image, more makes more detail",
            1.0,
            Widget(
                -10.0,
                10.0,
                "weight of the semantic-level prediction. Lower values stay closer to the image, higher ones add detail. The model is "
                "called twice unless it equals pixel or is 0.",
                step=0.05,
                usual=(0, 2),
            ),
        ),
    ),
    published=(
        Published(
            "realsr",
            {
                "psnr": 25.50,
                "ssim": 0.7417,
                "lpips": 0.2672,
                "dists": 0.2044,
                "fid": 124.09,
                "niqe": 5.50,
                "musiq": 70.15,
                "maniqa-pipal": 0.6560,
                "clipiqa": 0.6702,
            },
            "PiSA-SR's paper (https://arxiv.org/abs/2412.03017, Table 2), as others quote it (FreqOrtho-SR, https://arxiv.org/abs/2606.28745)",
            "Both knobs at 1.",
        ),
        Published("drealsr", {"psnr": 28.32, "lpips": 0.2959, "dists": 0.2169, "niqe": 6.17, "musiq": 66.11}, CODSR, "Both knobs at 1."),
    ),
)
