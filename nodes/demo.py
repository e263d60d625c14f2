"""The miniature that comes with the pack, on the sockets on which a checkpoint's parts come."""

from functools import partial

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..fewstep_sr.methods import INVSR, METHODS, load_weights
from ..fewstep_sr.miniature import PHOTO, PROMPT_FILE, UNET_HEAD_DIM, VAE_NORM_GROUPS, find
from ..fewstep_sr.networks.noise_predictor import NoisePredictor
from ..fewstep_sr.weights.lora import Adapter
from .adapter import adapt_model, adapt_vae
from .invsr import NoisePredictorSocket
from .managed import manage
from .page import require_choice

DEMOS = {method.title: method for method in sorted(METHODS.values(), key=lambda method: method.title) if method.demo}

_UNET = {
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class FewStepSRDemoLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRDemoLoader",
            display_name="Load Few-Step SR Demo",
            category="FewStepSR",
            description="Loads the miniature that comes with this pack, to run InvSR or OSEDiff in seconds on a CPU without a download. It is a "
            "toy compared with Stable Diffusion; for real pictures replace it by Load Checkpoint and Load InvSR Noise Predictor or "
            "Load OSEDiff.",
            search_aliases=["demo", "miniature", "example", "invsr", "osediff", "super resolution"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(DEMOS),
                    default="InvSR",
                    tooltip=" ".join(f"{method.title}: {demo.note}." for method in DEMOS.values() if (demo := method.demo)),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="A UNet with Stable Diffusion's architecture and 2 million weights."),
                io.Vae.Output(tooltip="Its VAE: 4 channels at an eighth of the size, as Stable Diffusion's."),
                io.Conditioning.Output(tooltip="The one prompt it was trained with; it has no text encoder."),
                NoisePredictorSocket.Output(tooltip="InvSR's noise predictor for this base."),
                io.Image.Output(
                    display_name="photo", tooltip="A low-quality photo of 112 x 75 pixels to try it on. Use Load Image instead for your own."
                ),
            ],
        )

    @classmethod
    def execute(cls, method="InvSR") -> io.NodeOutput:
        chosen = DEMOS[require_choice(method, "method", DEMOS)]
        model, vae = _load_model(), _load_vae()
        adapter = load_weights(chosen, find(chosen.demo.file))
        if isinstance(adapter, Adapter):
            model, vae = adapt_model(model, chosen, adapter, 1.0), adapt_vae(vae, chosen, adapter, 1.0)
        weights = load_weights(INVSR, find(INVSR.demo.file))
        predictor = manage(partial(NoisePredictor, weights.config), weights.state_dict)
        prompt = comfy.utils.load_torch_file(str(find(PROMPT_FILE)))["prompt_embeds"].float()
        photo = np.asarray(Image.open(find(PHOTO)).convert("RGB"), dtype=np.float32) / 255
        return io.NodeOutput(model, vae, [[prompt, {}]], predictor, torch.from_numpy(photo)[None])


def _load_model():
    names = comfy.utils.unet_to_diffusers(_UNET)
    weights = comfy.utils.load_torch_file(str(find("unet/diffusion_pytorch_model.safetensors")))
    weights = {names[key]: weight for key, weight in weights.items()}
    config = comfy.supported_models.SD20(comfy.model_detection.detect_unet_config(weights, ""))
    config.unet_config |= {"num_head_channels": UNET_HEAD_DIM, "num_heads": -1}
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(device, sum(w.numel() for w in weights.values()), config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device))
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS)
    patcher = comfy.model_patcher.CoreModelPatcher(model.eval(), load_device=device, offload_device=offload_device)
    model.diffusion_model.load_state_dict({key: weight.to(dtype) for key, weight in weights.items()}, assign=patcher.is_dynamic())
    return patcher


def _load_vae():
    weights = comfy.utils.load_torch_file(str(find("vae/diffusion_pytorch_model.safetensors")))
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": _VAE, "embed_dim": 4}})
    for module in vae.first_stage_model.modules():
        if hasattr(module, "num_groups"):
            module.num_groups = VAE_NORM_GROUPS
    return vae
