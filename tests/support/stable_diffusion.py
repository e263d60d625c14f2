"""Checkpoint files of Stable Diffusion 2.x' real architecture with random weights, and OSEDiff and InvSR files that fit them.

``reduced`` keeps the widths by which ComfyUI recognises SD 2.x (320 channels, cross-attention dimension 1024) and the real VAE and text encoder, with fewer
UNet levels. ``full`` is SD 2.1-base's own shape, 865 million UNet parameters.
"""

from pathlib import Path

import safetensors.torch
import torch
import toys

UNETS = {
    "reduced": {"channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0]},
    "full": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def random_weights(shapes: dict[str, tuple], seed: int, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """Like procedural.weight, from torch's faster generator: activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(tuple(shape), generator=generator)
        if len(shape) >= 2:
            fan_in = torch.Size(shape[1:]).numel()
            noise *= (0.3 if ".lora_B." in key else 1.0) / fan_in**0.5
        else:
            noise = 1 + 0.1 * noise if key.endswith("weight") else 0.02 * noise
        tensors[key] = noise.to(dtype)
    return tensors


def unet_shapes(size: str) -> dict[str, tuple]:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = UNETS[size] | {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 1024}
    config |= {"use_linear_in_transformer": True, "transformer_depth_middle": 1, "num_head_channels": 64, "use_spatial_transformer": True}
    return _shapes(UNetModel(**config, device="meta"))


def vae_shapes() -> dict[str, tuple]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        return _shapes(AutoencoderKL(ddconfig=VAE, embed_dim=4))


def _shapes(network: torch.nn.Module) -> dict[str, tuple]:
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def text_encoder_shapes(layers: int = 24, width: int = 1024) -> dict[str, tuple]:
    """OpenCLIP ViT-H's text tower."""
    shapes = {"positional_embedding": (77, width), "token_embedding.weight": (49408, width), "text_projection": (width, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,)}
    for i in range(layers):
        for name, shape in {
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
            "ln_1": (width,),
            "ln_2": (width,),
        }.items():
            separator = "_" if name == "attn.in_proj" else "."
            shapes[f"transformer.resblocks.{i}.{name}{separator}weight"] = shape
            shapes[f"transformer.resblocks.{i}.{name}{separator}bias"] = shape[:1]
    return shapes


def write_checkpoint(path: Path, size: str) -> None:
    parts = {"model.diffusion_model": unet_shapes(size), "first_stage_model": vae_shapes(), "cond_stage_model.model": text_encoder_shapes()}
    shapes = {f"{prefix}.{k}": s for prefix, part in parts.items() for k, s in part.items()}
    safetensors.torch.save_file(random_weights(shapes, seed=0), path)


def write_osediff(path: Path, size: str, rank: int = 4) -> None:
    """An adapter in the published layout for :func:`write_checkpoint`'s networks."""
    torch.save(
        toys.osediff_checkpoint(0, rank, {"unet": diffusers_unet_shapes(size), "vae": diffusers_encoder_shapes()}, random_weights=random_weights),
        path,
    )


def diffusers_encoder_shapes() -> dict[str, tuple]:
    """Of the VAE's encoder and its quant_conv."""
    import comfy.diffusers_convert

    own = vae_shapes()
    names = [k for k in _vae_encoder_names() if comfy.diffusers_convert.convert_vae_state_dict({k: torch.empty(0)}).popitem()[0] in own]
    vae = {}
    for name in names:
        shape = own[comfy.diffusers_convert.convert_vae_state_dict({name: torch.empty(0)}).popitem()[0]]
        vae[name] = shape[:2] if "attentions" in name else shape
    return vae


def write_adapter(path: Path, family: str, size: str) -> None:
    """PiSA-SR's or HYPIR's adapter in the published layout, and where it is full in the published ranks, for :func:`write_checkpoint`'s UNet."""
    settings = toys.golden(f"{family}_square")[0] | ({"rank": 256, "rank_pix": 4, "rank_sem": 4} if size == "full" else {})
    torch.save(toys.adapter_checkpoint(settings, {"unet": diffusers_unet_shapes(size)}, random_weights), path)


def write_s3diff(folder: Path, size: str) -> None:
    """S3Diff's adapter and degradation estimator in the published layouts and dimensions, for :func:`write_checkpoint`'s networks."""
    from fewstep_sr.networks.degradation import DegradationConfig, DegradationEstimator

    rank_unet, rank_vae = (32, 16) if size == "full" else (8, 4)
    shapes = {"unet": diffusers_unet_shapes(size), "vae": diffusers_encoder_shapes()}
    torch.save(toys.s3diff_checkpoint(0, rank_unet, rank_vae, shapes, random_weights), folder / "s3diff.pkl")
    estimator = DegradationEstimator(DegradationConfig(), device="meta")
    torch.save(random_weights(_shapes(estimator), seed=2, dtype=torch.float32), folder / "de_net.pth")


def diffusers_unet_shapes(size: str) -> dict[str, tuple]:
    import comfy.utils

    config, unet = UNETS[size] | {"transformer_depth_middle": 1}, unet_shapes(size)
    return {diffusers: unet[own] for diffusers, own in comfy.utils.unet_to_diffusers(config).items() if own in unet}


def _vae_encoder_names() -> list[str]:
    names = ["encoder.conv_in", "encoder.conv_out", "quant_conv"]
    for block in (f"encoder.down_blocks.{i}" for i in range(4)):
        names += [f"{block}.resnets.{j}.{conv}" for j in range(2) for conv in ("conv1", "conv2", "conv_shortcut")] + [f"{block}.downsamplers.0.conv"]
    names += [f"encoder.mid_block.resnets.{j}.{conv}" for j in range(2) for conv in ("conv1", "conv2")]
    names += [f"encoder.mid_block.attentions.0.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    return [f"{name}.weight" for name in names]


def write_predictor(path: Path, size: str) -> None:
    """A noise predictor; ``full`` has the published dimensions."""
    from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig

    small = {"block_out_channels": (64, 128), "layers_per_block": (1, 1), "time_channels": 128, "temb_channels": 128}
    config = NoisePredictorConfig(**({} if size == "full" else small))
    torch.save({"state_dict": random_weights(_shapes(NoisePredictor(config, device="meta")), seed=1, dtype=torch.float32)}, path)
