"""InvSR (Yue et al., CVPR 2025): a predicted noise map makes the low-quality picture a state of the diffusion trajectory."""

from functools import partial

import comfy.latent_formats
import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..fewstep_sr.diffusion import alpha_bar_of, sigma_to_index, to_sigma_space
from ..fewstep_sr.image.predictor import fit_picture
from ..fewstep_sr.methods import INVSR, load_weights
from ..fewstep_sr.methods.invsr import MAX_START, start_state
from ..fewstep_sr.networks.noise_predictor import NoisePredictor
from ..fewstep_sr.networks.posterior import Posterior, draw_noise
from ..fewstep_sr.tiling.predictor import predict_noise_map
from .checks import require_finite, require_image, require_picture
from .managed import ManagedNetwork, manage
from .memory import MARGIN, PREDICTOR_ACTIVATIONS
from .noise import PredictedNoise, by_content, digest
from .page import find_listed, fingerprint, full_path, list_files, require_choice
from .picture_size import picture_size
from .runtime import ComfyUI

NoisePredictorSocket = io.Custom("NOISE_PREDICTOR")


MAX_PREVIEWS = 16
"""Noise maps shown of a batch: enlarged they are larger than small frames."""


class InvSRNoisePredictorLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InvSRNoisePredictorLoader",
            display_name="Load InvSR Noise Predictor",
            category="FewStepSR/InvSR",
            description="Loads InvSR's noise predictor, the only network that InvSR trains; the diffusion model is an unmodified SD-Turbo.",
            search_aliases=["invsr", "noise predictor", "diffusion inversion", "super resolution", "upscale"],
            inputs=[
                io.Combo.Input(
                    "noise_predictor_name",
                    options=list_files(INVSR.weights.folder),
                    tooltip="File in models/invsr, such as noise_predictor_sd_turbo_v5.pth.",
                ),
            ],
            outputs=[NoisePredictorSocket.Output(tooltip="For InvSR Start State.")],
        )

    @classmethod
    def validate_inputs(cls, noise_predictor_name=None) -> bool | str:
        return find_listed(INVSR, noise_predictor_name)

    @classmethod
    def fingerprint_inputs(cls, noise_predictor_name=None) -> list[tuple]:
        return fingerprint(INVSR.weights.folder, noise_predictor_name)

    @classmethod
    def execute(cls, noise_predictor_name) -> io.NodeOutput:
        weights = load_weights(INVSR, full_path(INVSR.weights.folder, noise_predictor_name, "noise_predictor_name", cls.validate_inputs))
        return io.NodeOutput(manage(partial(NoisePredictor, weights.config), weights.state_dict))


class InvSRStartState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InvSRStartState",
            display_name="InvSR Start State",
            category="FewStepSR/InvSR",
            description="Predicts the noise map that turns the low-quality picture into a state of the diffusion trajectory (InvSR, eq. 8), and shows it. "
            "Wire NOISE and the same latent to SamplerCustomAdvanced; any sampler can continue from there.",
            search_aliases=["invsr", "noise map", "diffusion inversion", "custom sampler", "super resolution"],
            inputs=[
                NoisePredictorSocket.Input("noise_predictor", tooltip="From Load InvSR Noise Predictor."),
                io.Image.Input(
                    "image", tooltip="The low-quality picture as loaded, before it is upscaled. It is resized to a quarter of the output size here."
                ),
                io.Latent.Input("latent", tooltip="The same picture, upscaled and encoded with VAE Encode (Few-Step SR)."),
                io.Sigmas.Input("sigmas", tooltip="From Few-Step Scheduler (InvSR); the first one is the start timestep."),
                io.Combo.Input(
                    "posterior",
                    options=["sample", "mean"],
                    default="sample",
                    tooltip="sample: a noise map drawn with the seed, as published. mean: the expected noise map, the same each time.",
                ),
                io.Int.Input(
                    "seed",
                    default=12345,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Draws the noise map; all pictures of a batch share the draw, so static video does not flicker.",
                ),
            ],
            outputs=[
                io.Noise.Output(tooltip="The predicted noise map, for the noise input of SamplerCustomAdvanced."),
                io.Latent.Output(
                    display_name="start_state", tooltip="The noised start state itself, for samplers that take no noise (with Disable Noise)."
                ),
            ],
        )

    @classmethod
    def execute(cls, noise_predictor, image, latent, sigmas, posterior="sample", seed=12345) -> io.NodeOutput:
        require_choice(posterior, "posterior", ("sample", "mean"))
        noise, start, state = predicted_start(noise_predictor, image, latent, sigmas, posterior, seed)
        return io.NodeOutput(start, {**latent, "samples": state}, ui=ui.PreviewImage(noise_map_preview(noise[:MAX_PREVIEWS]), cls=cls))


