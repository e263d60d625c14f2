"""Adapters as ComfyUI patches: diffusers' layer names to ComfyUI's, shapes compared before anything is patched."""

import copy
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import comfy.diffusers_convert
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter

from ..fewstep_sr.methods.method import Method
from ..fewstep_sr.weights.lora import Adapter, LowRank
from .checks import context_dim

ATTACHMENT = "fewstep_sr_adapter"
"""A MODEL's attachment, which its clones keep: the :class:`Mark` of the adapter on it."""


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
    """The sets whose patches a MODEL or a VAE's patcher carries, and how much of each is left: 1 as published, 0 after a merge that lost it."""
    layers: dict[Mark, list[float]] = {}
    for patches in patcher.patches.values():
        for mark, share in _shares(patches).items():
            layers.setdefault(mark, []).append(share)
    return {mark: sum(shares) / len(shares) for mark, shares in layers.items()}


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


def adapt_model(model, method: Method, adapter: Adapter, strength: float):
    """A clone of MODEL with a method's adapter on its UNet at ``strength``. Raises ValueError where a layer is missing or of another shape."""
    if adapter.context_dim != context_dim(model):
        raise ValueError(
            f"model: found a text width of {context_dim(model)}, but the adapter was trained for {adapter.context_dim}. "
            "Load the base that the adapter belongs to: SD 2.1-base (512 pixels) for the published ones."
        )
    names = {k: f"diffusion_model.{v}" for k, v in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()}
    patched = model.clone()
    marks = {lora_set: mark_of(method, adapter, lora_set) for lora_set in adapter.sets}
    patched.set_attachments(ATTACHMENT, next(iter(marks.values())))
    # (1 - strength) * weight + strength * replacement: at full strength the replacement alone.
    replaced = {names[k]: (v,) for k, v in adapter.unet_replaced.items()}
    _patch(patched, replaced, {names[k]: v.shape for k, v in adapter.unet_replaced.items()}, "model", strength, keep=1.0 - strength)
    for lora_set, layers in adapter.sets.items():
        _patch_low_rank(patched, layers, names, "model", strength, marks[lora_set])
    return patched


def mark_of(method: Method, adapter: Adapter, lora_set: str = "") -> Mark:
    """The mark that an adapter's patches get."""
    assert method.one_step
    return Mark(method, getattr(adapter, "timestep", method.one_step.timestep), lora_set)


def adapt_vae(vae, method: Method, adapter: Adapter, strength: float):
    """A copy of VAE with the adapter on its encoder at ``strength``, the VAE itself where the method leaves it as it is."""
    if not adapter.vae:
        return vae
    keys = [f"{layer}.weight" for layer in adapter.vae]
    names = dict(zip(keys, comfy.diffusers_convert.convert_vae_state_dict({k: torch.empty(0) for k in keys})))
    patched = copy.copy(vae)
    patched.__class__ = _saving_patched(type(vae))
    patched.patcher = vae.patcher.clone()
    _patch_low_rank(patched.patcher, adapter.vae, names, "vae", strength, mark_of(method, adapter))
    return patched


@cache
def _saving_patched(kind: type) -> type:
    """A kind of VAE whose weights are saved as they act: core's Save VAE and Save Checkpoint take a VAE's network as it was loaded."""
    return kind if issubclass(kind, _SavesPatched) else type(kind.__name__, (_SavesPatched, kind), {})


class _SavesPatched:
    def get_sd(self) -> dict[str, torch.Tensor]:
        weights = {}
        for key, ((weight, convert), *patches) in self.patcher.get_key_patches().items():
            weights[key] = weight
            if patches:
                unpatched = convert(comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True), inplace=True)
                weights[key] = comfy.lora.calculate_weight(patches, unpatched, key).to(weight.dtype)
        return weights


def _patch_low_rank(patcher, layers: dict[str, LowRank], names: dict[str, str], what: str, strength: float, mark: Mark) -> None:
    missing = [layer for layer in layers if f"{layer}.weight" not in names]
    if missing:
        raise ValueError(f"{what}: it has no layer {missing[0]} (and {len(missing) - 1} more), which the adapter changes. {_WRONG_BASE}")
    patches, shapes = {}, {}
    for layer, low_rank in layers.items():
        key = names[f"{layer}.weight"]
        patches[key] = MarkedLoRA(mark, low_rank)
        shapes[key] = low_rank.weight_shape
    _patch(patcher, patches, shapes, what, strength)


_WRONG_BASE = "It is not the base that the adapter was trained on: load SD 2.1-base (512 pixels), MODEL and VAE of one checkpoint."


def _patch(patcher, patches: dict, shapes: dict, what: str, strength: float, keep: float = 1.0) -> None:
    for key, shape in shapes.items():
        found = _shape(patcher.model, key)
        # ComfyUI keeps some linear layers as 1 x 1 convolutions.
        if found is None or _without_kernel(found) != _without_kernel(shape):
            raise ValueError(f"{what}: layer {key} has shape {found}, but the adapter's is {tuple(shape)}. {_WRONG_BASE}")
    applied = patcher.add_patches(patches, strength, keep)
    if len(applied) != len(patches):
        raise ValueError(f"{what}: only {len(applied)} of {len(patches)} layers took the adapter. {_WRONG_BASE}")


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _shape(network: torch.nn.Module, key: str) -> tuple[int, ...] | None:
    """A layer's shape as it computes; its state dict may hold packed blocks of a quantised file instead. None where there is no such layer."""
    try:
        return tuple(comfy.utils.get_attr(network, key).shape)
    except AttributeError:
        return None
