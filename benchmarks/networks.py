"""Small networks of the published structure for the benchmarks, in ComfyUI and in diffusers, and the pictures that go through them."""

import asyncio
import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
SEED = 5
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def load_nodes():
    """ComfyUI's node classes, the pack's among them, on the CPU."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(COMFYUI))  # before the checkout, whose `nodes` folder has the name of ComfyUI's module
    from comfy.cli_args import args

    args.cpu = True
    import nodes

    async def load():
        await nodes.init_public_apis()
        await nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")
        for extra in ("nodes_custom_sampler.py",):
            await nodes.load_custom_node(str(COMFYUI / "comfy_extras" / extra), module_parent="comfy_extras")

    asyncio.run(load())
    return nodes.NODE_CLASS_MAPPINGS


def comfy_vae():
    """A VAE of 32 channels on every level, one block each: the smallest that ComfyUI's 32 groups allow, with groups of 4 channels."""
    import comfy.ldm.models.autoencoder
    import comfy.sd
    import toys

    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1]}
    params = {"ddconfig": ddconfig | {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}, "embed_dim": 4}
    shapes = {k: v.shape for k, v in comfy.ldm.models.autoencoder.AutoencoderKL(**copy.deepcopy(params)).state_dict().items()}
    vae = comfy.sd.VAE(sd=toys.weights(SEED, "benchmark", shapes), config={"params": params})
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 8
    return vae


def diffusers_vae(path: str | None):
    """The VAE in ``path``, or one with random weights."""
    from diffusers import AutoencoderKL

    if path:
        return AutoencoderKL.from_pretrained(path).eval()
    torch.manual_seed(SEED)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(block_out_channels=(32, 32, 64, 128), norm_num_groups=8, **blocks).eval()


def diffusers_unet(path: str | None):
    """The UNet in ``path``, or one of the published structure with a tenth of its channels and random weights."""
    from diffusers import UNet2DConditionModel

    if path:
        return UNet2DConditionModel.from_pretrained(path).eval()
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), attention_head_dim=(2, 4, 8, 8), cross_attention_dim=64, norm_num_groups=8, use_linear_projection=True
    ).eval()


def noise_predictor(path: str | None):
    """The predictor in ``path``, or a small one with random weights."""
    from pipelines import InvSRNoisePredictor

    if path:
        return InvSRNoisePredictor.from_weights(path)
    torch.manual_seed(SEED)
    return InvSRNoisePredictor(block_out_channels=(64, 64), layers_per_block=(1, 1), time_channels=128, temb_channels=64).eval()


def pipeline(base: str, kind, weights: str | Path):
    """A method's pipeline on a folder that ``python -m pipelines train base`` wrote, and the base's one prompt."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from safetensors.torch import load_file

    pipe = kind(
        vae=AutoencoderKL.from_pretrained(base, subfolder="vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(base, subfolder="unet"),
        scheduler=DDIMScheduler.from_pretrained(base, subfolder="scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_weights(weights)
    return pipe, load_file(Path(base) / "prompt_embeds.safetensors")["prompt_embeds"].float()


def smooth(size: int, seed: int = SEED) -> torch.Tensor:
    """(1, 3, size, size) in [0, 1] without any detail."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size=(size, size), mode="bicubic").clamp(0, 1)


def textured(size: int, seed: int = SEED) -> torch.Tensor:
    """(1, 3, size, size) in [0, 1] with edges and grain of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    picture = smooth(size, seed)
    for cells in (8, 16, 32, 64, 128, 256):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        picture = picture + 0.06 * F.interpolate(noise, size=(size, size), mode="nearest" if cells < 32 else "bicubic")
    return picture.clamp(0, 1)


def photo(path: str, size: int) -> torch.Tensor:
    """The middle of a picture file, (1, 3, size, size) in [0, 1]."""
    from PIL import Image, ImageOps

    from pipelines.pictures import read_pixels

    pixels = (read_pixels(Path(path)).tensor()[0].movedim(0, -1) * 255).round().byte().numpy()
    image = ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255
