"""OSEDiff's trainable low-rank updates on diffusers' networks (peft), and back into the published form."""

import warnings

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from fewstep_sr.methods.osediff import TIMESTEP, VAE_GROUP, OSEDiffAdapter, unet_group
from fewstep_sr.weights.lora import PEFT_ALPHA, LowRank

# The layers that OSEDiff's training adapts are those whose names hold one of these (train_osediff.py), and no "norm".
UNET_LAYERS = ("conv", "to_k", "to_q", "to_v", "to_out.0", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")
VAE_LAYERS = ("conv", "to_k", "to_q", "to_v", "to_out.0")


def adapt_generator(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the UNet but for new low-rank updates in OSEDiff's three groups, and the first convolution's own weights."""
    _adapt(unet, _groups(unet), rank)
    unet.conv_in.base_layer.requires_grad_(True)


def adapt_regulariser(unet: UNet2DConditionModel, rank: int, everywhere: bool = False) -> None:
    """Freeze the UNet but for new low-rank updates: of the middle alone, or ``everywhere``.

    The published training makes updates everywhere but leaves those of the last group alone active, which is the middle's: peft activates what it adds.
    """
    groups = _groups(unet)
    _adapt(unet, groups if everywhere else {"default_others": groups["default_others"]}, rank)


def _groups(unet: UNet2DConditionModel) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer in _layers(unet, UNET_LAYERS):
        groups.setdefault(unet_group(layer), []).append(layer)
    return groups


def adapt_vae(vae: AutoencoderKL, rank: int) -> None:
    """Freeze the VAE but for new low-rank updates of its encoder and ``quant_conv``."""
    _adapt(vae, {VAE_GROUP: [f"encoder.{layer}" for layer in _layers(vae.encoder, VAE_LAYERS)] + ["quant_conv"]}, rank)


def _layers(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "norm" not in name and any(part in name for part in parts)
    ]


def _adapt(model: UNet2DConditionModel | AutoencoderKL, groups: dict[str, list[str]], rank: int) -> None:
    model.requires_grad_(False)
    for name, layers in groups.items():
        config = LoraConfig(r=rank, lora_alpha=PEFT_ALPHA, init_lora_weights="gaussian", target_modules=layers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what OSEDiff has
            model.add_adapter(config, adapter_name=name)
    model.set_adapter(list(groups))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def extract_adapter(unet: UNet2DConditionModel, vae: AutoencoderKL, timestep: int = TIMESTEP) -> OSEDiffAdapter:
    """The updates trained at ``timestep``, copied to the CPU, as :func:`fewstep_sr.methods.osediff.save_adapter` writes them and the nodes and pipelines load them."""
    replaced = {f"conv_in.{name}": _copy(parameter) for name, parameter in unet.conv_in.base_layer.named_parameters()}
    return OSEDiffAdapter(unet=_low_rank(unet), vae=_low_rank(vae), unet_replaced=replaced, timestep=timestep)


def _low_rank(model: nn.Module) -> dict[str, LowRank]:
    updates = {}
    for layer, module in model.named_modules():
        for group in getattr(module, "lora_A", ()):
            updates[layer] = LowRank(down=_copy(module.lora_A[group].weight), up=_copy(module.lora_B[group].weight))
    return updates


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().cpu().clone()
