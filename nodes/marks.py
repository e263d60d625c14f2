"""Whose adapter a MODEL carries: marks on the patches, by which they are known after clones and merges and left out where a set must not act."""

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from comfy.weight_adapter import LoRAAdapter

from ..fewstep_sr.methods.method import Method
from ..fewstep_sr.weights.lora import LowRank

ATTACHMENT = "fewstep_sr_adapter"
"""A MODEL's attachment, which its clones keep: the :class:`Mark` of the adapter on it."""

PER_IMAGE = "fewstep_sr_per_image"
"""A MODEL's and a VAE's patcher's attachment: an adapter that is another one for each image, a :class:`nodes.per_image.PerImage`."""


@dataclass(frozen=True, eq=False)
class Mark:
    """By which a loaded adapter's patches are known, in merges of models too.

    Args:
        method: the family.
        timestep: at which the network is called.
        lora_set: which of ``Adapter.sets`` the patches are of.
    """

    method: Method
    timestep: int
    lora_set: str = ""


class MarkedLoRA(LoRAAdapter):
    """ComfyUI's LoRA patch of one layer, with the set that it is of."""

    def __init__(self, mark: Mark, low_rank: LowRank):
        super().__init__(set(), (low_rank.up, low_rank.down, low_rank.alpha, None, None, None))
        self.mark = mark


def acting_adapters(patcher) -> dict[Mark, float]:
    """The sets whose patches a MODEL or a VAE's patcher carries, and how much of each is left: 1 as published, 0 after a merge that lost it.

    An adapter that is another one for each image is among them before it is patches.
    """
    layers: dict[Mark, list[float]] = {}
    for patches in patcher.patches.values():
        for mark, share in _shares(patches).items():
            layers.setdefault(mark, []).append(share)
    carried = patcher.get_attachment(PER_IMAGE)
    return {mark: sum(shares) / len(shares) for mark, shares in layers.items()} | ({} if carried is None else {carried.mark: carried.share(patcher)})


def _shares(patches: list[tuple]) -> dict[Mark, float]:
    """How much of each set one layer's patches leave, in ComfyUI's order: each scales what is there, then adds its own."""
    shares: dict[Mark, float] = {}
    for strength, value, keep, *_ in patches:
        added = {}
        if isinstance(value, list):  # another model's layer with its own patches, as merges put it on
            added = _shares(value[1:])
        elif isinstance(value, MarkedLoRA):
            added = {value.mark: 1.0}
        shares = {mark: shares.get(mark, 0.0) * keep + added.get(mark, 0.0) * strength for mark in {**shares, **added}}
    return shares


def found_adapter(model) -> tuple[Mark | None, bool]:
    """The adapter that a MODEL carries, and whether it acts: not where a merge or a strength of 0 left nothing of it. None where there is none.

    Raises:
        ValueError: adapters of two families act.
    """
    shares = acting_adapters(model)
    acting = {mark.method.key: mark for mark, share in shares.items() if share}
    if len(acting) > 1:
        titles = " and ".join(mark.method.title for mark in acting.values())
        raise ValueError(f"model: found adapters of {titles} on it, expected one. Take the other loader out, or set its strength_model to 0.")
    if acting:
        return next(iter(acting.values())), True
    return next(iter(shares), model.get_attachment(ATTACHMENT)), not shares


def require_family(model, method: Method, otherwise: str) -> tuple[Mark | None, bool]:
    """:func:`found_adapter` for a node of one family. Refuses another family's adapter; ``otherwise`` says which node takes it."""
    mark, acts = found_adapter(model)
    if mark is None or mark.method.key == method.key:
        return mark, acts
    if acts:
        raise ValueError(f"model: found {mark.method.title}'s adapter on it, expected {method.title}'s. {otherwise}")
    return None, False


def with_sets(model, acting: Collection[str]):
    """A clone of MODEL on which of the adapter's sets only these act, MODEL itself where it has no others.

    Patches of other nodes stay, whether they were put on before the adapter or after it.
    """

    def left(patches: list[tuple]) -> list[tuple]:
        kept = []
        for strength, value, *rest in patches:
            if isinstance(value, list):  # as in _shares
                kept.append((strength, [value[0], *left(value[1:])], *rest))
            elif not isinstance(value, MarkedLoRA) or value.mark.lora_set in acting:
                kept.append((strength, value, *rest))
        return kept

    if {mark.lora_set for mark in acting_adapters(model)} <= set(acting):
        return model
    clone = model.clone()
    clone.patches = {key: kept for key, patches in model.patches.items() if (kept := left(patches))}
    # ComfyUI patches the weights anew where this differs, and only there: from one run to the next it does not.
    clone.patches_uuid = uuid.uuid5(model.patches_uuid, " ".join(acting))
    return clone
