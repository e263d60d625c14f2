"""Adapters with random weights for a base's networks, and the settings that show their own stages: for measuring where there are no trained ones."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fewstep_sr.methods import METHODS as FAMILIES
from fewstep_sr.methods import hypir, pisasr, s3diff
from fewstep_sr.weights.lora import LowRank

SEED = 5

METHODS = ("pisasr", "hypir", "s3diff")


def own_settings(method: str, embeds: torch.Tensor) -> dict:
    """Arguments of a call: PiSA-SR's two calls of the network, S3Diff's guidance with scores that no estimator is needed for."""
    settings = {"pisasr": {"pixel": 1.0, "semantic": 0.6}, "s3diff": {"blur": 0.6, "noise": 0.4, "negative_prompt_embeds": -embeds}}
    return settings.get(method, {})


RANK = 4


def write_random_adapter(base: str, method: str, path: Path) -> Path:
    """Writes an adapter of one of METHODS with random weights for the base's networks: each layer's weight changes by about a tenth."""
    generator = torch.Generator().manual_seed(SEED)
    unet, vae = UNet2DConditionModel.from_pretrained(base, subfolder="unet"), AutoencoderKL.from_pretrained(base, subfolder="vae")

    def normal(*shape, gain=1.0):
        return gain * torch.randn(*shape, generator=generator)

    def low_rank(network, adapted, alpha) -> dict:
        layers = {}
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and adapted(name):
                out, inside, *kernel = module.weight.shape
                gain = 0.1 * module.weight.detach().float().std().item() * RANK**0.5 / alpha
                layers[name] = LowRank(normal(RANK, inside, *kernel), normal(out, RANK, *(1 for _ in kernel), gain=gain), alpha)
        return layers

    if method == "hypir":
        adapter = hypir.HYPIRAdapter(low_rank(unet, lambda name: "time" not in name and name != "conv_in", RANK))
    elif method == "pisasr":
        pix, sem = (low_rank(unet, lambda name: "time" not in name, 8.0) for _ in pisasr.SETS)
        adapter = pisasr.PiSASRAdapter(pix, semantic=sem)
    else:
        embedding, widths = 64, {"de_mlp.0": (256, 256), "block_mlp.0": (64, 64), "fuse_mlp": (RANK**2, 320)}

        def mlps() -> dict:
            weights = {f"{name}.weight": normal(*shape, gain=shape[1] ** -0.5) for name, shape in widths.items()}
            return weights | {f"{name}.bias": torch.zeros(shape[0]) for name, shape in widths.items()}

        modulation = {part: mlps() | {"block_embeddings.weight": normal(blocks, embedding)} for part, blocks in s3diff.BLOCKS.items()}
        adapter = s3diff.S3DiffAdapter(
            low_rank(unet, lambda name: "time" not in name and name != "conv_in", 8.0),
            low_rank(vae, lambda name: name.startswith("encoder."), 8.0),
            {f"conv_in.{name}": tensor.detach().clone() for name, tensor in unet.conv_in.named_parameters()},
            frequencies=normal(64),
            modulation=modulation,
        )
    FAMILIES[method].save(adapter, path)
    return path
