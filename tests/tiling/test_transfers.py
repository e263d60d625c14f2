"""Between the first tile of an image and the last nothing crosses between the device and the host: copies are per image, not per tile.

Where the image does not fit on the device, they are queued, and neither side waits."""

from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transfers import DEVICE, count

pytest.importorskip("diffusers")

import diffusers

from benchmarks.full_size import Networks
from fewstep_sr.tiling.whole_picture import WholePicture
from pipelines import InvSRNoisePredictor, InvSRPipeline, base, invsr, runtime, tiling

TILE = 256
SMALL, LARGE = 384, 640
"""Sides in pixels of images with 4 and with 9 tiles; in windows of 64 latent pixels one and 4."""


@pytest.fixture(autouse=True)
def tile_by_tile(monkeypatch):
    """Every tile is a call of its own, canvases fit, and nobody looks for NaN or at how far statistics are off (once an image), as fake tensors have no values."""
    monkeypatch.setattr(tiling, "GROUP_CELLS", 1)
    monkeypatch.setattr(invsr, "MAX_WINDOWS", 1)
    monkeypatch.setattr(runtime, "has_room", lambda size, device: True)
    monkeypatch.setattr(WholePicture, "off", lambda self: 0.0)
    for module in (base, invsr):
        monkeypatch.setattr(module, "require_finite", lambda tensor, what: tensor)


def build(stage: str, pixels: int):
    networks = Networks(torch.float32, DEVICE, reduced=True)
    vae = networks.vae
    with DEVICE:
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8, cross_attention_dim=networks.context_dim, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), mid_block_type=None,
        ).eval()  # fmt: skip
        predictor = InvSRNoisePredictor(**vars(networks.predictor_config))
    with unset_fake_temporarily():  # it looks at the scheduler's values
        scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        pipeline = InvSRPipeline(vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, noise_predictor=predictor)
    pipeline.enable_tiling(TILE)
    pipeline.set_progress_bar_config(disable=True)
    image, latents = torch.rand(1, 3, pixels, pixels), torch.randn(1, 4, pixels // 8, pixels // 8)
    return {
        "encode": lambda: pipeline.encode(image),
        "decode": lambda: pipeline.decode(latents),
        "predict": lambda: pipeline.predict_noise(latents, 999, torch.randn(1, 77, networks.context_dim)),
        "noise map": lambda: pipeline._predict(torch.rand(1, 3, pixels // 4, pixels // 4), 199),
    }[stage]


@pytest.mark.parametrize(
    ("stage", "to_host"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in (("encode", 1), ("decode", 1), ("predict", 0))), ("noise map", 2)],
)
def test_copies_do_not_grow_with_the_number_of_tiles(stage, to_host):
    small, large = (count(lambda pixels=pixels: build(stage, pixels)) for pixels in (SMALL, LARGE))
    assert small == large
    assert small.get("to host", 0) == to_host and small.get("waits", 0) == 0, small


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_copies_of_a_canvas_that_does_not_fit_are_queued(stage, monkeypatch):
    """One each way for each tile. What else goes to the device is for the whole image, before its first tile."""
    monkeypatch.setattr(runtime, "has_room", lambda size, device: False)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    small, large = (count(lambda pixels=pixels: build(stage, pixels)) for pixels in (SMALL, LARGE))
    assert [(found["queued"], found["to host"]) for found in (small, large)] == [(2 * 4, 4), (2 * 9, 9)]
    assert small["to device"] - 4 == large["to device"] - 9 and not small.get("waits") and not large.get("waits")


def test_what_fits(monkeypatch):
    monkeypatch.undo()
    assert runtime.has_room(2**60, torch.device("cpu")) and not runtime.has_room(1, torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert runtime.has_room(200, DEVICE) and not runtime.has_room(201, DEVICE)
