"""Large pictures and batches in the pipelines: tiles against the whole, a batch against single pictures."""

import copy
import io
import os
import signal
import time

import pipeline_toys
import pytest
import torch
import toys
from diffusers import DiffusionPipeline
from forked import Forked
from PIL import Image
from toys import gaussian, picture, relative_error

from fewstep_sr.tiling import vae as tiled_vae
from pipelines import InvSRPipeline, OSEDiffPipeline
from pipelines.cli import main
from pipelines.runtime import is_out_of_memory
from pipelines.tiling import GROUP_CELLS

SEED, TILE = 5, 256
EMBEDS = gaussian(SEED, "prompt_embeds", (1, 77, 64))


NARROW = pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.slow)])
"""The fast ones have a base of 8 channels."""
KINDS = pytest.mark.parametrize(
    ("kind", "narrow"),
    [(InvSRPipeline, True), *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in (OSEDiffPipeline, InvSRPipeline))],
)


def make(kind, tmp_path, narrow=False, **strengths):
    pipeline = kind(**pipeline_toys.components(SEED, narrow=narrow))
    if kind is OSEDiffPipeline:
        if narrow:
            pipeline_toys.narrow_adapter(tmp_path / "adapter.safetensors")
        else:
            torch.save(toys.osediff_checkpoint(SEED, 4), tmp_path / "adapter.pkl")
        pipeline.load_osediff(tmp_path / f"adapter.{'safetensors' if narrow else 'pkl'}", **strengths)
    else:
        torch.save(toys.predictor_state_dict(SEED), tmp_path / "predictor.pth")
        pipeline.load_noise_predictor(tmp_path / "predictor.pth")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return picture(SEED, height, width, batch).movedim(-1, 1)


def restore(pipeline, image, **kwargs) -> torch.Tensor:
    return pipeline(image, **{"prompt_embeds": EMBEDS, "scale": 1.5, "output_type": "pt", "color_fix": None} | kwargs).images


@pytest.fixture
def calls(monkeypatch):
    """Shapes of all that goes into the networks."""
    from diffusers.models import AutoencoderKL, UNet2DConditionModel

    from pipelines import InvSRNoisePredictor

    seen = []
    for kind, name in ((AutoencoderKL, "encode"), (AutoencoderKL, "decode"), (UNet2DConditionModel, "forward"), (InvSRNoisePredictor, "forward")):

        def call(self, x, *args, original=getattr(kind, name), **kwargs):
            seen.append(tuple(x.shape))
            return original(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, name, call)
    return seen


@KINDS
def test_any_size_in_tiles(kind, narrow, tmp_path, calls):
    pipeline = make(kind, tmp_path, narrow)
    image = pixels(187, 163)
    whole = restore(pipeline, image)
    calls.clear()
    pipeline.enable_tiling(TILE)
    tiled = restore(pipeline, image)
    assert tiled.shape == whole.shape == (1, 3, 280, 244)
    assert max(shape[-2] * shape[-1] for shape in calls) < 1.2 * TILE**2
    pipeline.disable_tiling()
    assert torch.equal(restore(pipeline, image), whole)


@NARROW
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapter_acts_in_tiles(tmp_path, narrow, fused):
    """The tiles' encoder is the adapted one: nearer to the whole picture with the adapter than without it."""
    pipeline, image = make(OSEDiffPipeline, tmp_path, narrow, strength_vae=2.0), pixels(270, 401)
    if fused:
        pipeline.fuse()
    whole = pipeline.encode(image)
    pipeline.enable_tiling(TILE)
    tiled = pipeline.encode(image)
    pipeline.unload_osediff()
    pipeline.disable_tiling()
    whole_base = pipeline.encode(image)
    assert relative_error(tiled, whole) < 0.08
    assert relative_error(tiled, whole_base) > 3 * relative_error(tiled, whole)


@NARROW
def test_vae_of_others_is_left_alone(tmp_path, narrow):
    pipeline, image = make(OSEDiffPipeline, tmp_path, narrow), pixels(270, 300)
    vae, plain = pipeline.vae, pipeline.vae.encode(pixels(64, 64)).latent_dist.parameters
    before = [(name, module, dict(vars(module))) for name, module in vae.named_modules()]
    pipeline.enable_tiling(TILE)
    pipeline.decode(pipeline.encode(image))
    after = list(vae.named_modules())
    assert pipeline.vae is vae and [m for _, m in after] == [m for _, m, _ in before]
    assert all(vars(module).keys() == attributes.keys() for _, module, attributes in before)
    assert all(vars(module)[k] is attributes[k] for _, module, attributes in before for k in attributes)
    assert torch.equal(vae.encode(pixels(64, 64)).latent_dist.parameters, plain)


