"""S3Diff (Zhang et al., arXiv 2024) on SD-Turbo: a LoRA whose weights follow how blurred and how noisy the image is, one step, guided."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases import TEXT_WIDTHS
from ..diffusion import alpha_bar_at, predict_x0
from ..lazy import F, torch
from ..weights.kinds import FileKind, has_key, without_wrappers
from ..weights.lora import Adapter, LowRank, metadata_alpha, one_adapter, read_lora
from ..weights.save import save_safetensors
from ..weights.strict import own_copies
from .invsr import INVSR
from .method import Companion, Method, OneStep, Option, Paper, Published, Source, number

if TYPE_CHECKING:
    from ..networks.degradation import EstimatorWeights  # a network's module imports torch

TIMESTEP = 999
"""Index of the noise schedule of the one step, counted from 0."""

PAD_MULTIPLE = 64
"""Pixels to whose multiples the published program pads the upscaled image, by reflection."""

PEFT_NAMES = {"unet": "default", "vae": "vae_skip"}
"""PEFT's name of the adapter on the UNet and of the one on the VAE's encoder."""

BLOCKS = {"unet": 10, "vae": 6}

_LAYERS = {
    "de_mlp": ("0.weight", "0.bias"),
    "block_mlp": ("0.weight", "0.bias"),
    "fuse_mlp": ("weight", "bias"),
    "block_embeddings": ("weight",),
}
_FREQUENCIES = "w"
_ESTIMATOR = "estimator."


def fourier_embedding(scores: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """p(d) (B, 4n) of degradation scores (B, 2) at n frequencies: sines and cosines of 2 pi d w, of the blur score, then of the noise score."""
    angles = 2 * torch.pi * scores[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def modulation_matrices(p: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """M_k of each block (blocks, r, r) of one embedding p (1, 4n), M_k = fuse([relu(de(p)), relu(block(e_k))]) read row by row."""
    degradation = F.relu(F.linear(p, weights["de_mlp.0.weight"], weights["de_mlp.0.bias"]))
    blocks = F.relu(F.linear(weights["block_embeddings.weight"], weights["block_mlp.0.weight"], weights["block_mlp.0.bias"]))
    both = torch.cat([degradation.expand(len(blocks), -1), blocks], dim=1)
    fused = F.linear(both, weights["fuse_mlp.weight"], weights["fuse_mlp.bias"])
    rank = round(fused.shape[1] ** 0.5)
    return fused.view(-1, rank, rank)


def fold(low_rank: LowRank, matrix: torch.Tensor) -> LowRank:
    """The update that acts as ``low_rank`` with M between its halves: W + s B Mᵀ A, with ``up' = B Mᵀ`` and A as it was.

    The published layer has the r numbers A x as a row on the left of M, hence the transpose.
    """
    up = torch.einsum("or...,kr->ok...", low_rank.up.float(), matrix)
    return LowRank(low_rank.down, up.to(low_rank.up.dtype), low_rank.alpha)


def block_of(part: str, layer: str) -> int:
    """The number of the block whose matrix a layer of the ``"unet"`` or the ``"vae"`` is modulated with.

    Raises:
        ValueError: the method adapts no such layer.
    """
    place = re.match(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out)(?:\.(\d))?(?:\.|$)", layer.removeprefix("encoder."))
    name, number = place.groups() if place and layer.startswith("encoder.") == (part == "vae") else (None, None)
    in_unet = {"down_blocks": 0, "mid_block": 4, "up_blocks": 5, "conv_out": 9}
    in_encoder = {"down_blocks": 0, "mid_block": 4, "conv_in": 5, "conv_out": 5}
    first = (in_unet if part == "unet" else in_encoder).get(name or "")
    within = int(number) if number and name in ("down_blocks", "up_blocks") else 0
    if first is None or within > 3:
        raise ValueError(f"layer {layer} of the {part} is in none of the {BLOCKS[part]} blocks that S3Diff modulates")
    return first + within


def one_step(z_lq: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The restored latents, (z_L - sqrt(1 - a_T) eps(z_L; T, c)) / sqrt(a_T) at T = 999, nothing noised before and nothing clipped.

    ``noise_pred`` is guided: negative + 1.07 (positive - negative) with the published prompts.
    """
    return predict_x0(z_lq, noise_pred, alpha_bar)


