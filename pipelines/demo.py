"""The miniature that comes with the package, as a pipeline."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from sr.miniature import FOLDER, find

from .invsr import InvSRPipeline


def load_demo() -> tuple[InvSRPipeline, torch.Tensor]:
    """The miniature, in float32, with its noise predictor, and its one prompt, ``prompt_embeds`` (1, tokens, width), since it has no text encoder::

        pipeline, prompt_embeds = load_demo()
        pipeline(image, prompt_embeds=prompt_embeds).images[0]

    Raises:
        FileNotFoundError: this copy lacks a file.
    """
    find("unet/diffusion_pytorch_model.safetensors")
    pipeline = InvSRPipeline(
        vae=AutoencoderKL.from_pretrained(FOLDER / "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(FOLDER / "unet"),
        scheduler=DDIMScheduler.from_pretrained(FOLDER / "scheduler"),
    )
    pipeline.load_noise_predictor(find("noise_predictor.safetensors"))
    return pipeline, load_file(find("prompt_embeds.safetensors"))["prompt_embeds"].float()
