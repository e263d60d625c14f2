"""The small real networks as diffusers and transformers build them, in pipelines and in folders."""

import copy
import json
from functools import cache
from pathlib import Path

import torch
import toys
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


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


def components(seed: int, text: Path | None = None) -> dict:
    """What both pipelines are made of; with text encoder and tokenizer where there is a folder for the latter."""
    text_parts = {"text_encoder": text_encoder(), "tokenizer": tokenizer(text)} if text else {"text_encoder": None, "tokenizer": None}
    return {"vae": vae(seed), "unet": unet(seed), "scheduler": scheduler(), **text_parts}
