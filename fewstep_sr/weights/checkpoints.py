"""The methods' published files, read into typed weights, or an error that says what the file is instead."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..methods.schedule import NUM_TRAIN_TIMESTEPS, OSEDIFF_TIMESTEP
from ..networks.noise_predictor import NoisePredictor, NoisePredictorConfig
from .read import describe, read_weights, strip_wrappers

LORA_ALPHA = 8
"""PEFT's default ``lora_alpha``, which OSEDiff leaves as it is: the scale is 8 / rank at every rank, so 2 at the published rank 4."""


OSEDIFF_FILE, PREDICTOR_FILE = "osediff.pkl", "noise_predictor_sd_turbo_v5.pth"
OSEDIFF_SOURCE = f"{OSEDIFF_FILE} is at github.com/cswry/OSEDiff, in preset/models."
PREDICTOR_SOURCE = f"{PREDICTOR_FILE} is at huggingface.co/OAOA/InvSR."


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one layer's weight: ``weight + (LORA_ALPHA / rank) * up @ down`` (Hu et al., ICLR 2022).

    ``down`` is (rank, in, ...) and ``up`` (out, rank, ...), with kernel axes for convolutions.
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that this update fits."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class OSEDiffAdapter:
    """An OSEDiff adapter (Wu et al., NeurIPS 2024) by diffusers' layer names, such as ``down_blocks.0.resnets.0.conv1``.

    ``unet`` and ``vae`` hold the low-rank updates; ``unet_replaced`` the weight and bias of the UNet's first convolution, which
    training replaces as a whole besides adapting it. The VAE's are on its encoder and ``quant_conv``. ``timestep`` is that of the one step it was trained at.
    """

    unet: dict[str, LowRank]
    vae: dict[str, LowRank]
    unet_replaced: dict[str, torch.Tensor]
    timestep: int = OSEDIFF_TIMESTEP

    @property
    def rank_unet(self) -> int:
        return next(iter(self.unet.values())).rank

    @property
    def rank_vae(self) -> int:
        return next(iter(self.vae.values())).rank

    @property
    def context_dim(self) -> int | None:
        """Width of the text conditioning that the adapter was trained with: 1024 for Stable Diffusion 2.x."""
        return next((low_rank.down.shape[1] for layer, low_rank in self.unet.items() if layer.endswith("attn2.to_k")), None)


def load_osediff_adapter(path: str | Path) -> OSEDiffAdapter:
    """Read an OSEDiff adapter.

    The published layout is a pickle with ``state_dict_unet``, ``state_dict_vae`` and ranks. The safetensors layout holds the same
    tensors under ``unet.`` and ``vae.``, and in its metadata the timestep, where that is not the published one. The rank comes from the tensors' shapes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused or something else; the message says what it is.
    """
    name = Path(path).name
    state, metadata = read_weights(path)
    unet, vae = state.get("state_dict_unet"), state.get("state_dict_vae")
    if unet is None and vae is None:
        unet = {k.removeprefix("unet."): v for k, v in state.items() if str(k).startswith("unet.")}
        vae = {k.removeprefix("vae."): v for k, v in state.items() if str(k).startswith("vae.")}
    if not isinstance(unet, Mapping) or not isinstance(vae, Mapping) or "conv_in.base_layer.weight" not in unet or "PiSA" in describe(state):
        raise ValueError(
            f"{name}: found {describe(state)}; expected an OSEDiff adapter (low-rank weights for UNet and VAE encoder, and the UNet's "
            f"new conv_in). Choose another file: {OSEDIFF_SOURCE}"
        )
    if "conv_in.base_layer.bias" not in unet:
        raise ValueError(f"{name}: UNet: the tensor conv_in.base_layer.bias is missing; the file is incomplete.")
    timestep = metadata.get("timestep", str(OSEDIFF_TIMESTEP))
    if not timestep.isdecimal() or int(timestep) >= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"{name}: found the timestep {timestep!r} in its metadata, expected 0 to {NUM_TRAIN_TIMESTEPS - 1}; the file is damaged.")
    return OSEDiffAdapter(
        unet=_low_rank_layers(unet, f"{name}: UNet"),
        vae=_low_rank_layers(vae, f"{name}: VAE"),
        unet_replaced={f"conv_in.{kind}": unet[f"conv_in.base_layer.{kind}"].clone() for kind in ("weight", "bias")},
        timestep=int(timestep),
    )


def _low_rank_layers(state: Mapping[str, torch.Tensor], what: str) -> dict[str, LowRank]:
    """Pair ``<layer>.lora_A.<adapter>.weight`` with its ``lora_B``. Tensors are copied: the file may be a read-only map."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if match := re.match(r"(.+)\.lora_([AB])\.(?:\w+\.)?weight$", key):
            layer, half = match.groups()
            halves.setdefault(layer, {})[half] = tensor.clone()
    if not halves:
        raise ValueError(f"{what}: no low-rank weights (lora_A, lora_B) found; the file is incomplete.")
    for layer, pair in halves.items():
        if len(pair) != 2:
            raise ValueError(f"{what}: layer {layer} has lora_{'A' if 'A' in pair else 'B'} but not its other half; the file is incomplete.")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{what}: layer {layer} has ranks {pair['A'].shape[0]} and {pair['B'].shape[1]} in its two halves, expected one rank.")
    return {layer: LowRank(down=pair["A"], up=pair["B"]) for layer, pair in halves.items()}


@dataclass(frozen=True)
class NoisePredictorWeights:
    """An InvSR noise predictor's weights (Yue et al., CVPR 2025) under the keys of :class:`fewstep_sr.networks.noise_predictor.NoisePredictor`."""

    config: NoisePredictorConfig
    state_dict: dict[str, torch.Tensor]


def load_noise_predictor_weights(path: str | Path) -> NoisePredictorWeights:
    """Read an InvSR noise predictor: a bare state dict or a training checkpoint with one under ``state_dict``.

    Prefixes left by DistributedDataParallel and torch.compile are taken off; dimensions come from the weights' shapes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused or something else; the message says what it is.
    """
    name = Path(path).name
    state, _ = read_weights(path)
    nested = state.get("state_dict")
    inner = nested if isinstance(nested, Mapping) else state
    weights = {strip_wrappers(k): v.clone() for k, v in inner.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if "encoder.time_embedding.linear_1.weight" not in weights:
        raise ValueError(f"{name}: found {describe(state)}; expected an InvSR noise predictor. Choose another file: {PREDICTOR_SOURCE}")
    try:
        config = NoisePredictorConfig.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    _check_shapes(weights, config, name)
    return NoisePredictorWeights(config, weights)


def _check_shapes(weights: Mapping[str, torch.Tensor], config: NoisePredictorConfig, name: str) -> None:
    expected = {k: tuple(v.shape) for k, v in NoisePredictor(config, device="meta").state_dict().items()}
    for key, shape in expected.items():
        found = tuple(weights[key].shape) if key in weights else None
        if found != shape:
            raise ValueError(f"{name}: {key} has {f'shape {found}' if found else 'no tensor'}, expected {shape}; the file is incomplete or damaged.")
    if surplus := sorted(set(weights) - set(expected)):
        raise ValueError(f"{name}: {surplus[0]} is no part of the network ({len(surplus)} such tensors); the file is of another network.")