@pytest.mark.slow
@NARROW
def test_tiles_keep_the_whole_pictures_tone(tmp_path, narrow):
    """Better than diffusers' own tiles, of which each has its own statistics."""
    pipeline = make(OSEDiffPipeline, tmp_path, narrow)
    latents = pipeline.encode(pixels(280, 400))
    whole = pipeline.decode(latents)
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = TILE, TILE // 8
    separate = pipeline.decode(latents)
    pipeline.enable_tiling(TILE)
    shared = pipeline.decode(latents)
    assert relative_error(shared, whole) < 0.8 * relative_error(separate, whole)


@pytest.mark.parametrize("tile", [pytest.param(0, marks=pytest.mark.slow), TILE])
@KINDS
def test_batch_equals_singles(kind, narrow, tmp_path, tile):
    pipeline, images = make(kind, tmp_path, narrow), pixels(180 if tile else 50, 44, batch=3)
    if tile:
        pipeline.enable_tiling(tile)
    settings = {"posterior": "sample", "color_fix": "wavelet"}
    together = restore(pipeline, images, generator=torch.Generator().manual_seed(7), **settings)
    for i in range(3):
        single = restore(pipeline, images[i : i + 1], generator=torch.Generator().manual_seed(7), **settings)
        assert relative_error(together[i : i + 1], single) < 1e-5


@KINDS
def test_calls_do_not_grow_with_the_batch(kind, narrow, tmp_path, calls, monkeypatch):
    monkeypatch.setattr("pipelines.tiling.GROUP_CELLS", 4 * 9)
    pipeline, sizes = make(kind, tmp_path, narrow), []
    for pictures in (8, 24):
        calls.clear()
        restore(pipeline, pixels(16, 16, pictures), guidance_scale=2.0, negative_prompt_embeds=EMBEDS)
        sizes.append(max(shape[0] * shape[2] * shape[3] for shape in calls))
    assert sizes[0] == sizes[1] and GROUP_CELLS == 128**2


@pytest.mark.slow
@KINDS
def test_progress_in_tiles(kind, narrow, tmp_path, monkeypatch):
    """A bar for each network that has several tiles; pictures that are whole show none."""
    pipeline, bars = make(kind, tmp_path, narrow), []
    pipeline.set_progress_bar_config(file=io.StringIO())

    def progress_bar(iterable=None, total=None):
        bar = DiffusionPipeline.progress_bar(pipeline, iterable, total)
        if iterable is None:
            bars.append(bar)
        return bar

    monkeypatch.setattr(pipeline, "progress_bar", progress_bar)
    monkeypatch.setattr(tiled_vae, "MAX_RUNS", 1)  # a second run has a bar of its own
    restore(pipeline, pixels(64, 64))
    assert not bars
    pipeline.enable_tiling(TILE)
    restore(pipeline, pixels(200, 360))  # 40 x 72 cells
    windows = [1 * 2] if kind is InvSRPipeline else []
    assert [bar.total for bar in bars] == [2 * 3, *windows, 2 * 3, 2 * 3]
    assert all(bar.n == bar.total and not bar.leave for bar in bars)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("MPS backend out of memory (MPS allocated"),
    ],
)
def test_smaller_tiles_when_memory_runs_out(tmp_path, caplog, error):
    pipeline, image = make(OSEDiffPipeline, tmp_path, narrow=True), pixels(200, 300)
    whole = pipeline.encode(image)
    vae = copy.copy(pipeline.vae)

    class Short(type(vae)):
        def _encode(self, x):
            if x.shape[-1] * x.shape[-2] * x.shape[0] > 160**2:
                raise error
            return super()._encode(x)

    vae.__class__ = Short
    pipeline.register_modules(vae=vae)
    assert relative_error(pipeline.encode(image), whole) < 0.25
    assert "tiles of 152 pixels" in caplog.text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("XPU out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("the disk is out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_stopped_between_tiles(tmp_path, stop):
    """The command line leaves finished results alone in the folder."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, side in (("a_small.png", 16), ("b_large.png", 160)):
        Image.fromarray((picture(SEED, side, side)[0].numpy() * 255).astype("uint8")).save(source / name)
    OSEDiffPipeline(**pipeline_toys.components(SEED, tmp_path / "clip")).save_pretrained(tmp_path / "base")
    torch.save(toys.osediff_checkpoint(SEED, 4), tmp_path / "osediff.pkl")
    words = ["upscale", source, "-o", out, "--base", tmp_path / "base", "--weights", tmp_path / "osediff.pkl", "--device", "cpu", "--tile", TILE]

    def upscale() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it, and so would its children
        return main([*map(str, words)])

    run = Forked(upscale, tmp_path / "log")
    deadline = time.monotonic() + 600
    while not (out / "a_small.png").exists() and run.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(run.process.pid, stop)
    assert run.wait() == (-signal.SIGKILL if stop is signal.SIGKILL else 130), run.text
    assert [path.name for path in out.rglob("*")] == ["a_small.png"]
    Image.open(out / "a_small.png").load()
