"""The small real networks as diffusers and transformers build them, in pipelines and in folders."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import torch
import toys
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep_sr.methods.osediff import OSEDiffAdapter, save_adapter
from fewstep_sr.weights.lora import LowRank


def unet(seed: int) -> UNet2DConditionModel:
    return copy.deepcopy(_unet(seed))  # which takes a tenth of building one


def vae(seed: int) -> AutoencoderKL:
    return copy.deepcopy(_vae(seed))


@cache
def _unet(seed: int) -> UNet2DConditionModel:
    network = UNet2DConditionModel(**toys.golden("osediff_square")[0]["unet"])
    network.load_state_dict(toys.unet_state_dict(seed))
    return network.eval()


@cache
def _vae(seed: int) -> AutoencoderKL:
    network = AutoencoderKL(**toys.golden("osediff_square")[0]["vae"])
    network.load_state_dict(toys.vae_state_dict(seed))
    return network.eval()


@cache
def _narrow() -> tuple[AutoencoderKL, UNet2DConditionModel]:
    """All levels and blocks with 8 channels each and random weights, for what takes many pixels."""
    channels, groups = (8, 8, 8, 8), {"norm_num_groups": 4, "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        network = UNet2DConditionModel(
            block_out_channels=channels, attention_head_dim=2, cross_attention_dim=64, use_linear_projection=True, **groups
        )
        return AutoencoderKL(block_out_channels=channels, **groups, **blocks).eval(), network.eval()


def narrow_adapter(path: Path, rank: int = 2) -> Path:
    """Writes an OSEDiff adapter for the narrow networks, random and strong, on the encoder's convolutions and the UNet's attention."""
    generator, layers = torch.Generator().manual_seed(0), {"unet": {}, "vae": {}}
    for part, network, adapted in (("vae", _narrow()[0], r"encoder\..*conv"), ("unet", _narrow()[1], r".*attn2\.to_[kv]$")):
        for name, module in network.named_modules():
            if re.match(adapted, name) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                out, inside, *kernel = module.weight.shape
                down, up = torch.randn(rank, inside, *kernel, generator=generator), torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
                layers[part][name] = LowRank(down, 0.3 * module.weight.std().item() / 4 * up)
    conv_in = {f"conv_in.{name}": tensor.detach().clone() for name, tensor in _narrow()[1].conv_in.named_parameters()}
    save_adapter(OSEDiffAdapter(layers["unet"], layers["vae"], conv_in), path)
    return path


def scheduler(**changes) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**toys.golden("invsr_steps1")[0]["scheduler"] | changes)


@cache
def text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=512, eos_token_id=513
    )
    return CLIPTextModel(config).eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte tokens without any merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")


def components(seed: int, text: Path | None = None, narrow: bool = False) -> dict:
    """What both pipelines are made of; with text encoder and tokenizer where there is a folder for the latter."""
    text_parts = {"text_encoder": text_encoder(), "tokenizer": tokenizer(text)} if text else {"text_encoder": None, "tokenizer": None}
    autoencoder, network = copy.deepcopy(_narrow()) if narrow else (vae(seed), unet(seed))
    return {"vae": autoencoder, "unet": network, "scheduler": scheduler(), **text_parts}
