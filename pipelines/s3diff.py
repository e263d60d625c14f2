"""S3Diff (Zhang et al., arXiv 2024) on SD-Turbo: each image's blur and noise say what the adapter is that restores it, in one step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.image.sizes import reflect_pad, size_of
from fewstep_sr.methods import S3DIFF, load_weights
from fewstep_sr.methods import s3diff as paper
from fewstep_sr.networks.degradation import SCORES, DegradationEstimator, EstimatorWeights, overrule, require_scores
from fewstep_sr.weights.lora import Adapter

from .adapted import AdapterPipeline
from .base import Generators, Pictures
from .checks import require_finite
from .inputs import to_batch, to_generators


class S3DiffPipeline(AdapterPipeline):
    """S3Diff on SD-Turbo::

        pipeline = S3DiffPipeline.from_pretrained("stabilityai/sd-turbo", torch_dtype=torch.float16).to("cuda")
        pipeline.load_s3diff("s3diff.pkl", "de_net.pth")
        pipeline(Image.open("cat.png")).images[0].save("cat_x4.png")

    The adapter is another one for each image. :meth:`degradation` estimates an image's scores and :meth:`adapt` takes them, or others; :meth:`encode`
    and :meth:`one_step` then take as many images, and each goes through the networks with the adapter of its own scores.

    Args:
        s3diff: the adapter's file beside the base, written by ``save_pretrained`` with the estimator in it, and the strengths it is loaded with.
    """

    method = S3DIFF
    upsampling = "bilinear"
    own_stages = {"degradation": ("degradation",)}

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        s3diff: dict = None,  # type: ignore[assignment]  # noqa: RUF013 (older diffusers read no unions here)
    ):
        super().__init__()
        self._register(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self._scores: torch.Tensor | None = None
        self._estimator: DegradationEstimator | None = None
        self._begin(s3diff)

    def load_s3diff(self, path: str | Path, estimator: str | Path | None = None, strength_model: float = 1.0, strength_vae: float = 1.0) -> None:
        """Put an adapter on, in place of the one before.

        Args:
            path: ``s3diff.pkl`` or its safetensors form.
            estimator: the degradation estimator, ``de_net.pth`` or its safetensors form. None where the adapter's file holds one, or where
                both scores will be given: :meth:`degradation` needs it.
            strength_model, strength_vae: shares of the adapter that UNet and VAE encoder get; 1 is the published method.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or something else, or not for this base; the pipeline is as before then.
        """
        weights = load_weights(paper.ESTIMATOR, estimator) if estimator is not None else None
        self._load(path, strength_model, strength_vae)
        if weights is not None:
            self._take_estimator(weights)

    def unload_s3diff(self) -> None:
        """Take the adapter off; the base is as it was."""
        self._unload()

    def _take_estimator(self, weights: EstimatorWeights) -> None:
        assert isinstance(self._adapter, paper.S3DiffAdapter)
        self._adapter = dataclasses.replace(self._adapter, estimator=weights)
        self._estimator = weights.network()

    def _put_on(self, adapter: Adapter, strength_model: float, strength_vae: float) -> None:
        super()._put_on(adapter, strength_model, strength_vae)
        assert isinstance(adapter, paper.S3DiffAdapter)
        if adapter.estimator is not None:
            self._take_estimator(adapter.estimator)

    def _unload(self) -> None:
        super()._unload()
        self._scores = self._estimator = None

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """The base without the adapter, and the adapter, as before any image's modulation, beside it with the estimator in its file."""
        scores = self._scores
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._scores = scores

    def fuse(self) -> None:
        """Refused: the adapter is another one for each image."""
        raise ValueError("fuse: S3Diff's adapter differs for each image, so it cannot be merged into the base's weights. Leave it out.")

    def prepare(self, options: Mapping[str, Any]) -> None:
        if options.get("estimator"):
            self._require_adapter("estimator")
            self._take_estimator(load_weights(paper.ESTIMATOR, options["estimator"]))

    def call_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: options[name] for name in SCORES}

    @classmethod
    def node_calls(cls, options: Mapping[str, Any], companions: Mapping[str, Path | None]) -> list[dict[str, Any]]:
        overruled = {name: -1.0 if options[name] is None else options[name] for name in SCORES}
        adapt = {"node": "S3DiffAdapt", "inputs": overruled, "takes": {"model": "model", "vae": "vae"}, "gives": ["model", "vae"]}
        estimator = companions.get(paper.ESTIMATOR.option)
        if estimator is None:
            return [adapt]
        files = {"estimator_name": (paper.ESTIMATOR.weights.folder, str(estimator.resolve()))}
        load = {"node": "S3DiffEstimatorLoader", "files": files, "gives": ["estimator"]}
        takes = {"estimator": "estimator", "image": "image"}
        estimate = {"node": "S3DiffDegradation", "takes": takes, "gives": ["scores"], "stage": ["degradation", "scores"]}
        return [load, estimate, adapt | {"takes": {"model": "model", "vae": "vae", "scores": "scores"}}]

    def notes(self) -> tuple[str, ...]:
        """The scores of the last call."""
        if self._scores is None:
            return ()
        scores = (", ".join(f"{name} {score:.2f}" for name, score in zip(SCORES, row, strict=True)) for row in self._scores.tolist())
        return (f"{'; '.join(scores)} (--blur and --noise overrule them)",)

    @torch.no_grad()
    def degradation(self, image: Pictures) -> torch.Tensor:
        """Scores (B, 2) of low-quality images at their own size, before they are upscaled: blur and noise, each from 0 to 1, float32 on the CPU."""
        if self._estimator is None:
            raise ValueError("degradation: no estimator is loaded. Give load_s3diff the file de_net.pth, or adapt to scores of your own.")
        device = self._execution_device
        self._estimator.to(device)  # in float32 whatever the pipeline's dtype is
        with torch.autocast(device.type, enabled=False):
            scores = torch.cat([self._estimator(each.to(device)) for each in to_batch(image).split(1)])
        return require_finite(scores.cpu(), "the degradation estimator")

    def adapt(self, scores: torch.Tensor) -> None:
        """Take degradation scores (B, 2), blur and noise from 0 to 1, for the images that :meth:`encode` and :meth:`one_step` are given next."""
        self._require_adapter("adapt")
        self._scores = require_scores(scores)

    def _each(self, part: str, images: int) -> Iterator[slice]:
        """Runs of images with the same scores, the network's adapter modulated for each run when its turn comes."""
        self._require_adapter(f"the {part}")
        if self._scores is None:
            raise ValueError("scores: found none, expected blur and noise of each image. Call adapt(degradation(image)) first.")
        scores = require_scores(self._scores, images)
        first = 0
        for i in range(1, images + 1):
            if i == images or not torch.equal(scores[i], scores[first]):
                self._modulate(part, scores[first])
                yield slice(first, i)
                first = i

    def _modulate(self, part: str, scores: torch.Tensor) -> None:
        """Write the low-rank halves of one image's adapter, which start from the unmodulated one; the base's weights stay."""
        assert isinstance(self._adapter, paper.S3DiffAdapter)
        network = self.unet if part == "unet" else self.vae
        for layer, low_rank in self._adapter.modulated(part, scores).items():
            for half in network.get_submodule(layer).lora_B.values():
                half.weight.data.copy_(low_rank.up)

    @torch.no_grad()
    def encode(self, image: torch.Tensor, posterior: str = "mean", generator: Generators = None) -> torch.Tensor:
        """Latents of as many upscaled images (B, 3, H, W) in [0, 1] as there are scores; sides are padded by reflection to multiples of 64, as published.

        Args:
            posterior: ``"mean"`` gives the same latents each time, ``"sample"`` draws as the published program does.
            generator: for ``"sample"``.
        """
        to_generators(generator, len(image))
        height, width = (-(-side // paper.PAD_MULTIPLE) * paper.PAD_MULTIPLE for side in size_of(image))
        padded = reflect_pad(image, height, width)
        moments = [self._tiling.encode(self.vae, padded[own], self._execution_device, self._runtime) for own in self._each("vae", len(image))]
        return self.vae.config.scaling_factor * self._draw(torch.cat(moments), posterior, generator)

    def predict_noise(self, latents, timestep, prompt_embeds, negative_prompt_embeds=None, guidance_scale: float = 1.0) -> torch.Tensor:
        """The noise prediction for as many latents as there are scores, float32, guided where there are negative embeddings."""
        batch = len(latents)
        predict, predicted = super().predict_noise, []
        texts = [text if text is None else text.expand(batch, -1, -1) for text in (prompt_embeds, negative_prompt_embeds)]
        for own in self._each("unet", batch):
            positive, negative = (text if text is None else text[own] for text in texts)
            predicted.append(predict(latents[own], timestep, positive, negative, guidance_scale))
        return torch.cat(predicted)

    @torch.no_grad()
    def one_step(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        guidance_scale: float = S3DIFF.cfg,
    ) -> torch.Tensor:
        """The restored latents (B, 4, h, w), :func:`fewstep_sr.methods.s3diff.one_step`.

        Args:
            latents: of as many images as there are scores, times the scaling factor.
            negative_prompt_embeds: not used at a guidance of 1, which takes one call of the UNet instead of two; None is for that alone.
        """
        if guidance_scale == 1:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            raise ValueError(f"negative_prompt_embeds: found none with a guidance_scale of {guidance_scale:g}. Give them, or a guidance_scale of 1.")
        latents = latents.to(self._execution_device)
        noise_pred = self.predict_noise(latents, paper.TIMESTEP, prompt_embeds, negative_prompt_embeds, guidance_scale)
        return paper.one_step(latents, noise_pred, alpha_bar_at(paper.TIMESTEP, latents))

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | list[str] = S3DIFF.prompt,
        negative_prompt: str | list[str] = S3DIFF.negative_prompt,
        scale: float = 4.0,
        guidance_scale: float = S3DIFF.cfg,
        blur: float | None = None,
        noise: float | None = None,
        posterior: str = "mean",
        generator: Generators = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        color_fix: str | None = "wavelet",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ):
        """Restore low-quality images.

        Args:
            image: low-quality images of one size, not upscaled: PIL, tensor (B, 3, H, W) or NumPy (B, H, W, 3) in [0, 1], or lists of them.
            prompt, negative_prompt: the published program has the same for every image.
            scale: how much larger the result is. The scores are those of ``image`` as it comes.
            guidance_scale: 1.07 as published; 1 runs the UNet once instead of twice.
            blur, noise: from 0 to 1, for every image in place of what the estimator reads off it.
            posterior: ``"mean"`` or ``"sample"`` of the VAE's encoder; the published program draws.
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"``, ``"lab"``, ``"luma"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        self._require_adapter(self.method.title)
        image, enlarged = self.preprocess(image, scale)
        given = blur is not None and noise is not None
        self.adapt(overrule(torch.zeros(len(image), 2) if given else self.degradation(image), blur, noise))
        embeds, negative = self._prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, len(image))
        latents = self.one_step(self.encode(enlarged, posterior, generator), embeds, negative, guidance_scale)
        tensors = {"latents": latents, "prompt_embeds": embeds}
        tensors = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, 0, paper.TIMESTEP, tensors)
        restored = self.decode(tensors["latents"], size_of(enlarged))
        return self._finish(restored, enlarged, color_fix, output_type, return_dict)
