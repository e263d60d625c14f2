"""Trainable low-rank updates on diffusers' networks (peft), as OSEDiff's and PiSA-SR's trainings make them, and back into the published form."""

import warnings
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from fewstep_sr.methods.osediff import TIMESTEP, VAE_GROUP, OSEDiffAdapter, unet_group
from fewstep_sr.methods.pisasr import PiSASRAdapter, peft_name
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


def _groups(unet: UNet2DConditionModel, name: Callable[[str], str] = unet_group) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for layer in _layers(unet, UNET_LAYERS):
        groups.setdefault(name(layer), []).append(layer)
    return groups


def adapt_set(unet: UNet2DConditionModel, which: str, rank: int) -> None:
    """Freeze the UNet but for a new set, ``"pix"`` or ``"sem"``, of PiSA-SR's low-rank updates. A set that is on already acts and stays as it is."""
    others = list(getattr(unet, "peft_config", {}))
    _adapt(unet, _groups(unet, lambda layer: peft_name(layer, which)), rank)
    unet.set_adapter(list(unet.peft_config))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name and not any(f".{other}." in name for other in others))


def extract_sets(unet: UNet2DConditionModel) -> PiSASRAdapter:
    """Both of PiSA-SR's sets, copied to the CPU. Where the semantic one is not on yet, it is one that changes nothing, as the published training
    writes it at the end of its first stage.
    """
    pix = _low_rank(unet, "_pix")
    idle = {layer: LowRank(down=low_rank.down.clone(), up=torch.zeros_like(low_rank.up)) for layer, low_rank in pix.items()}
    sem = _low_rank(unet, "_sem") or idle
    return PiSASRAdapter(unet=pix, semantic=sem)


def adapt_vae(vae: AutoencoderKL, rank: int) -> None:
    """Freeze the VAE but for new low-rank updates of its encoder and ``quant_conv``."""
    _adapt(vae, {VAE_GROUP: [f"encoder.{layer}" for layer in _layers(vae.encoder, VAE_LAYERS)] + ["quant_conv"]}, rank)


def _layers(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """The base's own layers that are to be adapted, whether or not they have updates on already."""
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "norm" not in name and ".lora_" not in name and any(part in name for part in parts)
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


def _low_rank(model: nn.Module, which: str = "") -> dict[str, LowRank]:
    """The updates of the adapters whose names end in ``which``."""
    updates = {}
    for layer, module in model.named_modules():
        for group in getattr(module, "lora_A", ()):
            if group.endswith(which):
                updates[layer] = LowRank(down=_copy(module.lora_A[group].weight), up=_copy(module.lora_B[group].weight))
    return updates


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().cpu().clone()