def predicted_start(
    noise_predictor: ManagedNetwork, image: torch.Tensor, latent: dict, sigmas: torch.Tensor, posterior: str, seed: int
) -> tuple[torch.Tensor, PredictedNoise, torch.Tensor]:
    """The predicted noise map (B, 4, h, w), the NOISE for samplers that take one, and the start state, in ComfyUI's scale of latents."""
    samples = require_picture(latent)
    timestep = _start_timestep(sigmas)
    picture = require_image(image, "image")
    if picture.shape[0] not in (1, samples.shape[0]):
        raise ValueError(f"image: found {picture.shape[0]} pictures, expected 1 or {samples.shape[0]}, as many as in latent.")
    picture = fit_picture(picture, picture_size(latent), tuple(samples.shape[-2:]), noise_predictor.network.config.pixels_per_cell)
    predicted = predict_noise(noise_predictor, picture, timestep)
    noise = predicted.mean if posterior == "mean" else predicted.sample(draw_noise(predicted.mean.shape, seed))
    noise = require_finite(noise, "InvSR Start State (the noise predictor)", "--fp32-unet or --bf16-unet")

    latent_format = comfy.latent_formats.SD15()  # Stable Diffusion 2.x has the same scale
    alpha_bar = alpha_bar_of(float(sigmas[0]))
    state = start_state(latent_format.process_in(samples.float()), noise, alpha_bar)
    state = latent_format.process_out(to_sigma_space(state, alpha_bar))
    return noise, PredictedNoise(noise, latent, partial(_require_unnoised, state), seed), state


def _require_unnoised(start_state: torch.Tensor, samples: torch.Tensor) -> None:
    """Refuse what samplers are given by mistake beside the noise: the start state, which holds it already, and an empty latent."""
    noised = any(digest(sample) in by_content(start_state) for sample in samples)
    if noised or not samples.any():
        found = "InvSR's start state, which holds this noise already" if noised else "an empty latent"
        raise ValueError(
            f"latent_image: found {found}, expected the latent that InvSR Start State was given. Wire the LATENT of 'VAE Encode (Few-Step SR)' "
            "into the sampler, or start_state with 'Disable Noise'."
        )


def _start_timestep(sigmas: torch.Tensor) -> int:
    """Index of the noise schedule of the first sigma, for the predictor."""
    if sigmas.numel() < 2:
        raise ValueError("sigmas: found no step to take, expected the SIGMAS of Few-Step Scheduler with 1 step or more.")
    index = sigma_to_index(float(sigmas[0]))
    if index >= MAX_START:
        raise ValueError(
            f"sigmas: the first is timestep {index + 1} (counted from 1), expected at most {MAX_START}, where InvSR's predictor was trained. "
            "Use Few-Step Scheduler with method InvSR."
        )
    return index


def predict_noise(predictor: ManagedNetwork, picture: torch.Tensor, timestep: int) -> Posterior:
    """The noise map's posterior for pictures (B, 3, 2h, 2w) in [0, 1], float32 on the CPU; large pictures window by window."""
    config = predictor.network.config

    def fitting(height: int, width: int) -> int:
        pixels = height * width * config.pixels_per_cell**2
        per_window = int(MARGIN * predictor.activation_size(PREDICTOR_ACTIVATIONS * config.block_out_channels[0] * pixels))
        predictor.load(per_window)
        return int(comfy.model_management.get_free_memory(predictor.device) // per_window)

    def call(windows: torch.Tensor) -> Posterior:
        return predictor.network(predictor.cast(windows), timestep)

    return predict_noise_map(call, picture * 2 - 1, config, fitting, ComfyUI(), predictor.device)


def noise_map_preview(noise: torch.Tensor) -> torch.Tensor:
    """A noise map (B, 4, h, w) as pictures (B, H, W, 3): ComfyUI's latent colours, three standard deviations of unit noise to either side of grey."""
    factors = torch.tensor(comfy.latent_formats.SD15().latent_rgb_factors)
    rgb = torch.einsum("bchw,cr->bhwr", noise, factors / factors.norm(dim=0)) / 6 + 0.5
    enlarge = max(1, 256 // min(noise.shape[-2:]))
    return rgb.clamp(0, 1).repeat_interleave(enlarge, dim=1).repeat_interleave(enlarge, dim=2)