def _equation(z_lq: torch.Tensor, noise_preds: Sequence[torch.Tensor], timestep: int) -> torch.Tensor:
    return one_step(z_lq, noise_preds[0], alpha_bar_at(timestep, z_lq))


@dataclass(frozen=True)
class S3DiffAdapter(Adapter):
    """S3Diff's LoRA on the UNet and the VAE's encoder as it is before an image's modulation, and what modulates it: without it, it is of no use.

    Args:
        frequencies: of the embedding of the scores.
        modulation: for ``"unet"`` and ``"vae"`` the layers that make the matrices (:func:`modulation_matrices`).
        estimator: the degradation estimator, where it is in the same file.
    """

    frequencies: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    modulation: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    estimator: EstimatorWeights | None = None
    per_image = True

    def for_image(self, part: str, scores: torch.Tensor) -> Adapter:
        """What one image's scores (2,) make of the part of the ``"unet"`` or the ``"vae"``, as an adapter like others."""
        if part == "unet":
            return Adapter(unet=self.modulated(part, scores), unet_replaced=self.unet_replaced)
        return Adapter(unet={}, vae=self.modulated(part, scores))

    def modulated(self, part: str, scores: torch.Tensor) -> dict[str, LowRank]:
        """The low-rank updates of the ``"unet"`` or the ``"vae"`` for one image's scores (2,), blur and noise; this adapter stays as it is.

        Float32 whatever the scores' dtype and device are.
        """
        p = fourier_embedding(scores.detach().float().cpu().view(1, 2), self.frequencies)
        matrices = modulation_matrices(p, self.modulation[part])
        layers = self.unet if part == "unet" else self.vae
        return {layer: fold(low_rank, matrices[block_of(part, layer)]) for layer, low_rank in layers.items()}


def _matches(state: Mapping) -> bool:
    return has_key(r"^(state_dict_vae_de_mlp$|vae_de_mlp\.)")(state)


def _flat(state: Mapping, name: str) -> dict:
    """The published layout, a dictionary of dictionaries, under the keys of the safetensors layout: ``unet.<...>``, ``unet_de_mlp.0.weight``, ``w``."""
    if not any(isinstance(value, Mapping) for value in state.values()):
        return dict(state)
    embeddings = state.get("state_embeddings")
    flat = {_FREQUENCIES: state.get(_FREQUENCIES)}
    for part in BLOCKS:
        sections = {part: f"state_dict_{part}", **{f"{part}_{mlp}": f"state_dict_{part}_{mlp}" for mlp in ("de_mlp", "block_mlp", "fuse_mlp")}}
        found: dict[str, Any] = {prefix: state.get(key) for prefix, key in sections.items()}
        found[f"{part}_block_embeddings"] = embeddings.get(f"state_dict_{part}_block") if isinstance(embeddings, Mapping) else None
        for prefix, section in found.items():
            if not isinstance(section, Mapping):
                raise ValueError(f"{name}: its part {prefix} is no dictionary of tensors; the file is incomplete or damaged.")
            flat |= {f"{prefix}.{key}": tensor for key, tensor in without_wrappers(section, f"{name}: {prefix}").items()}
    return flat


