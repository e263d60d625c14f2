"""What both pipelines share: pictures in and out, text, VAE, guidance."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin
from packaging.version import Version

from fewstep_sr.image.color import fix_color, is_gray, to_gray
from fewstep_sr.image.sizes import VAE_MULTIPLE
from fewstep_sr.methods.method import Method
from fewstep_sr.networks.posterior import Posterior, draw_noise
from fewstep_sr.tiling.unet import take

from .checks import require_finite, require_number, require_stable_diffusion
from .compiled import Compiler
from .convolutions import Convolutions, replace_convolutions
from .decoder import DecoderMixin
from .inputs import Generators, Pictures, require_one_or_each, to_batch, to_generators, to_texts
from .ranges import scaled
from .runtime import PipelineRuntime
from .single_file import CONFIG, find_tokenizer, require_noise_prediction
from .tiling import Tiling

SEED = 12345

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
"""What diffusers calls the type that ``from_pretrained`` and ``from_single_file`` give the weights."""

_OWN_MODULE = re.compile(r"(?:fewstep_sr\.)?pipelines\.(\w+)")
"""A module of this package, by whichever name it was when a pipeline was saved."""


class FewStepSRPipeline(DecoderMixin, DiffusionPipeline, FromSingleFileMixin):
    """Base of :class:`OSEDiffPipeline` and :class:`InvSRPipeline`.

    Between the stages pictures are (B, 3, H, W), RGB in [0, 1], and latents (B, 4, h, w), multiplied by the VAE's scaling factor,
    both float32. Random draws are on the CPU over the whole canvas. One generator gives one draw for all pictures of a batch, a list
    of generators one draw for each; without any, the draw is that of seed 12345.
    """

    method: ClassVar[Method]
    """What is published of the method."""

    clamps_decoded: ClassVar[bool] = True
    """Whether decoded images are clamped to [0, 1] before the colour fix; they are after it."""

    upsampling: ClassVar[str] = "bicubic"
    """How images are upscaled before the networks see them, as the published program does: ``"bicubic"`` or ``"bilinear"``."""

    color_reference: ClassVar[str] = "enlarged"
    """Whose colours the colour fix takes: ``"image"``, the low-quality image, or ``"enlarged"``, the same upscaled."""

    own_stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Stages beside encode, predict_noise and decode: names of methods, and of each what its result, or each of its results, is called in reports."""

    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def _register(self, **components) -> None:
        require_stable_diffusion(components["unet"], components["vae"], components["scheduler"])
        self.register_modules(**components)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)
        self._tiling = Tiling()

    @property
    def _runtime(self) -> PipelineRuntime:
        return PipelineRuntime(self.progress_bar)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers', with the components that are this package's own under the name that it has here: a pipeline may have been saved from a
        checkout (``pipelines.noise_predictor``) and be loaded where the package is installed (``fewstep_sr.pipelines.noise_predictor``), or the other way.
        """
        loaded = super().load_config(*args, **kwargs)
        for value in (loaded[0] if isinstance(loaded, tuple) else loaded).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and (own := _OWN_MODULE.fullmatch(value[0])):
                value[0] = f"{__package__}.{own.group(1)}"
        return loaded

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path, config=None, tokenizer=None, **kwargs):
        """A base of Stable Diffusion 2.x in one file (.safetensors, .ckpt). The configuration comes with this package, so that nothing is
        fetched but, where no tokenizer is given or found, the tokenizer (see :func:`pipelines.single_file.find_tokenizer`).
        """
        if config is None and tokenizer is None and kwargs.get("text_encoder", ...) is not None:
            tokenizer = find_tokenizer(local_files_only=kwargs.get("local_files_only", False))
        pipeline = super().from_single_file(str(pretrained_model_link_or_path), config=str(config or CONFIG), tokenizer=tokenizer, **kwargs)
        require_noise_prediction(pipeline.unet, Path(str(pretrained_model_link_or_path)).name)
        return pipeline

    def load_weights(self, path: str | Path, strength_vae: float = 1.0) -> None:
        """Load the method's own weights, under one name for all methods. ``strength_vae`` is for those that adapt the VAE's encoder.

        Raises:
            FileNotFoundError, ValueError: as :func:`fewstep_sr.methods.load_weights`, or they do not fit this base.
        """
        raise NotImplementedError(f"{type(self).__name__} says here how its weights are loaded.")

    def prepare(self, options: Mapping[str, Any]) -> None:
        """What the method's own options (:class:`fewstep_sr.methods.method.Option`) ask for before the first image."""

    def call_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The method's own options as arguments of a call."""
        return {}

    @classmethod
    def loader_nodes(cls, weights: str) -> list[dict[str, Any]]:
        """For ``verify``: which nodes load the method's weights in ComfyUI, from the file at this path.

        Of each node its id, ``node``; ``inputs`` by name; ``files``, inputs that are files' names: (model folder, path, what is before the name);
        ``takes``, inputs that are earlier outputs, by the names in ``gives``, of which the last ones go on: "image", "model", "vae", "positive" and
        "negative" are there from the start, "latent" once the image is encoded. ``stage`` is a stage's name in reports and the output that it is, if any.
        """
        files = {"adapter_name": (cls.method.weights.folder, weights, f"{cls.method.weights.folder}/")}
        return [{"node": "FewStepSRAdapterLoader", "files": files, "takes": {"model": "model", "vae": "vae"}, "gives": ["model", "vae"]}]

    @classmethod
    def node_calls(cls, options: Mapping[str, Any], companions: Mapping[str, Path | None]) -> list[dict[str, Any]]:
        """Likewise between the loader and the encoder."""
        return []

    @classmethod
    def step_nodes(cls, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Likewise from "latent" to "restored". ``request`` has the settings, see :meth:`pipelines.evaluation.subjects.Subject.request`."""
        inputs = {"cfg": request["cfg"], **request["controls"]}
        takes = {name: name for name in ("model", "positive", "negative", "latent")}
        return [{"node": "FewStepSROneStep", "inputs": inputs, "takes": takes, "gives": ["restored"]}]

    def notes(self) -> tuple[str, ...]:
        """What the last call found out about its image, for the command line to say."""
        return ()

    def convert(self, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        """Compute in another precision from now on, and keep images in ``memory_format`` in the VAE, where most of the convolutions' work is."""
        for network in self.components.values():
            if isinstance(network, torch.nn.Module):
                torch.nn.Module.to(network, dtype)  # not diffusers' own, which warns of what does not concern these networks
        self.vae.to(memory_format=memory_format)

    def replace_convolutions(self, choice: Convolutions) -> None:
        """Let convolutions on a CPU run as ``choice`` says from now on, after :meth:`convert`: :func:`pipelines.processor.choose_convolutions` measures which is fastest."""
        replace_convolutions(self.unet, self.vae.decoder, choice)

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Text embeddings (B, 77, width) of the base's own text encoder."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt: this pipeline was loaded without text encoder or tokenizer. Pass prompt_embeds instead.")
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]

    def _prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, batch: int):
        """Embeddings of the batch's prompts and, where there is guidance, of the negative prompts."""

        def embed(text, embeds, name):
            embeds = self.encode_prompt(to_texts(text, name, batch)) if embeds is None else embeds
            if not isinstance(embeds, torch.Tensor):
                raise ValueError(f"{name}_embeds: found {type(embeds).__name__}, expected a tensor, one row for all images or one for each.")
            if embeds.ndim != 3:
                raise ValueError(
                    f"{name}_embeds: found shape {tuple(embeds.shape)}, expected (batch, tokens, {self.unet.config.cross_attention_dim})."
                )
            require_one_or_each(embeds, name, batch)
            if embeds.shape[-1] != self.unet.config.cross_attention_dim:
                raise ValueError(
                    f"{name}: found embedding size {embeds.shape[-1]}, expected {self.unet.config.cross_attention_dim}. "
                    "Encode it with the text encoder of the base that the UNet comes from."
                )
            return embeds.expand(batch, -1, -1)

        positive = embed(prompt, prompt_embeds, "prompt")
        require_number(guidance_scale, "guidance_scale")
        if guidance_scale == 1.0:
            return positive, None
        return positive, embed(negative_prompt, negative_prompt_embeds, "negative_prompt")

    def preprocess(self, image: Pictures, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures as (B, 3, h, w), and enlarged by ``scale`` (without antialiasing, as 'Upscale Image By' does; :attr:`upsampling`)."""
        image = to_batch(image)
        width, height = scaled((image.shape[-1], image.shape[-2]), scale)
        return image, F.interpolate(image, size=(height, width), mode=self.upsampling, align_corners=False)

    @torch.no_grad()
    def encode(self, image: torch.Tensor, posterior: str = "mean", generator: Generators = None) -> torch.Tensor:
        """Latents of enlarged pictures of any size; sides are padded by reflection to what VAE and UNet need.

        Args:
            image: (B, 3, H, W) in [0, 1].
            posterior: ``"mean"`` gives the same latents each time, ``"sample"`` draws as the published programs do.
            generator: for ``"sample"``.
        """
        to_generators(generator, len(image))  # a list that does not fit is a mistake, drawn from or not
        moments = self._tiling.encode(self.vae, image, self._execution_device, self._runtime)
        return self.vae.config.scaling_factor * self._draw(moments, posterior, generator)

    def _draw(self, moments: torch.Tensor, posterior: str, generator: Generators) -> torch.Tensor:
        return draw(Posterior.from_moments(moments), posterior, generator)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] on the CPU, cropped to ``size`` (height, width) where it is given."""
        decoded = self._tiling.decode(self.vae, latents / self.vae.config.scaling_factor, self._execution_device, self._runtime)
        height, width = size or decoded.shape[-2:]
        for image in decoded:  # in place, one at a time: video batches are long
            require_finite(image, "the VAE").div_(2).add_(0.5)
            if self.clamps_decoded:
                image.clamp_(0, 1)
        return decoded[..., :height, :width]

    def predict_noise(self, latents, timestep, prompt_embeds, negative_prompt_embeds=None, guidance_scale: float = 1.0) -> torch.Tensor:
        """The UNet's noise prediction, float32, with classifier-free guidance where there are negative embeddings."""
        positive = self._unet(latents, timestep, prompt_embeds)
        if negative_prompt_embeds is None:
            return positive
        negative = self._unet(latents, timestep, negative_prompt_embeds)
        return negative + guidance_scale * (positive - negative)

    def _unet(self, latents, timestep, prompt_embeds) -> torch.Tensor:
        device, dtype = self._execution_device, self.unet.dtype
        embeds = prompt_embeds.to(device, dtype).expand(len(latents), -1, -1)
        timestep = torch.as_tensor(timestep, device=device)  # once: a number would be copied there at each call

        unet = self._tiling.compiler.unet(self.unet) if self._tiling.compiler else self.unet

        def network(tiles: torch.Tensor, pictures: list[int]) -> torch.Tensor:
            return self._tiling.call(unet, tiles.to(device, dtype), timestep, encoder_hidden_states=take(embeds, pictures)).sample

        return require_finite(self._tiling.predict(network, latents.to(device), self._runtime), "the UNet")

    def enable_tiling(self, tile: int = 1024) -> None:
        """VAE and UNet in overlapping tiles of ``tile`` pixels of the result, a multiple of 64 from 256 on; smaller pictures stay whole."""
        if tile < 256 or tile % 64:
            raise ValueError(f"tile: found {tile}, expected a multiple of 64 from 256 on.")
        cells = tile // VAE_MULTIPLE
        self._tiling = replace(self._tiling, tile=cells, overlap=cells // 4)

    def disable_tiling(self) -> None:
        self._tiling = replace(self._tiling, tile=None, overlap=0)

    def enable_compile(self, backend: str | Callable = "inductor") -> None:
        """UNet, VAE and noise predictor through ``torch.compile`` from the next call on. All sizes of images share two graphs of each network."""
        self._tiling = replace(self._tiling, compiler=Compiler(backend))

    def disable_compile(self) -> None:
        self._tiling = replace(self._tiling, compiler=None)

    def _call_back(self, callback, names: Sequence[str], step: int, timestep, tensors: dict) -> dict:
        """Let the user's ``callback_on_step_end`` look at, and replace, the tensors that it asked for."""
        if callback is None:
            return tensors
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs: found {unknown}, expected names out of {self._callback_tensor_inputs}.")
        return tensors | (callback(self, step, timestep, {name: tensors[name] for name in names}) or {})

    def _finish(self, image: torch.Tensor, reference: torch.Tensor, color_fix: str | None, output_type: str, return_dict: bool):
        if color_fix is None:
            image = image.clamp(0, 1)
        else:
            for picture, own in zip(image.split(1), reference.split(1), strict=True):
                picture.copy_(fix_color(picture, own, color_fix))
        for picture, own in zip(image.split(1), reference.split(1), strict=True):
            if is_gray(own):  # the VAE gives grey a tint
                picture.copy_(to_gray(picture))
        self.maybe_free_model_hooks()
        if output_type == "pil":  # one at a time: the way there goes through several copies
            images = [pil for picture in image.split(1) for pil in self.image_processor.postprocess(picture, "pil", do_denormalize=[False])]
        else:
            images = self.image_processor.postprocess(image, output_type, do_denormalize=[False] * image.shape[0])
        return ImagePipelineOutput(images) if return_dict else (images,)


def draw(posterior: Posterior, kind: str, generator: Generators) -> torch.Tensor:
    """The posterior's ``"mean"``, or a ``"sample"`` of it."""
    if kind not in ("mean", "sample"):
        raise ValueError(f"posterior: found {kind!r}, expected 'mean' or 'sample'.")
    if kind == "mean":
        return posterior.mean
    batch, *shape = posterior.mean.shape
    generators = to_generators(generator, batch)
    if generators is None:
        return posterior.sample(draw_noise(posterior.mean.shape, SEED))
    return posterior.sample(torch.cat([torch.randn(1, *shape, generator=g, device=g.device).to(posterior.mean) for g in generators]))
