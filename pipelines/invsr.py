"""InvSR (Yue et al., CVPR 2025): a predicted noise map makes the low-quality picture a state of the diffusion trajectory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep_sr.diffusion import alpha_bar_at, from_sigma_space, to_sigma_space
from fewstep_sr.image.predictor import fit_picture
from fewstep_sr.image.sizes import size_of
from fewstep_sr.methods import INVSR
from fewstep_sr.methods import invsr as paper
from fewstep_sr.networks.posterior import Posterior
from fewstep_sr.tiling.predictor import MAX_WINDOWS, predict_noise_map

from .base import FewStepSRPipeline, Generators, Pictures, draw
from .checks import require_finite
from .noise_predictor import InvSRNoisePredictor


class InvSRPipeline(FewStepSRPipeline):
    """InvSR on SD-Turbo::

        pipeline = InvSRPipeline.from_pretrained("stabilityai/sd-turbo", torch_dtype=torch.float16).to("cuda")
        pipeline.load_noise_predictor("noise_predictor_sd_turbo_v5.pth")
        pipeline(Image.open("cat.png")).images[0].save("cat_x4.png")

    The states are those of an Euler scheduler, ``latents + sigma * noise``; a base's scheduler of another kind is replaced by one.
    """

    method = INVSR
    color_reference = "image"
    own_stages = {"start_state": ("start state", "noise map")}
    model_cpu_offload_seq = "text_encoder->noise_predictor->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "noise_predictor"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        noise_predictor: InvSRNoisePredictor = None,  # type: ignore[assignment]  # diffusers reads the class off the annotation
    ):
        super().__init__()
        if not isinstance(scheduler, EulerDiscreteScheduler):
            scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
        self._register(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, noise_predictor=noise_predictor)

    def load_noise_predictor(self, path: str | Path) -> None:
        """Read InvSR's noise predictor (.pth or .safetensors) in the UNet's dtype and onto its device."""
        self.register_modules(noise_predictor=InvSRNoisePredictor.from_weights(path, self.unet.dtype).to(self.unet.device))

    def load_weights(self, path: str | Path, strength_vae: float = 1.0) -> None:
        self.load_noise_predictor(path)

    def call_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_inference_steps": options["steps"], "timesteps": list(options["timesteps"])}

    @classmethod
    def loader_nodes(cls, weights: str) -> list[dict[str, Any]]:
        files = {"noise_predictor_name": (INVSR.weights.folder, weights)}
        return [{"node": "InvSRNoisePredictorLoader", "files": files, "gives": ["noise_predictor"]}]

    @classmethod
    def step_nodes(cls, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        schedule = {"method": INVSR.title, "steps": request["steps"], "timesteps": request["timesteps"]}
        starts = {name: name for name in ("noise_predictor", "image", "latent", "sigmas")}
        samples = {"noise": "noise", "guider": "guider", "sampler": "sampler", "sigmas": "sigmas", "latent_image": "latent"}
        return [
            {"node": "FewStepScheduler", "inputs": schedule, "takes": {"model": "model"}, "gives": ["sigmas"]},
            {
                "node": "InvSRStartState",
                "inputs": {"seed": request["seed"]},
                "takes": starts,
                "gives": ["noise", "state"],
                "stage": ["start state", "state"],
            },
            {"node": "BasicGuider", "takes": {"model": "model", "conditioning": "positive"}, "gives": ["guider"]},
            {"node": "KSamplerSelect", "inputs": {"sampler_name": "euler"}, "gives": ["sampler"]},
            {"node": "SamplerCustomAdvanced", "takes": samples, "gives": ["restored", "denoised"]},
        ]

    @torch.no_grad()
    def start_state(
        self,
        image: torch.Tensor,
        latents: torch.Tensor,
        size: tuple[int, int],
        timestep: int,
        posterior: str = "sample",
        generator: Generators = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state at ``timestep`` from which the diffusion model goes on, :func:`fewstep_sr.methods.invsr.start_state`, in sigma space.

        Args:
            image: low-quality pictures (B, 3, H, W) in [0, 1], not enlarged.
            latents: the same pictures, enlarged and encoded.
            size: (height, width) of the enlarged pictures, before padding.
            timestep: index of the noise schedule, counted from 0.
            posterior: ``"sample"`` draws the noise map, as published; ``"mean"`` is the same each time.

        Returns:
            The start state and the predicted noise map, both (B, 4, h, w).
        """
        if self.noise_predictor is None:
            raise ValueError("InvSR: no noise predictor is loaded. Call load_noise_predictor first.")
        picture = fit_picture(image, size, size_of(latents), self.noise_predictor.pixels_per_cell) * 2 - 1
        noise = draw(self._predict(picture, timestep), posterior, generator)
        noise = require_finite(noise, "the noise predictor").to(latents.device)
        self.scheduler.set_timesteps(timesteps=[timestep])
        alpha_bar = alpha_bar_at(timestep, latents)
        return to_sigma_space(paper.start_state(latents, noise, alpha_bar), alpha_bar), noise

    def _predict(self, picture: torch.Tensor, timestep: int) -> Posterior:
        """The noise map's posterior for pictures in [-1, 1], float32 on the CPU."""
        device, dtype, most = self._execution_device, self.noise_predictor.dtype, 1 if self._tiling.compiler else MAX_WINDOWS
        index = torch.full((1,), timestep, device=device)  # not a number, for each of which a graph would be compiled

        def call(windows: torch.Tensor) -> Posterior:
            return self._tiling.call(self.noise_predictor, windows.to(device, dtype), index)

        return predict_noise_map(call, picture, self.noise_predictor.dimensions, lambda height, width: most, self._runtime, device)

    @torch.no_grad()
    def denoise(
        self,
        state: torch.Tensor,
        timesteps: list[int],
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> torch.Tensor:
        """Euler steps over ``timesteps`` (indices of the noise schedule, descending) to the restored latents; no noise is added between them."""
        tensors = {"latents": state, "prompt_embeds": prompt_embeds}
        self.scheduler.set_timesteps(timesteps=timesteps)  # for callbacks, which look at it
        levels = [alpha_bar_at(timestep, state.float().to(self._execution_device)) for timestep in timesteps]
        levels.append(torch.ones_like(levels[-1]))  # the end of the trajectory has no noise
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x_t = from_sigma_space(tensors["latents"].to(levels[step]), levels[step])
            noise_pred = self.predict_noise(x_t, timestep, tensors["prompt_embeds"], negative_prompt_embeds, guidance_scale)
            x_t = paper.trajectory_step(x_t, noise_pred, levels[step], levels[step + 1])
            tensors["latents"] = to_sigma_space(x_t, levels[step + 1])
            tensors = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step, timestep, tensors)
        return tensors["latents"]

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | list[str] = INVSR.prompt,
        negative_prompt: str | list[str] = INVSR.negative_prompt,
        scale: float = 4.0,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        guidance_scale: float = 1.0,
        posterior: str = "mean",
        noise_posterior: str = "sample",
        generator: Generators = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        color_fix: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ):
        """Restore low-quality pictures.

        Args:
            image: low-quality pictures of one size: PIL, tensor (B, 3, H, W) or NumPy (B, H, W, 3) in [0, 1], or lists of them.
            scale: how much larger the result is.
            num_inference_steps: 1 to 5 as published, or more, evenly spaced.
            timesteps: in place of the published ones, counted from 1, descending, from 250 at most.
            guidance_scale: 1 is the published method; other values use ``negative_prompt`` and run the UNet twice.
            posterior: ``"mean"`` or ``"sample"`` of the VAE's encoder.
            noise_posterior: ``"sample"`` or ``"mean"`` of the noise predictor.
            color_fix: ``"adain"``, ``"wavelet"``, ``"ycbcr"``, ``"lab"``, ``"luma"`` or None.
            output_type: ``"pil"``, ``"pt"`` or ``"np"``.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or a tuple of them.
        """
        indices = paper.SCHEDULE.indices(num_inference_steps, () if timesteps is None else timesteps)
        low_quality, enlarged = self.preprocess(image, scale)
        size = size_of(enlarged)
        embeds = self._prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, enlarged.shape[0])
        latents = self.encode(enlarged, posterior, generator)
        state, _ = self.start_state(low_quality, latents, size, indices[0], noise_posterior, generator)
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self.denoise(state, indices, embeds[0], embeds[1], guidance_scale, callback[0], callback[1])
        return self._finish(self.decode(latents, size), low_quality, color_fix, output_type, return_dict)