def _parse(state: Mapping, metadata: Mapping[str, str], name: str) -> S3DiffAdapter:
    flat = _flat(state, name)
    alpha = metadata_alpha(metadata, name)
    tensors = _tensors(flat, [_FREQUENCIES, "unet.conv_in.weight", "unet.conv_in.bias"], name)
    frequencies, weight, bias = tensors.values()
    if frequencies.ndim != 1 or weight.ndim != 4 or bias.shape != weight.shape[:1]:
        shapes = ", ".join(f"{key} of {tuple(tensor.shape[:8])}" for key, tensor in tensors.items())
        raise ValueError(f"{name}: found {shapes}; expected (n,), (out, in, h, w) and (out,). The file is damaged.")
    layers: dict[str, dict[str, LowRank]] = {}
    modulation: dict[str, dict[str, torch.Tensor]] = {}
    for part in BLOCKS:
        what = f"{name}: {'UNet' if part == 'unet' else 'VAE'}"
        own = {key.removeprefix(f"{part}."): tensor for key, tensor in flat.items() if key.startswith(f"{part}.")}
        layers[part] = one_adapter(read_lora(own, what, alpha), what)
        ranks = sorted({low_rank.rank for low_rank in layers[part].values()})
        if len(ranks) > 1:
            raise ValueError(f"{what}: found layers of ranks {ranks[:8]}, expected one: a matrix of a block is for all its layers.")
        modulation[part] = _modulation(flat, part, 4 * len(frequencies), ranks[0], name)
        for layer in layers[part]:
            try:
                block_of(part, layer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; the file is of another method or damaged.") from None
    estimator = {key.removeprefix(_ESTIMATOR): tensor for key, tensor in flat.items() if key.startswith(_ESTIMATOR)}
    return S3DiffAdapter(
        unet=layers["unet"],
        vae=layers["vae"],
        unet_replaced=own_copies({"conv_in.weight": weight, "conv_in.bias": bias}, f"{name}: UNet"),
        frequencies=own_copies({_FREQUENCIES: frequencies}, name)[_FREQUENCIES].float(),
        modulation=modulation,
        estimator=_parse_estimator(estimator, {}, name) if estimator else None,
    )


def _tensors(flat: Mapping, keys: list[str], name: str) -> dict[str, torch.Tensor]:
    for key in keys:
        if not isinstance(flat.get(key), torch.Tensor):
            raise ValueError(f"{name}: the tensor {key} is missing; the file is incomplete.")
    return {key: flat[key] for key in keys}


def _modulation(flat: Mapping, part: str, embedding: int, rank: int, name: str) -> dict[str, torch.Tensor]:
    keys = [f"{mlp}.{key}" for mlp, members in _LAYERS.items() for key in members]
    weights = {key.removeprefix(f"{part}_"): tensor for key, tensor in _tensors(flat, [f"{part}_{key}" for key in keys], name).items()}
    hidden, block = (weights[f"{mlp}.0.weight"].shape[:1].numel() for mlp in ("de_mlp", "block_mlp"))
    width = weights["block_embeddings.weight"].shape[-1:].numel()
    expected = {
        **{"de_mlp.0.weight": (hidden, embedding), "de_mlp.0.bias": (hidden,)},
        **{"block_mlp.0.weight": (block, width), "block_mlp.0.bias": (block,)},
        **{"fuse_mlp.weight": (rank * rank, hidden + block), "fuse_mlp.bias": (rank * rank,)},
        "block_embeddings.weight": (BLOCKS[part], width),
    }
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(
                f"{name}: {part}_{key} has shape {tuple(weights[key].shape[:8])}, expected {shape} beside a LoRA of rank {rank}; the file is damaged."
            )
    return {key: tensor.float() for key, tensor in own_copies(weights, f"{name}: {part}").items()}


def save_adapter(adapter: S3DiffAdapter, path: str | Path) -> None:
    """Write the adapter as safetensors, as before any image's modulation: the published keys under ``unet.``, ``vae.``, ``unet_de_mlp.`` and so on.

    An estimator that the adapter has goes along, under ``estimator.``.
    """
    tensors = {_FREQUENCIES: adapter.frequencies, **{f"unet.{key}": tensor for key, tensor in adapter.unet_replaced.items()}}
    for part, layers in (("unet", adapter.unet), ("vae", adapter.vae)):
        for layer, low_rank in layers.items():
            for half, tensor in (("A", low_rank.down), ("B", low_rank.up)):
                tensors[f"{part}.{layer}.lora_{half}.{PEFT_NAMES[part]}.weight"] = tensor
        tensors |= {f"{part}_{key}": tensor for key, tensor in adapter.modulation[part].items()}
    if adapter.estimator:
        tensors |= {f"{_ESTIMATOR}{key}": tensor for key, tensor in adapter.estimator.state_dict.items()}
    ranks = {"rank_unet": str(adapter.rank_unet), "rank_vae": str(adapter.rank_vae)}
    alpha = next(iter(adapter.unet.values())).alpha
    save_safetensors(tensors, path, {"family": "S3Diff adapter", **ranks, "lora_alpha": f"{alpha:g}"})


def _summary(adapter: S3DiffAdapter) -> list[str]:
    ranks = f"{adapter.rank_unet} on the UNet ({len(adapter.unet)} layers), {adapter.rank_vae} on the VAE's encoder ({len(adapter.vae)} layers)"
    scales = " and ".join(f"{next(iter(layers.values())).scale:g}" for layers in (adapter.unet, adapter.vae))
    width = adapter.context_dim
    return [
        f"  rank: {ranks}; scale {scales}",
        "  replaces: the UNet's conv_in",
        f"  modulated by the image's blur and noise; degradation estimator: {'in this file' if adapter.estimator else 'a file of its own'}",
        f"  fits: {TEXT_WIDTHS.get(width or 0, 'a base of another kind')}, cross-attention dimension {width}; published for SD-Turbo",
    ]


def _parse_estimator(state: Mapping, metadata: Mapping[str, str], name: str) -> EstimatorWeights:
    from ..networks.degradation import parse_estimator

    return parse_estimator(state, metadata, name)


def save_estimator(weights: EstimatorWeights, path: str | Path) -> None:
    """Write an estimator as safetensors under its published keys."""
    save_safetensors(weights.state_dict, path, {"family": "S3Diff degradation estimator"})


def _summary_estimator(weights: EstimatorWeights) -> list[str]:
    from ..networks.degradation import DegradationConfig

    published = "as published" if weights.config == DegradationConfig() else "not the published dimensions"
    channels = f"{weights.config.channels} and {weights.config.out_channels} channels ({published})"
    return [f"  network: {channels}; blur and noise of an image, 0 to 1", "  fits: S3Diff (--estimator)"]


ESTIMATOR = Companion(
    option="estimator",
    weights=Source(
        what="S3Diff's degradation estimator",
        folder="s3diff",
        names=("de_net.safetensors", "de_net.pth"),
        licence="Apache-2.0, https://github.com/ArcticHare105/S3Diff",
        size="about 9 MB (computed from tensor shapes)",
        url="https://github.com/ArcticHare105/S3Diff/raw/main/assets/mm-realsr/de_net.pth",
    ),
    kind=FileKind("s3diff-estimator", "S3Diff's degradation estimator", has_key(r"^fc_degree\.0\.0\.")),
    contents="two small networks that estimate blur and noise",
    source="de_net.pth is at github.com/ArcticHare105/S3Diff, in assets/mm-realsr.",
    parse=_parse_estimator,
    save=save_estimator,
    summary=_summary_estimator,
    replaced_by=("blur", "noise"),
)


S3DIFF = Method(
    key="s3diff",
    title="S3Diff",
    paper=Paper(
        authors="Aiping Zhang, Zongsheng Yue, Renjing Pei, Wenqi Ren, Xiaochun Cao",
        title="Degradation-Guided One-Step Image Super-Resolution with Diffusion Priors",
        venue="arXiv 2024",
        url="https://arxiv.org/abs/2409.17058",
        code="https://github.com/ArcticHare105/S3Diff",
    ),
    base=INVSR.base,
    weights=Source(
        what="S3Diff's adapter",
        folder="s3diff",
        names=("s3diff.safetensors", "s3diff.pkl"),
        licence="Apache-2.0, https://huggingface.co/zhangap/S3Diff",
        size="about 136 MB (computed from tensor shapes)",
        repository="zhangap/S3Diff",
        file="s3diff.pkl",
    ),
    kind=FileKind("s3diff", "an S3Diff adapter", _matches),
    contents="LoRA weights for UNet and VAE encoder, the UNet's new conv_in, and the layers that modulate them by the image's degradation",
    source="s3diff.pkl is at huggingface.co/zhangap/S3Diff.",
    parse=_parse,
    save=save_adapter,
    summary=_summary,
    pipeline="S3DiffPipeline",
    color_fix="wavelet",
    prompt="A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting.",
    negative_prompt="oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth",
    cfg=1.07,
    one_step=OneStep(TIMESTEP, _equation, prompt="the prompt of its template", between="S3Diff Adapt"),
    options=(
        Option("estimator", "the file of the degradation estimator, de_net.pth", Path),
        Option("blur", "blur of the images, 0 to 1, instead of the estimate", number(float, 0, 1)),
        Option("noise", "noise of the images, 0 to 1, instead of the estimate", number(float, 0, 1)),
    ),
    companions=(ESTIMATOR,),
    published=(
        Published(
            "realsr",
            {"psnr": 25.03, "lpips": 0.2699, "musiq": 67.89, "clipiqa": 0.6722},
            "S3Diff's paper (https://arxiv.org/abs/2409.17058, Table 1), as others quote it",
        ),
        Published(
            "div2k",
            {"psnr": 23.53, "lpips": 0.258, "musiq": 67.92, "clipiqa": 0.699},
            "the comparison of MoR-DASR's paper, read in a summary of it",
        ),
    ),
)
