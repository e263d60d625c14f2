"""LoRA weights (Hu et al., ICLR 2022), as PEFT writes them: one reader for every adapter file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

PEFT_ALPHA = 8.0
"""PEFT's default ``lora_alpha``, which the published trainings of this family leave as it is: the scale is 8 / rank at every rank."""


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one layer's weight: ``weight + scale * up @ down``.

    ``down`` is (rank, in, ...) and ``up`` (out, rank, ...), with kernel axes for convolutions; ``scale`` is ``alpha / rank``.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float = PEFT_ALPHA

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank (Hu et al., section 4.1)."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that this update fits."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """What a method's weights do to a base, by diffusers' layer names, such as ``down_blocks.0.resnets.0.conv1``.

    ``unet`` and ``vae`` hold the low-rank updates; ``unet_replaced`` weights and biases of the UNet that are replaced as a whole.
    """

    unet: dict[str, LowRank]
    vae: dict[str, LowRank] = field(default_factory=dict)
    unet_replaced: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank_unet(self) -> int:
        return next(iter(self.unet.values())).rank

    @property
    def rank_vae(self) -> int:
        """0 where the VAE stays the base's."""
        return next(iter(self.vae.values())).rank if self.vae else 0

    @property
    def context_dim(self) -> int | None:
        """Cross-attention dimension of the base that the adapter was trained on: 1024 for Stable Diffusion 2.x."""
        return next((low_rank.down.shape[1] for layer, low_rank in self.unet.items() if layer.endswith("attn2.to_k")), None)


def read_lora(state: Mapping[str, torch.Tensor], what: str, alpha: float | None = PEFT_ALPHA) -> dict[str, dict[str, LowRank]]:
    """Pair each ``<layer>.lora_A.<adapter>.weight`` with its ``lora_B``.

    Args:
        state: an adapter's tensors; keys of another form are passed over. Tensors are copied: the file may be a read-only map.
        what: the file and its part, for messages.
        alpha: of the scale ``alpha / rank``; None where it is the rank itself, so that the scale is 1.

    Returns:
        The layers of each of PEFT's adapters, by the adapter's name ("" where the keys have none).

    Raises:
        ValueError: there are none, a half is missing, or two halves do not fit together.
    """
    halves: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in state.items():
        if match := re.match(r"(.+)\.lora_([AB])\.(?:(\w+)\.)?weight$", str(key)):
            layer, half, adapter = match.groups()
            halves.setdefault(adapter or "", {}).setdefault(layer, {})[half] = tensor
    if not halves:
        raise ValueError(f"{what}: no low-rank weights (lora_A, lora_B) found; the file is incomplete.")
    return {adapter: {layer: _pair(pair, f"{what}: layer {layer}", alpha) for layer, pair in layers.items()} for adapter, layers in halves.items()}


def _pair(halves: dict[str, torch.Tensor], what: str, alpha: float | None) -> LowRank:
    if len(halves) != 2:
        raise ValueError(f"{what} has lora_{'A' if 'A' in halves else 'B'} but not its other half; the file is incomplete.")
    down, up = halves["A"], halves["B"]
    if min(down.ndim, up.ndim) < 2 or 0 in (*down.shape, *up.shape):
        raise ValueError(f"{what} has halves of shapes {tuple(down.shape)} and {tuple(up.shape)}, expected (rank, in, ...) and (out, rank, ...).")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"{what} has ranks {down.shape[0]} and {up.shape[1]} in its two halves, expected one rank.")
    return LowRank(down.clone(), up.clone(), float(down.shape[0]) if alpha is None else alpha)


def one_adapter(adapters: Mapping[str, dict[str, LowRank]], what: str) -> dict[str, LowRank]:
    """The layers of several of PEFT's adapters as one, where each layer is in one of them.

    Raises:
        ValueError: two adapters update the same layer, of which one would be lost.
    """
    layers: dict[str, LowRank] = {}
    owner: dict[str, str] = {}
    for name, members in adapters.items():
        for layer, low_rank in members.items():
            if layer in layers:
                raise ValueError(
                    f"{what}: layer {layer} has two adapters, {owner[layer]!r} and {name!r}, expected one for each layer. The file is of another method."
                )
            layers[layer], owner[layer] = low_rank, name
    return layers


def metadata_alpha(metadata: Mapping[str, str], name: str, default: float | None = PEFT_ALPHA) -> float | None:
    """``lora_alpha`` out of a file's metadata, ``default`` where it is not written there. Raises ValueError where it is no positive number."""
    text = metadata.get("lora_alpha")
    if text is None:
        return default
    try:
        alpha = float(text)
    except ValueError:
        alpha = float("nan")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"{name}: found lora_alpha {text[:40]!r} in its metadata, expected a positive number; the file is damaged.")
    return alpha
