"""LoRA weights (Hu et al., ICLR 2022), as PEFT writes them: one reader for every adapter file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..lazy import torch
from .strict import own_copies

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

    per_image: ClassVar[bool] = False
    """Whether it is another one for each image: ``for_image(part, scores)`` gives that of the ``"unet"`` or the ``"vae"``, an adapter of this class."""

    @property
    def sets(self) -> dict[str, dict[str, LowRank]]:
        """The low-rank updates of the UNet that act together or apart, by a name of each set; most methods have one, without a name."""
        return {"": self.unet}

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
    halves: dict[tuple[str, str], dict[str, str]] = {}
    for key in state:
        if match := re.match(r"(.+)\.lora_([AB])\.(?:(\w+)\.)?weight$", str(key)):
            layer, half, adapter = match.groups()
            halves.setdefault((adapter or "", layer), {})[half] = key
    if not halves:
        raise ValueError(f"{what}: no LoRA weights (lora_A, lora_B) found; the file is incomplete.")
    for (_, layer), pair in halves.items():
        _require_pair({half: state[key] for half, key in pair.items()}, f"{what}: layer {layer}")
    copies = own_copies({key: state[key] for pair in halves.values() for key in pair.values()}, what)
    layers: dict[str, dict[str, LowRank]] = {}
    for (adapter, layer), pair in halves.items():
        down, up = copies[pair["A"]], copies[pair["B"]]
        layers.setdefault(adapter, {})[layer] = LowRank(down, up, float(down.shape[0]) if alpha is None else alpha)
    return layers


def _require_pair(halves: Mapping[str, torch.Tensor], what: str) -> None:
    if len(halves) != 2:
        raise ValueError(f"{what} has lora_{'A' if 'A' in halves else 'B'} but not its other half; the file is incomplete.")
    down, up = halves["A"], halves["B"]
    if not (isinstance(down, torch.Tensor) and isinstance(up, torch.Tensor)):
        raise ValueError(f"{what} has something else than tensors for its lora_A and lora_B; the file is damaged.")
    if down.ndim != up.ndim or down.ndim not in (2, 4) or 0 in (*down.shape, *up.shape) or set(up.shape[2:]) - {1}:
        shapes = f"{tuple(down.shape[:8])} and {tuple(up.shape[:8])}"
        raise ValueError(f"{what} has halves of shapes {shapes}, expected (rank, in) and (out, rank), or (rank, in, h, w) and (out, rank, 1, 1).")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"{what} has ranks {down.shape[0]} and {up.shape[1]} in its two halves, expected one rank.")


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
