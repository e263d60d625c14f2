"""OSEDiff (Wu et al., NeurIPS 2024): the low-quality latent is the start of a single diffusion step."""

import logging

import torch
from comfy_api.latest import io

from ..fewstep_sr.methods import OSEDIFF, load_weights
from ..fewstep_sr.methods.osediff import TIMESTEP
from .adapter import adapt_model, adapt_vae
from .checks import require_own_noise, require_picture, require_stable_diffusion
from .load_adapter import check_base, strength_input
from .marks import require_family
from .noise import PredictedNoise, number_pictures
from .page import find_listed, fingerprint, full_path, list_files, require_number, warn
from .sampling import USUAL, require_step, sample_step

OTHER_FAMILY = "Wire it into 'Few-Step SR One Step', which takes the step of the adapter that it finds."


class OSEDiffLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffLoader",
            display_name="Load OSEDiff",
            category="FewStepSR/OSEDiff",
            description="Applies an OSEDiff adapter to the UNet and the VAE encoder of Stable Diffusion 2.1-base. Wire both outputs: the adapted "
            "VAE encodes the low-quality picture, the adapted model restores it in one step.",
            search_aliases=["osediff", "one-step diffusion", "super resolution", "upscale", "restore"],
            inputs=[
                io.Model.Input("model", tooltip="SD 2.1-base (512 pixels, predicts noise), from Load Checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Combo.Input(
                    "osediff_name",
                    options=list_files(OSEDIFF.weights.folder),
                    tooltip="Adapter file in models/osediff, such as osediff.pkl. osediff_face.pkl is for portraits that are already large.",
                ),
                strength_input(
                    "strength_model", "LoRA strength on the UNet. 1 is the published method; without the adapter the UNet does not restore."
                ),
                strength_input("strength_vae", "LoRA strength on the VAE encoder. 1 is the published method; 0 is the base's own encoder."),
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
        warn(cls, check_base(model, vae, strength_model, strength_vae, "Load OSEDiff"))
        adapter = load_weights(OSEDIFF, full_path(OSEDIFF.weights.folder, osediff_name, "osediff_name", cls.validate_inputs))
        adapted_for = "faces" if "face" in osediff_name.lower() else "photos"
        logging.info("OSEDiff adapter for %s %s: rank %d on the UNet, %d on the VAE", adapted_for, osediff_name, adapter.rank_unet, adapter.rank_vae)
        return io.NodeOutput(adapt_model(model, OSEDIFF, adapter, strength_model), adapt_vae(vae, OSEDIFF, adapter, strength_vae))


class OSEDiffOneStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffOneStep",
            display_name="OSEDiff One Step",
            category="FewStepSR/OSEDiff",
            description="Restores a low-quality latent in a single diffusion step, starting from the latent itself instead of noise (OSEDiff). "
            "It runs ComfyUI's own sampler, so LoRAs, ControlNets, model patches, masks and previews work.",
            search_aliases=["osediff", "one-step diffusion", "sampler", "restore", "super resolution"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Load OSEDiff; LoRAs and other patches may follow it."),
                io.Conditioning.Input(
                    "positive", tooltip="The picture's content as text: tags such as 'cat, fur, whiskers'. Encode it with the base's CLIP."
                ),
                io.Latent.Input("latent", tooltip="The upscaled low-quality picture, encoded with the VAE from Load OSEDiff."),
                io.Conditioning.Input("negative", optional=True, tooltip="Only used if cfg is not 1. The published method has no negative prompt."),
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
                    tooltip="Timestep of the one step (index into the noise schedule). The published adapters were trained only at 999.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The restored latent. Decode it with VAE Decode (Few-Step SR).")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, latent, negative=None, cfg=1.0, timestep=TIMESTEP) -> io.NodeOutput:
        conds = require_step(model, positive, latent, negative, cfg)
        require_number(timestep, "timestep", 0, TIMESTEP)
        mark, acts = require_family(model, OSEDIFF, OTHER_FAMILY)
        warnings = []
        if cfg > USUAL:
            warnings.append(f"cfg: found {cfg:g}, expected 1 (to {USUAL:g}). Set it to 1, or colours and edges overshoot.")
        if mark is None:
            warnings.append(
                "model: found no OSEDiff adapter on it. Add Load OSEDiff before this node, unless the checkpoint already has the adapter merged."
            )
        elif not acts:
            warnings.append(
                "model: the OSEDiff adapter on it acts with strength 0, lost in a merge or by strength_model. Put Load OSEDiff after the merge, "
                "with a strength of 1."
            )
        elif timestep == TIMESTEP != mark.timestep:
            warnings.append(f"timestep: found {timestep}, expected {mark.timestep}, this adapter's. Set it to {mark.timestep}.")
        warn(cls, warnings)
        restored = sample_step(model, latent, conds, cfg, timestep, "OSEDiff One Step")
        return io.NodeOutput({**latent, "samples": restored})


class OSEDiffStartState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OSEDiffStartState",
            display_name="OSEDiff Start State",
            category="FewStepSR/OSEDiff",
            description="OSEDiff's start, the low-quality latent itself, as NOISE for SamplerCustomAdvanced. Use it with the SIGMAS of Few-Step Scheduler "
            "(OSEDiff) and the blank latent given here; OSEDiff One Step does the same in one node.",
            search_aliases=["osediff", "noise", "custom sampler", "start latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Load OSEDiff; it determines how latents are scaled."),
                io.Latent.Input("latent", tooltip="The upscaled low-quality picture, encoded with the VAE from Load OSEDiff."),
            ],
            outputs=[
                io.Noise.Output(tooltip="For the noise input of SamplerCustomAdvanced."),
                io.Latent.Output(display_name="blank", tooltip="A blank latent of the same size, for the latent_image input."),
            ],
        )

    @classmethod
    def execute(cls, model, latent) -> io.NodeOutput:
        require_stable_diffusion(model)
        require_family(model, OSEDIFF, OTHER_FAMILY)
        samples = require_picture(latent)
        require_own_noise(model, samples)
        noise = PredictedNoise(model.get_model_object("latent_format").process_in(samples.float()), latent, _require_blank)
        return io.NodeOutput(noise, {**latent, "samples": torch.zeros_like(samples), "batch_index": number_pictures(latent)})


def _require_blank(samples: torch.Tensor) -> None:
    """Refuse a picture beside the noise that is the picture."""
    if samples.any():
        raise ValueError(
            "latent_image: found a latent with a picture, expected a blank one: OSEDiff's start is in the noise. "
            "Wire the blank LATENT of 'OSEDiff Start State' into the sampler."
        )
