"""LoRA on diffusers' networks, with peft, under the adapter names that the published trainings have."""

import warnings

import torch
from peft import LoraConfig

from fewstep_sr.weights.lora import LowRank


def require_layers(model, layers: dict[str, LowRank], what: str, base: str = "Stable Diffusion 2.1-base") -> None:
    """Refuse a base that has not the layers, in the shapes, that the adapter changes."""
    modules = dict(model.named_modules())
    for layer, low_rank in layers.items():
        found = tuple(modules[layer].weight.shape) if layer in modules else None
        _require_shape(found, low_rank.weight_shape, layer, what, base)


def require_replaced(model, replaced: dict[str, torch.Tensor], what: str, base: str) -> None:
    """Refuse a base that has not the weights, in the shapes, that the adapter replaces as a whole."""
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layers = {name.replace(".base_layer.", "."): shape for name, shape in found.items()}  # an adapter that is on already
    for name, tensor in replaced.items():
        _require_shape(layers.get(name), tuple(tensor.shape), name, what, base)


def _require_shape(found: tuple[int, ...] | None, expected: tuple[int, ...], layer: str, what: str, base: str) -> None:
    if found != expected:
        raise ValueError(
            f"{what}: layer {layer} has shape {found}, but the adapter's is {expected}. "
            f"It is not the base that the adapter was trained on: load {base} (512 pixels)."
        )


def put_on(model, layers: dict[str, LowRank], groups: dict[str, str], strength: float) -> None:
    """Put the low-rank updates on ``model`` as peft adapters. ``groups`` names the adapter of each layer."""
    names = list(dict.fromkeys(groups.values()))
    for name in names:
        members = {layer: low_rank for layer, low_rank in layers.items() if groups[layer] == name}
        first = next(iter(members.values()))
        others = {layer: low_rank for layer, low_rank in members.items() if (low_rank.rank, low_rank.alpha) != (first.rank, first.alpha)}
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.alpha,
            target_modules=list(members),
            rank_pattern={layer: low_rank.rank for layer, low_rank in others.items()},
            alpha_pattern={layer: low_rank.alpha for layer, low_rank in others.items()},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what OSEDiff has
            model.add_adapter(config, adapter_name=name)
        for layer, low_rank in members.items():
            module = model.get_submodule(layer)
            module.lora_A[name].weight.data.copy_(low_rank.down)
            module.lora_B[name].weight.data.copy_(low_rank.up)
            module.set_scale(name, strength)
    model.set_adapter(names)
    model.requires_grad_(False)
