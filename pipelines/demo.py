"""The miniature that comes with the package, as a pipeline."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from fewstep_sr.methods import METHODS
from fewstep_sr.miniature import FOLDER, PROMPT_FILE, find

from . import pipeline_class
from .base import FewStepSRPipeline


def load_demo(method: str = "invsr", weights: str | None = None) -> tuple[FewStepSRPipeline, torch.Tensor]:
    """The miniature as a pipeline, in float32, and its one prompt, ``prompt_embeds`` (1, tokens, width), since it has no text encoder::

        pipeline, prompt_embeds = load_demo()
        pipeline(image, prompt_embeds=prompt_embeds, timesteps=[50], color_fix="wavelet").images[0]

    Args:
        method: a method's key, such as ``"invsr"`` or ``"osediff"``.
        weights: a file of that method's that was trained on the miniature (``train --base miniature``); None for the one that comes with it.

    Raises:
        FileNotFoundError: this copy lacks a file.
        ValueError: there is no such method, or the miniature has no weights for it.
    """
    demos = {key: record.demo for key, record in METHODS.items() if record.demo}
    if method not in demos:
        raise ValueError(f"method: found {method!r}, expected {' or '.join(map(repr, sorted(demos)))}.")
    find("unet/diffusion_pytorch_model.safetensors")
    pipeline = pipeline_class(METHODS[method])(
        vae=AutoencoderKL.from_pretrained(FOLDER / "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(FOLDER / "unet"),
        scheduler=DDIMScheduler.from_pretrained(FOLDER / "scheduler"),
    )
    pipeline.load_weights(weights or find(demos[method].file))
    return pipeline, load_file(find(PROMPT_FILE))["prompt_embeds"].float()
