"""One step of ComfyUI's own sampler from a low-quality latent: what the one-step nodes share."""

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..fewstep_sr.diffusion import alpha_bar_of, from_sigma_space, to_sigma_space
from .checks import TILE_IT, require_conditioning, require_finite, require_memory, require_own_noise, require_picture, require_stable_diffusion
from .page import require_number
from .tiled_model import is_tiled, predict_only, stream_pictures

USUAL = 2.0
"""Strengths and guidance above this are let through with a warning: the published value is 1, or a little more."""

Equation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The restored latents from the low-quality ones and the noise predicted in them, both (B, 4, h, w) and times the scaling factor."""


def require_step(model, positive, latent: dict, negative, cfg: float) -> dict:
    """The conditionings for the sampler, by name. Raises ValueError where an input of a one-step node does not fit."""
    require_stable_diffusion(model)
    samples = require_picture(latent)
    require_own_noise(model, samples)
    if not is_tiled(model) and "model_function_wrapper" not in model.model_options:  # other packs' tiling
        require_memory(model, samples)
    require_number(cfg, "cfg", 0.0, 100.0)
    require_conditioning(positive, model, "positive")
    conds = {"positive": positive}
    if negative is not None:
        require_conditioning(negative, model, "negative")
        conds["negative"] = negative
    elif cfg != 1.0:
        raise ValueError(f"cfg: found {cfg} without a negative input, expected 1, the published method. Set it to 1, or wire a negative prompt.")
    return conds


def sample_step(
    model,
    latent: dict,
    conds: dict,
    cfg: float,
    timestep: int,
    node: str,
    equation: Equation | None = None,
    part: tuple[int, int] = (0, 1),
    images: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The restored samples (B, 4, h, w), not multiplied by the scaling factor: one call of the network at ``timestep`` for each conditioning.

    Args:
        latent: the low-quality one; its noise mask keeps it outside.
        node: display name, for messages.
        equation: in place of the clean latents that the predicted noise implies at ``timestep``.
        part: which of how many calls of this function that the node makes, for the progress bar.
        images: those of the batch that are restored, None for all; what comes of the others means nothing.
    """
    samples = latent["samples"]
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigma(torch.tensor([timestep])), torch.zeros(1)])
    streamed = stream_pictures(model) if images is None else predict_only(stream_pictures(model), images)
    guider = comfy.samplers.CFGGuider(streamed) if equation is None else EquationGuider(streamed, equation)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    callback, (first, steps) = latent_preview.prepare_callback(model, part[1]), part
    try:
        restored = guider.sample(
            _start_noise(model, samples, sampling, sigmas[0]),
            samples,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=lambda step, x0, x, _: callback(first + step, x0, x, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
        # Of a kind at which ComfyUI unloads its models.
        raise comfy.model_management.OOM_EXCEPTION(f"latent: the picture does not fit into memory in one piece. {TILE_IT} ({error})") from None
    return require_finite(restored.to(comfy.model_management.intermediate_device()), node, "--fp32-unet or --bf16-unet")


class EquationGuider(comfy.samplers.CFGGuider):
    """Answers the sampler with an equation's latents instead of the clean ones that the guided noise prediction implies.

    In one step to sigma 0 they are Euler's result, so that masks, previews and samplers' patches are core's.
    """

    def __init__(self, model, equation: Equation):
        super().__init__(model)
        self._equation = equation

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        denoised = super().predict_noise(x, timestep, model_options, seed)
        sigma = timestep.view(-1, 1, 1, 1)
        return self._equation(from_sigma_space(x, alpha_bar_of(sigma)), (x - denoised) / sigma)


def _start_noise(model, samples: torch.Tensor, sampling, sigma: torch.Tensor) -> torch.Tensor:
    """The NOISE with which ComfyUI's sampler starts from the latent itself.

    The start is the scaled latent z itself, taken for the state at ``sigma`` (:func:`fewstep_sr.methods.osediff.one_step`). The sampler
    starts from ``factor * noise + z``. Its factor is asked for, not assumed: from the end of the schedule it is not sigma. With the latent in
    place instead of zeros, a noise mask keeps the low-quality picture outside it.
    """
    z = model.get_model_object("latent_format").process_in(samples.float())  # the network's own may be another branch's
    start = to_sigma_space(z, alpha_bar_of(sigma))
    unit, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    at_end = bool(sigma >= sampling.sigma_max.to(sigma) * (1 - 1e-5))
    factor = sampling.noise_scaling(sigma.reshape(1), unit, zero, at_end).item()
    return (start - z) / factor
