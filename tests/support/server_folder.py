"""A server's base folder, filled as a user's would be: the files that the templates name, and a photo."""

import json
from pathlib import Path

import extra_models
import stable_diffusion
import tagger_toys
from conftest import ROOT
from PIL import Image

PHOTO = ROOT / "tests" / "data" / "chelsea.png"


def write_models(models: Path, size: str) -> None:
    """Files under the names that the example workflows ask for."""
    for folder in ("checkpoints", "osediff", "pisasr", "hypir", "s3diff", "invsr", "dape", "loras", "controlnet", "upscale_models"):
        (models / folder).mkdir(parents=True)
    base = models / "checkpoints" / "v2-1_512-ema-pruned.safetensors"
    stable_diffusion.write_checkpoint(base, size)
    (models / "checkpoints" / "sd_turbo.safetensors").symlink_to(base)
    stable_diffusion.write_osediff(models / "osediff" / "osediff.pkl", size)
    stable_diffusion.write_adapter(models / "pisasr" / "pisa_sr.pkl", "pisasr", size)
    stable_diffusion.write_adapter(models / "hypir" / "HYPIR_sd2.pth", "hypir", size)
    stable_diffusion.write_s3diff(models / "s3diff", size)
    stable_diffusion.write_predictor(models / "invsr" / "noise_predictor_sd_turbo_v5.pth", size)
    # A small tagger that always finds its first eight tags.
    tagger_toys.write_ram(models / "dape", thresholds=[0.0 if i < 8 else 2.0 for i in range(len(tagger_toys.NAMES))])
    extra_models.write_lora(models / "loras" / "my_lora.safetensors", size)
    extra_models.write_controlnet(models / "controlnet" / "control_v11p_sd21_canny.safetensors", size)
    extra_models.write_upscaler(models / "upscale_models" / "RealESRGAN_x4plus.safetensors")


def fill(base: Path, size: str) -> None:
    """A server's base folder with the templates' files and a small photo."""
    write_models(base / "models", size)
    (base / "input").mkdir()
    photo().save(base / "input" / "example.png")


def photo() -> Image.Image:
    """50 x 37 pixels; four times that is no multiple of the VAE's 8."""
    return Image.open(PHOTO).convert("RGB").resize((50, 37), Image.Resampling.BICUBIC)


RENAMED = json.loads((ROOT / "nodes" / "renamed_templates.json").read_text())


def load(name: str) -> dict:
    """A template by its name, or by the name that it had."""
    name = RENAMED.get(name, name)
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text())
