"""Small valid weight files of every kind, and the ways in which their dictionaries and tensors are made wrong."""

import random
import re
import string
from functools import cache

import torch

from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig
from fewstep_sr.networks.ram import Tagger, TaggerConfig
from fewstep_sr.networks.swin import SwinConfig

TAGS = [f"tag {i}" for i in range(10)]
THRESHOLDS = [0.5] * len(TAGS)
KINDS = ("adapter", "predictor", "tagger", "dape")
WRAPPERS = ("state_dict", "model", "params", "params_ema", "state_dict_unet", "unet", "vae")


@cache
def networks() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    predictor = NoisePredictor(NoisePredictorConfig(block_out_channels=(64,), layers_per_block=(1,), time_channels=16, temb_channels=16))
    tagger = Tagger(TaggerConfig(SwinConfig(8, (1, 1), (1, 1), 3), len(TAGS), 8, 8, 16, 1))
    tagger.label_embed.data.normal_()
    return {
        "predictor": {k: v.detach() for k, v in predictor.state_dict().items()},
        "tagger": {k: v.detach() for k, v in tagger.state_dict().items()},
    }


def valid(kind: str) -> dict:
    """The published layout of a kind, with small tensors. A new dictionary at each call."""
    torch.manual_seed(1)
    draw = torch.randn
    if kind == "predictor":
        return dict(networks()["predictor"])
    if kind == "tagger":
        index = torch.zeros(9, 9, dtype=torch.int64)
        return {"model": {**networks()["tagger"], "visual_encoder.layers.0.blocks.0.attn.relative_position_index": index}, "epoch": 4}
    if kind == "dape":
        layer = "visual_encoder.layers.0.blocks.0"
        return {
            f"{layer}.attn.qkv.lora_A": draw(4, 8),
            f"{layer}.attn.qkv.lora_B": draw(16, 2),
            f"{layer}.attn.proj.lora_A": draw(2, 8),
            f"{layer}.attn.proj.lora_B": draw(8, 2),
        }
    conv = "down_blocks.0.resnets.0.conv1"
    text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    unet = {
        "conv_in.base_layer.weight": draw(16, 4, 3, 3),
        "conv_in.base_layer.bias": draw(16),
        f"{conv}.lora_A.default_encoder.weight": draw(4, 16, 3, 3),
        f"{conv}.lora_B.default_encoder.weight": draw(16, 4, 1, 1),
        f"{text}.lora_A.default_encoder.weight": draw(4, 64),
        f"{text}.lora_B.default_encoder.weight": draw(16, 4),
    }
    vae = {"quant_conv.lora_A.default_encoder.weight": draw(4, 8, 1, 1), "quant_conv.lora_B.default_encoder.weight": draw(8, 4, 1, 1)}
    return {
        "unet_lora_encoder_modules": [conv, text],
        "vae_lora_encoder_modules": ["quant_conv"],
        "rank_unet": 4,
        "rank_vae": 4,
        "state_dict_unet": unet,
        "state_dict_vae": vae,
    }


def wrong_key(rng: random.Random, key):
    text = str(key)
    numbers = list(re.finditer(r"\d+", text))
    if numbers and rng.random() < 0.5:
        place = rng.choice(numbers)
        number = rng.choice(["1", "2", "7", "63", "64", "999", "1000000000", "9" * 20, "9" * 5000, "-1", "007", "1.5", "²", "٣"])
        return text[: place.start()] + number + text[place.end() :]
    return rng.choice(
        [
            f"module.{text}",
            f"_orig_mod.module.{text}",
            f"{text}.extra",
            text[: rng.randrange(len(text) + 1)],
            text.replace("lora_A", "lora_B"),
            text.replace("weight", "bias"),
            text.upper(),
            "",
            "\ud800",
            "\x1b[31m\n\x00",
            "k" * rng.choice([600, 100_000]),
            rng.randrange(-5, 5),
            2**70,
            None,
            (1, "a"),
            b"bytes",
            1.5,
            float("nan"),
            True,
            "".join(rng.choices(string.printable, k=8)),
        ]
    )


