"""The miniature that comes with the package, as a pipeline."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from fewstep_sr.miniature import FOLDER, OSEDIFF_ADAPTER, OSEDIFF_STRENGTH_VAE, find

from .invsr import InvSRPipeline
from .osediff import OSEDiffPipeline


def load_demo(method: str = "invsr") -> tuple[InvSRPipeline | OSEDiffPipeline, torch.Tensor]:
    """The miniature as a pipeline, in float32, and its one prompt, ``prompt_embeds`` (1, tokens, width), since it has no text encoder::

        pipeline, prompt_embeds = load_demo()
        pipeline(image, prompt_embeds=prompt_embeds, timesteps=[100], color_fix="wavelet").images[0]

    Args:
        method: ``"invsr"`` or ``"osediff"``.

    Raises:
        FileNotFoundError: this copy lacks a file.
        ValueError: there is no such method.
    """
    if method not in ("invsr", "osediff"):
        raise ValueError(f"method: found {method!r}, expected 'invsr' or 'osediff'.")
    find("unet/diffusion_pytorch_model.safetensors")
    pipeline = (InvSRPipeline if method == "invsr" else OSEDiffPipeline)(
        vae=AutoencoderKL.from_pretrained(FOLDER / "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(FOLDER / "unet"),
        scheduler=DDIMScheduler.from_pretrained(FOLDER / "scheduler"),
    )
    if method == "invsr":
        pipeline.load_noise_predictor(find("noise_predictor.safetensors"))
    else:
        pipeline.load_osediff(find(OSEDIFF_ADAPTER), strength_vae=OSEDIFF_STRENGTH_VAE)
    return pipeline, load_file(find("prompt_embeds.safetensors"))["prompt_embeds"].float()
