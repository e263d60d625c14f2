"""Files of real kinds that newcomers take by mistake: other bases, and what lies in the wrong loader's folder."""

import argparse
import shutil
from pathlib import Path

import extra_models
import safetensors.torch
import torch
from stable_diffusion import UNETS, random_weights, unet_shapes


def write_wrong_models(models: Path) -> None:
    """Beside what ``test_server.write_models`` wrote, whose sizes are "reduced"."""
    for name in BASES:
        write_base(models / "checkpoints" / f"{name}.safetensors", name)
    osediff, invsr = models / "osediff", models / "invsr"
    torch.save({"epoch": 3, "args": argparse.Namespace(rank=4), "state_dict_unet": {}}, osediff / "training_state.pkl")
    gan = {"conv_first.weight": torch.zeros(64, 3, 3, 3), "body.0.rdb1.conv1.weight": torch.zeros(32, 64, 3, 3)}
    torch.save({"params_ema": gan}, osediff / "RealESRGAN_x4plus.pth")
    extra_models.write_lora(osediff / "add_detail.safetensors")
    shutil.copy(invsr / "noise_predictor_sd_turbo_v5.pth", osediff)
    shutil.copy(osediff / "osediff.pkl", invsr)


BASES = {
    "v1-5-pruned-emaonly": UNETS["reduced"] | {"transformer_depth_middle": 1, "context_dim": 768, "num_heads": 8},
    "sd_xl_base_1.0": {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],  # by which ComfyUI recognises it
        "transformer_depth_output": [0] * 9,
        "transformer_depth_middle": -1,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "num_head_channels": 64,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "v2-1_768-ema-pruned": None,
}


def write_base(path: Path, name: str) -> None:
    """A checkpoint's UNet with random weights, of few levels or narrow ones."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    if config := BASES[name]:
        config = config | {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True}
        shapes = {key: tuple(weight.shape) for key, weight in UNetModel(**config, device="meta").state_dict().items()}
    else:
        shapes = unet_shapes("reduced")
    weights = random_weights(shapes, seed=0)
    if not config:  # by whose spread ComfyUI recognises v-prediction
        weights["output_blocks.11.1.transformer_blocks.0.norm1.bias"] = torch.tensor([-1.0, 1.0]).repeat(160).half()
    safetensors.torch.save_file({f"model.diffusion_model.{key}": weight for key, weight in weights.items()}, path)
