"""Small real networks with procedural weights: state dicts in diffusers' names, and ComfyUI's MODEL and VAE around them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import procedural
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "shapes.json").read_text())
HEAD_DIM = 16  # of the tiny UNet: 2 heads over 32 channels, 4 over 64


@cache
def golden(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Settings and arrays of a golden case (see golden/README.md)."""
    settings = json.loads((GOLDEN / f"{case}.json").read_text())
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return settings, {k: torch.from_numpy(arrays[k]) for k in arrays}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gaussian(seed: int, name: str, shape) -> torch.Tensor:
    return torch.from_numpy(procedural.gaussian(seed, name, tuple(shape)))


def picture(seed: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """IMAGE (B, H, W, 3) in [0, 1]."""
    return torch.stack([torch.from_numpy(procedural.image(seed + i, height, width)) for i in range(batch)])


def weights(seed: int, prefix: str, shapes: dict) -> dict[str, torch.Tensor]:
    return {k: _weight(seed, f"{prefix}.{k}", tuple(s)).clone() for k, s in shapes.items()}


@cache
def _weight(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(procedural.weight(seed, name, shape))


def unet_state_dict(seed: int, context: int = 64) -> dict[str, torch.Tensor]:
    """The UNet's weights; ``context`` is the width of its text conditioning."""
    text = ("attn2.to_k.weight", "attn2.to_v.weight")
    return weights(seed, "unet", {k: [s[0], context] if k.endswith(text) else s for k, s in SHAPES["unet"].items()})


def vae_state_dict(seed: int) -> dict[str, torch.Tensor]:
    return weights(seed, "vae", SHAPES["vae"])


def predictor_state_dict(seed: int, settings: dict | None = None) -> dict[str, torch.Tensor]:
    from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig

    config = (settings or golden("invsr_steps1")[0])["noise_predictor"]
    network = NoisePredictor(
        NoisePredictorConfig(
            block_out_channels=tuple(config["block_out_channels"]),
            layers_per_block=tuple(config["layers_per_block"]),
            time_channels=max(128, config["block_out_channels"][0]),
            temb_channels=config["temb_channels"],
        )
    )
    return weights(seed, "noise_predictor", {k: tuple(v.shape) for k, v in network.state_dict().items()})


UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")
VAE_TARGETS = ("conv", "to_k", "to_q", "to_v", "to_out.0")


def osediff_checkpoint(seed: int, rank: int, shapes: dict = SHAPES, random_weights=None) -> dict:
    """An adapter in the published layout: what training's save function writes, with procedural weights.

    ``shapes`` are the networks' under diffusers' names; ``random_weights(shapes, seed)`` replaces the slow procedural ones for large networks.
    """
    unet, groups = {}, {"encoder": [], "decoder": [], "others": []}
    for key, shape in shapes["unet"].items():
        layer = key.removesuffix(".weight")
        if "bias" in key or "norm" in key or not any(t in key for t in UNET_TARGETS):
            continue
        if "down_blocks" in key or "conv_in" in key:
            group = "encoder"
        elif "up_blocks" in key or "conv_out" in key:
            group = "decoder"
        else:
            group = "others"
        groups[group].append(layer)
        unet |= _low_rank(layer, shape, rank, f"default_{group}")
    for kind in ("weight", "bias"):
        unet[f"conv_in.base_layer.{kind}"] = shapes["unet"][f"conv_in.{kind}"]

    vae, vae_layers = {}, []
    for key, shape in shapes["vae"].items():
        layer = key.removesuffix(".weight")
        on_encoder = "encoder" in key and any(t in key for t in VAE_TARGETS)
        if "bias" in key or "norm" in key or not (on_encoder or layer == "quant_conv"):
            continue
        vae_layers.append(layer)
        vae |= _low_rank(layer, shape, rank, "default_encoder")
    return {
        "vae_lora_encoder_modules": vae_layers,
        **{f"unet_lora_{group}_modules": layers for group, layers in groups.items()},
        "rank_unet": rank,
        "rank_vae": rank,
        "state_dict_unet": random_weights(unet, seed) if random_weights else weights(seed, "osediff.unet", unet),
        "state_dict_vae": random_weights(vae, seed) if random_weights else weights(seed, "osediff.vae", vae),
    }


def adapter_checkpoint(settings: dict, shapes: dict = SHAPES, random_weights=None) -> dict:
    """PiSA-SR's or HYPIR's adapter in the released layout, with the procedural weights of a golden case; ``random_weights`` as above."""
    prefix, seed = settings["adapter_weight_prefix"], settings["seed"]
    hypir = prefix.startswith("hypir")
    unet: dict[str, tuple] = {}
    for key, shape in shapes["unet"].items():
        layer = key.removesuffix(".weight")
        if "bias" in key or "norm" in key or not any(t in key for t in (*UNET_TARGETS, "conv_out")) or (hypir and layer == "conv_in"):
            continue
        if hypir:
            unet |= _low_rank(layer, shape, settings["rank"], "default")
        else:
            group = "encoder" if "down_blocks" in key or "conv_in" in key else "decoder" if "up_blocks" in key or "conv_out" in key else "others"
            for which in ("pix", "sem"):
                unet |= _low_rank(layer, shape, settings[f"rank_{which}"], f"default_{group}_{which}")
    state = random_weights(unet, seed) if random_weights else weights(seed, prefix, unet)
    if hypir:
        return state
    return {"lora_rank_unet_pix": settings["rank_pix"], "lora_rank_unet_sem": settings["rank_sem"], "state_dict_unet": state}


def s3diff_checkpoint(seed: int, rank_unet: int, rank_vae: int, shapes: dict, random_weights) -> dict:
    """S3Diff's adapter in the released layout."""
    unet: dict[str, tuple] = {f"conv_in.{kind}": shapes["unet"][f"conv_in.{kind}"] for kind in ("weight", "bias")}
    for key, shape in shapes["unet"].items():
        layer = key.removesuffix(".weight")
        if "bias" not in key and "norm" not in key and layer != "conv_in" and any(t in key for t in (*UNET_TARGETS, "conv_out")):
            unet |= _low_rank(layer, shape, rank_unet, "default")
    vae: dict[str, tuple] = {}
    for key, shape in shapes["vae"].items():
        if key.startswith("encoder.") and key.endswith(".weight") and "norm" not in key:
            vae |= _low_rank(key.removesuffix(".weight"), shape, rank_vae, "vae_skip")
    state = {"rank_unet": rank_unet, "rank_vae": rank_vae, "w": torch.nn.Parameter(gaussian(seed, "s3diff.W", (64,)), requires_grad=False)}
    embeddings = {}
    for part, rank, blocks, layers in (("unet", rank_unet, 10, unet), ("vae", rank_vae, 6, vae)):
        mlps = {
            "de_mlp": {"0.weight": (256, 256), "0.bias": (256,)},
            "block_mlp": {"0.weight": (64, 64), "0.bias": (64,)},
            "fuse_mlp": {"weight": (rank**2, 320), "bias": (rank**2,)},
        }
        state |= {f"state_dict_{part}": random_weights(layers, seed)}
        state |= {f"state_dict_{part}_{mlp}": random_weights(members, seed) for mlp, members in mlps.items()}
        embeddings[f"state_dict_{part}_block"] = {"weight": gaussian(seed, f"s3diff.{part}", (blocks, 64))}
    return state | {"state_embeddings": embeddings}


def _low_rank(layer: str, shape, rank: int, adapter: str) -> dict[str, tuple]:
    out_channels, in_channels, *kernel = shape
    return {
        f"{layer}.lora_A.{adapter}.weight": (rank, in_channels, *kernel),
        f"{layer}.lora_B.{adapter}.weight": (out_channels, rank, *(1 for _ in kernel)),
    }


def conditioning(seed: int, name: str = "prompt_embeds", width: int = 64) -> list:
    """CONDITIONING of one prompt."""
    return [[gaussian(seed, name, (1, 77, width)), {}]]


def comfy_model(seed: int, v_prediction: bool = False, context: int = 64, dtype: torch.dtype = torch.float32):
    """A MODEL: the tiny UNet as ComfyUI builds and manages it."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    settings, _ = golden("osediff_square")
    blocks, layers = settings["unet"]["block_out_channels"], settings["unet"]["layers_per_block"]
    depth = [int(t.startswith("CrossAttn")) for t in settings["unet"]["down_block_types"]]
    names = comfy.utils.unet_to_diffusers(
        {
            "num_res_blocks": [layers] * len(blocks),
            "channel_mult": [1] * len(blocks),
            "transformer_depth": [d for d in depth for _ in range(layers)],
            "transformer_depth_output": [d for d in depth for _ in range(layers + 1)],
            "transformer_depth_middle": 1,
        }
    )
    state_dict = {names[k]: v for k, v in unet_state_dict(seed, context).items()}
    config = comfy.supported_models.SD20(comfy.model_detection.detect_unet_config(state_dict, ""))
    config.unet_config |= {"num_head_channels": HEAD_DIM, "num_heads": -1, "dtype": dtype}
    if dtype.itemsize == 1:  # computed in another, as ComfyUI does
        config.set_inference_dtype(dtype, torch.float32)
    kind = comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS
    model = comfy.model_base.BaseModel(config, model_type=kind)
    model.diffusion_model.load_state_dict(state_dict)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model.eval(), load_device=device, offload_device=comfy.model_management.unet_offload_device())


def comfy_vae(seed: int):
    """A VAE: the tiny autoencoder as ComfyUI builds and manages it."""
    import comfy.sd

    settings, _ = golden("osediff_square")
    channels, layers = settings["vae"]["block_out_channels"], settings["vae"]["layers_per_block"]
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": layers,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return comfy.sd.VAE(sd=vae_state_dict(seed), config={"params": {"ddconfig": ddconfig, "embed_dim": 4}})
