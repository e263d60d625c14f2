"""Adapters as ComfyUI patches: diffusers' layer names to ComfyUI's, shapes compared before anything is patched."""

import copy
from functools import cache

import comfy.diffusers_convert
import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from ..fewstep_sr.methods.method import Method
from ..fewstep_sr.weights.lora import Adapter, LowRank
from .checks import context_dim
from .marks import ATTACHMENT, Mark, MarkedLoRA


def adapt_model(model, method: Method, adapter: Adapter, strength: float):
    """A clone of MODEL with a method's adapter on its UNet at ``strength``. Raises ValueError where a layer is missing or of another shape."""
    if adapter.context_dim != context_dim(model):
        raise ValueError(
            f"model: found a cross-attention dimension of {context_dim(model)}, but the adapter was trained for {adapter.context_dim}. "
            "Load the base that the adapter belongs to: SD 2.1-base (512 pixels) for the published ones."
        )
    names = layer_names(model)
    patched = model.clone()
    marks = {lora_set: mark_of(method, adapter, lora_set) for lora_set in adapter.sets}
    patched.set_attachments(ATTACHMENT, next(iter(marks.values())))
    # (1 - strength) * weight + strength * replacement: at full strength the replacement alone.
    replaced = {names[k]: (v,) for k, v in adapter.unet_replaced.items()}
    _patch(patched, replaced, {names[k]: v.shape for k, v in adapter.unet_replaced.items()}, "model", strength, keep=1.0 - strength)
    for lora_set, layers in adapter.sets.items():
        _patch_low_rank(patched, layers, names, "model", strength, marks[lora_set])
    return patched


def layer_names(model) -> dict[str, str]:
    """ComfyUI's names of a MODEL's weights by diffusers'."""
    return {k: f"diffusion_model.{v}" for k, v in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()}


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
