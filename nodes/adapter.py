"""OSEDiff's adapter as ComfyUI patches: diffusers' layer names to ComfyUI's, shapes compared before anything is patched."""

import copy

import comfy.diffusers_convert
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter

from ..fewstep_sr.methods.osediff import OSEDiffAdapter
from ..fewstep_sr.weights.lora import LowRank
from .checks import context_dim

ATTACHMENT = "fewstep_sr_osediff"
"""A MODEL's attachment: the timestep at which the adapter on it was trained."""


def adapt_model(model, adapter: OSEDiffAdapter, strength: float):
    """A clone of MODEL with the adapter's UNet part at ``strength``. Raises ValueError where a layer is missing or of another shape."""
    if adapter.context_dim != context_dim(model):
        raise ValueError(
            f"model: found a text width of {context_dim(model)}, but the adapter was trained for {adapter.context_dim}. "
            "Load the base that the adapter belongs to: SD 2.1-base (512 pixels) for the published ones."
        )
    names = {k: f"diffusion_model.{v}" for k, v in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()}
    patched = model.clone()
    patched.set_attachments(ATTACHMENT, adapter.timestep)
    # (1 - strength) * weight + strength * replacement: at full strength the replacement alone.
    replaced = {names[k]: (v,) for k, v in adapter.unet_replaced.items()}
    _patch(patched, replaced, {names[k]: v.shape for k, v in adapter.unet_replaced.items()}, "model", strength, keep=1.0 - strength)
    _patch_low_rank(patched, adapter.unet, names, "model", strength)
    return patched


def adapt_vae(vae, adapter: OSEDiffAdapter, strength: float):
    """A copy of VAE with the adapter on its encoder at ``strength``; the given VAE stays as it is."""
    keys = [f"{layer}.weight" for layer in adapter.vae]
    names = dict(zip(keys, comfy.diffusers_convert.convert_vae_state_dict({k: torch.empty(0) for k in keys})))
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    _patch_low_rank(patched.patcher, adapter.vae, names, "vae", strength)
    return patched


def _patch_low_rank(patcher, layers: dict[str, LowRank], names: dict[str, str], what: str, strength: float) -> None:
    missing = [layer for layer in layers if f"{layer}.weight" not in names]
    if missing:
        raise ValueError(f"{what}: it has no layer {missing[0]} (and {len(missing) - 1} more), which the adapter changes. {_WRONG_BASE}")
    patches, shapes = {}, {}
    for layer, low_rank in layers.items():
        key = names[f"{layer}.weight"]
        patches[key] = LoRAAdapter(set(), (low_rank.up, low_rank.down, low_rank.alpha, None, None, None))
        shapes[key] = low_rank.weight_shape
    _patch(patcher, patches, shapes, what, strength)


_WRONG_BASE = "It is not the base that the adapter was trained on: load SD 2.1-base (512 pixels), MODEL and VAE of one checkpoint."


def _patch(patcher, patches: dict, shapes: dict, what: str, strength: float, keep: float = 1.0) -> None:
    weights = patcher.model.state_dict()
    for key, shape in shapes.items():
        found = tuple(weights[key].shape) if key in weights else None
        # ComfyUI keeps some linear layers as 1 x 1 convolutions.
        if found is None or _without_kernel(found) != _without_kernel(shape):
            raise ValueError(f"{what}: layer {key} has shape {found}, but the adapter's is {tuple(shape)}. {_WRONG_BASE}")
    applied = patcher.add_patches(patches, strength, keep)
    if len(applied) != len(patches):
        raise ValueError(f"{what}: only {len(applied)} of {len(patches)} layers took the adapter. {_WRONG_BASE}")


def _without_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
