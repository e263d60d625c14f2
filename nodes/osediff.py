"""OSEDiff (Wu et al., NeurIPS 2024): the low-quality latent is the start of a single diffusion step."""

import logging

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import io

from ..fewstep_sr.diffusion import alpha_bar_of, to_sigma_space
from ..fewstep_sr.methods import OSEDIFF, load_weights
from ..fewstep_sr.methods.osediff import TIMESTEP
from .adapter import ATTACHMENT, acting_adapters, adapt_model, adapt_vae
from .checks import TILE_IT, require_conditioning, require_finite, require_memory, require_picture, require_stable_diffusion, require_vae
from .noise import PredictedNoise, number_pictures
from .page import find_listed, fingerprint, list_files, require_number, warn
from .tiled_model import is_tiled, stream_pictures

USUAL = 2.0
"""Adapter strengths and guidance above this are let through with a warning: the published value of both is 1."""


class OSEDiffLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffLoader",
            display_name="Load OSEDiff",
            category="FewStepSR/OSEDiff",
            description="Puts an OSEDiff adapter on the UNet and the VAE encoder of Stable Diffusion 2.1-base. "
            "Wire both outputs: the adapted VAE encodes the low-quality picture, the adapted model restores it in one step.",
            search_aliases=["osediff", "one-step diffusion", "super resolution", "upscale", "restore"],
            inputs=[
                io.Model.Input("model", tooltip="SD 2.1-base (512 pixels, predicts noise), from Load Checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Combo.Input(
                    "osediff_name",
                    options=list_files(OSEDIFF.weights.folder),
                    tooltip="Adapter file in models/osediff, such as osediff.pkl. osediff_face.pkl is for portraits that are already large.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the adapter the UNet gets. 1 is the published method; the UNet without it does not restore.",
                ),
                io.Float.Input(
                    "strength_vae",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the adapter the VAE encoder gets. 1 is the published method; 0 is the base's own encoder.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The adapted UNet, for OSEDiff One Step or any sampler."),
                io.Vae.Output(tooltip="The VAE with the adapted encoder; its decoder is the base's."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, osediff_name=None) -> bool | str:
        return find_listed(OSEDIFF, osediff_name)

    @classmethod
    def fingerprint_inputs(cls, osediff_name=None, **_) -> list[tuple]:
        return fingerprint(OSEDIFF.weights.folder, osediff_name)

    @classmethod
    def execute(cls, model, vae, osediff_name, strength_model=1.0, strength_vae=1.0) -> io.NodeOutput:
        require_stable_diffusion(model)
        require_vae(vae)
        strengths = {"strength_model": strength_model, "strength_vae": strength_vae}
        for name, strength in strengths.items():
            require_number(strength, name, -10.0, 10.0)
        extreme = {name: strength for name, strength in strengths.items() if not 0 <= strength <= USUAL}
        warnings = [
            f"{name}: found {strength:g}, expected 1 (0 to {USUAL:g}). Set it to 1, or the picture falls apart." for name, strength in extreme.items()
        ]
        for name, patcher in {"model": model, "vae": vae.patcher}.items():
            if any(acting_adapters(patcher).values()):
                warnings.append(
                    f"{name}: found an OSEDiff adapter on it already, expected the base's own. Both act now: take one 'Load OSEDiff' out, or set its "
                    "strength to 0."
                )
        warn(cls, warnings)
        adapter = load_weights(OSEDIFF, folder_paths.get_full_path_or_raise(OSEDIFF.weights.folder, osediff_name))
        adapted_for = "faces" if "face" in osediff_name.lower() else "photos"
        logging.info("OSEDiff adapter for %s %s: rank %d on the UNet, %d on the VAE", adapted_for, osediff_name, adapter.rank_unet, adapter.rank_vae)
        return io.NodeOutput(adapt_model(model, adapter, strength_model), adapt_vae(vae, adapter, strength_vae))


class OSEDiffOneStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffOneStep",
            display_name="OSEDiff One Step",
            category="FewStepSR/OSEDiff",
            description="Restores a low-quality latent in a single diffusion step, from the latent itself instead of noise (OSEDiff). "
            "It runs ComfyUI's own sampler, so LoRAs, ControlNets, model patches, masks and previews work.",
            search_aliases=["osediff", "one-step diffusion", "sampler", "restore", "super resolution"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Load OSEDiff; LoRAs and other patches may follow it."),
                io.Conditioning.Input(
                    "positive", tooltip="The picture's content as text: tags such as 'cat, fur, whiskers'. Encode it with the base's CLIP."
                ),
                io.Latent.Input("latent", tooltip="The enlarged low-quality picture, encoded with the VAE from Load OSEDiff."),
                io.Conditioning.Input("negative", optional=True, tooltip="Only used where cfg is not 1. The published method has none."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance. 1 is the published method; other values need the negative input and run the model twice.",
                ),
                io.Int.Input(
                    "timestep",
                    default=TIMESTEP,
                    min=0,
                    max=TIMESTEP,
                    advanced=True,
                    tooltip="Index of the noise table at which the one step is taken. The published adapters are trained at 999 alone.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The restored latent. Decode it with VAE Decode (Few-Step SR).")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, latent, negative=None, cfg=1.0, timestep=TIMESTEP) -> io.NodeOutput:
        require_stable_diffusion(model)
        samples = require_picture(latent)
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
        warnings = []
        if cfg > USUAL:
            warnings.append(f"cfg: found {cfg:g}, expected 1 (to {USUAL:g}). Set it to 1, or colours and edges overshoot.")
        adapters = acting_adapters(model)
        trained_at = next((mark.timestep for mark, share in adapters.items() if share), model.get_attachment(ATTACHMENT))
        if adapters and not any(adapters.values()):
            warnings.append(
                "model: the OSEDiff adapter on it acts with strength 0, lost in a merge or by strength_model. Put Load OSEDiff after the merge, "
                "with a strength of 1."
            )
        elif trained_at is None:
            warnings.append("model: found no OSEDiff adapter on it. Put Load OSEDiff before (needless where a checkpoint has it merged in).")
        elif timestep == TIMESTEP != trained_at:
            warnings.append(f"timestep: found {timestep}, expected {trained_at}, this adapter's. Set it to {trained_at}.")
        warn(cls, warnings)

        sampling = model.get_model_object("model_sampling")
        sigmas = torch.cat([sampling.sigma(torch.tensor([timestep])), torch.zeros(1)])
        guider = comfy.samplers.CFGGuider(stream_pictures(model))
        guider.inner_set_conds(conds)
        guider.set_cfg(cfg)
        try:
            restored = guider.sample(
                _one_step_noise(model, samples, sampling, sigmas[0]),
                samples,
                comfy.samplers.sampler_object("euler"),
                sigmas,
                denoise_mask=latent.get("noise_mask"),
                callback=latent_preview.prepare_callback(model, 1),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=0,
            )
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            # Of a kind at which ComfyUI unloads its models.
            raise comfy.model_management.OOM_EXCEPTION(f"latent: the picture does not fit into memory in one piece. {TILE_IT} ({error})") from None
        restored = require_finite(restored.to(comfy.model_management.intermediate_device()), "OSEDiff One Step", "--fp32-unet or --bf16-unet")
        return io.NodeOutput({**latent, "samples": restored})


def _one_step_noise(model, samples: torch.Tensor, sampling, sigma: torch.Tensor) -> torch.Tensor:
    """The NOISE with which ComfyUI's sampler starts from the latent itself.

    OSEDiff's start is the scaled latent z itself, taken for the state at ``sigma`` (:func:`fewstep_sr.methods.osediff.one_step`). The sampler
    starts from ``factor * noise + z``. Its factor is asked for, not assumed: from the end of the table it is not sigma. With the latent in
    place instead of zeros, a noise mask keeps the low-quality picture outside it.
    """
    z = model.get_model_object("latent_format").process_in(samples.float())  # the network's own may be another branch's
    start = to_sigma_space(z, alpha_bar_of(sigma))
    unit, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    at_end = bool(sigma >= sampling.sigma_max.to(sigma) * (1 - 1e-5))
    factor = sampling.noise_scaling(sigma.reshape(1), unit, zero, at_end).item()
    return (start - z) / factor


class OSEDiffStartState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffStartState",
            display_name="OSEDiff Start State",
            category="FewStepSR/OSEDiff",
            description="OSEDiff's start, the low-quality latent itself, as NOISE for Sampler Custom Advanced. Use it with the SIGMAS of Few-Step Scheduler "
            "(OSEDiff) and the blank latent given here; OSEDiff One Step does the same in one node.",
            search_aliases=["osediff", "noise", "custom sampler", "start latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Load OSEDiff; it says how latents are scaled."),
                io.Latent.Input("latent", tooltip="The enlarged low-quality picture, encoded with the VAE from Load OSEDiff."),
            ],
            outputs=[
                io.Noise.Output(tooltip="For the noise input of Sampler Custom Advanced."),
                io.Latent.Output(display_name="blank", tooltip="A blank latent of the same size, for the latent_image input."),
            ],
        )

    @classmethod
    def execute(cls, model, latent) -> io.NodeOutput:
        require_stable_diffusion(model)
        samples = require_picture(latent)
        noise = PredictedNoise(model.get_model_object("latent_format").process_in(samples.float()), latent, _require_blank)
        return io.NodeOutput(noise, {**latent, "samples": torch.zeros_like(samples), "batch_index": number_pictures(latent)})


def _require_blank(samples: torch.Tensor) -> None:
    """Refuse a picture beside the noise that is the picture."""
    if samples.any():
        raise ValueError(
            "latent_image: found a latent with a picture, expected a blank one: OSEDiff's start is in the noise. "
            "Wire the blank LATENT of 'OSEDiff Start State' into the sampler."
        )