def wrong_tensor(rng: random.Random, tensor: torch.Tensor):
    """Another tensor in this one's place: values, shape, dtype, layout, strides or device are not what they should be."""
    shape = list(tensor.shape)
    flat = tensor.clone().flatten()
    makers = (
        lambda: flat.index_fill(0, torch.tensor([rng.randrange(flat.numel())]), rng.choice([float("nan"), float("inf"), -float("inf")])).view(shape),
        lambda: torch.full(shape, float("nan")),
        lambda: tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])),
        lambda: torch.full(shape, float("nan")).to(torch.float8_e5m2),
        lambda: tensor.to(rng.choice([torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])),
        lambda: tensor.to(rng.choice([torch.complex64, torch.complex128])),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(rng.choice([[0], [0, *shape[1:]], [*shape[:-1], 0]])),
        lambda: torch.zeros([rng.randrange(1, 9) for _ in range(rng.randrange(1, 7))]),
        lambda: torch.zeros([n + rng.choice([-1, 0, 1]) if n > 1 else n for n in shape]),
        lambda: tensor[None] if rng.random() < 0.5 else flat,
        lambda: flat[:1].expand(rng.choice([[10**10], [10**5, 10**5], [4, 10**9], [2**40, 1, 1, 1]])),
        lambda: flat[:1].expand([rng.choice([n, 10**9]) for n in shape]),
        lambda: torch.as_strided(flat, [flat.numel()] * 3, [1, 0, 0]),
        lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
        lambda: tensor.to_sparse(),
        lambda: tensor.reshape(shape[0], -1).to_sparse_csr() if tensor.ndim > 1 else tensor.to_sparse(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.empty(shape, device="meta"),
        lambda: torch.empty([2**30, 2**30], device="meta"),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.complex(tensor.float(), tensor.float()).conj(),
        lambda: torch.complex(tensor.float(), tensor.float()).conj().imag,
        lambda: tensor.float() * 1e38 * 10 ** rng.randrange(3),
        lambda: tensor.untyped_storage(),
        lambda: tensor.numel(),
    )
    return rng.choice(makers)()


def wrong_value(rng: random.Random, content: dict):
    def shared(levels: int):
        value: object = [1]
        for _ in range(levels):
            value = [value, value] if rng.random() < 0.5 else {"a": value, "b": value}
        return value

    def deep(levels: int):
        value: object = {}
        for _ in range(levels):
            value = {rng.choice(WRAPPERS): value}
        return value

    values = (5, 2**70, 1.5, float("nan"), None, True, "text", "\ud800", b"bytes", (), [], {}, [1, "a"], {1: 2}, {"a": {}}, {1, 2}, complex(1, 2))
    return rng.choice([lambda: rng.choice(values), lambda: shared(40), lambda: deep(rng.choice([3, 40, 200])), lambda: content])()


def dictionaries(content: dict) -> list[dict]:
    return [content, *(value for value in content.values() if isinstance(value, dict) and value is not content)]


def make_wrong(rng: random.Random, content: dict):
    """One to three things about a valid file's dictionary made wrong; sometimes no dictionary is left."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = max(dictionaries(content), key=lambda d: len(d) * rng.random())
        if not place:
            continue
        key = rng.choice(list(place))
        deed = rng.randrange(12)
        if deed <= 4 and isinstance(place[key], torch.Tensor) and place[key].layout == torch.strided and place[key].is_floating_point():
            place[key] = wrong_tensor(rng, place[key]) if place[key].numel() and not place[key].is_meta else 5
        elif deed <= 6:
            place[wrong_key(rng, key)] = place[key] if rng.random() < 0.5 else place.pop(key)
        elif deed == 7:
            del place[key]
        elif deed == 8:
            place[rng.choice([key, *WRAPPERS, "more"])] = wrong_value(rng, content)
        elif deed == 9:
            wrapper = rng.choice(WRAPPERS)
            content = rng.choice([{wrapper: content}, {wrapper: content, "epoch": 1}, {f"module.{k}": v for k, v in content.items()}])
        elif deed == 10:
            prefix = rng.choice(["module.", "_orig_mod.", "unet.", "module.module."])
            renamed = {f"{prefix}{k}": v for k, v in place.items()}
            place.clear()
            place.update(renamed)
        else:
            return rng.choice([[content], content.get(key, []), (content, 1), "text", None, {0: content}, {"x": content}])
    return content
