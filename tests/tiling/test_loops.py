"""The loops over tiles, windows and images without any network: what is called with what, in which groups, and what comes of it."""

import math

import pytest
import torch
from memory import Memory

from fewstep_sr.networks.noise_predictor import NoisePredictorConfig
from fewstep_sr.networks.posterior import Posterior
from fewstep_sr.networks.ram import TaggerConfig
from fewstep_sr.networks.swin import SwinConfig
from fewstep_sr.tiling import predictor
from fewstep_sr.tiling.batching import Runtime, run_in_groups
from fewstep_sr.tiling.predictor import MAX_WINDOWS, OVERLAP, WINDOW, NoiseCanvas, predict_noise_map
from fewstep_sr.tiling.tagging import tag_logits
from fewstep_sr.tiling.tiles import Tile, TileLayout
from fewstep_sr.tiling.unet import cut_items, list_items, predict_in_tiles, take


def test_groups():
    runtime, seen = Memory(), []
    assert run_in_groups(range(7), 3, lambda part: seen.append(list(part)), runtime, runtime.told.append) == 3
    assert seen == [[0, 1, 2], [3, 4, 5], [6]] and runtime.told == [3, 3, 1] and runtime.calls == 3 and runtime.freed == 0
    assert run_in_groups(range(2), 9, lambda part: None, Runtime()) == 2 and run_in_groups([], 3, lambda part: None, Runtime()) == 0


def test_groups_are_halved_where_memory_runs_out():
    runtime, seen = Memory(fits=2), []

    def run(part):
        runtime.use(len(part))
        seen.append(list(part))

    assert run_in_groups(range(9), 8, run, runtime, runtime.told.append) == 2
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8]] and runtime.told == [2, 2, 2, 2, 1] and runtime.freed == 2


def test_what_is_no_lack_of_memory_ends_it():
    def fail(part):
        raise ValueError("other")

    runtime = Memory()
    with pytest.raises(ValueError, match="other"):
        run_in_groups(range(4), 4, fail, runtime)
    assert runtime.freed == 0
    with pytest.raises(MemoryError):  # a single item does not fit
        run_in_groups(range(4), 4, lambda part: runtime.use(2000), runtime)
    assert runtime.freed == 2


def test_a_runtime_by_itself_does_nothing():
    runtime = Runtime()
    assert runtime.before_call() is None and runtime.is_out_of_memory(MemoryError()) is False and runtime.free_memory() is None
    assert runtime.progress(3)(1) is None


def test_tiles_of_a_batch_are_blended_for_every_conditioning():
    latents = torch.randn(2, 4, 20, 12)
    layout, runtime, sizes = TileLayout(20, 12, 12, 4), Memory(fits=3), []

    def predict(items):
        runtime.use(len(items))
        sizes.append(len(items))
        tiles = cut_items(latents, items)
        return [tiles.sin(), tiles.double() * 2]

    sine, double = torch.zeros(2, 4, 20, 12), torch.zeros(2, 4, 20, 12)
    predict_in_tiles(predict, [sine, double], layout, 4, runtime)
    assert torch.allclose(sine, latents.sin(), atol=1e-6) and torch.allclose(double, latents * 2, atol=1e-6)
    assert runtime.total == 4 and sizes == [2, 2] and runtime.told == [2, 2]
    assert list_items(range(2), layout) == [(0, Tile(0, 0, 12, 12)), (0, Tile(8, 0, 12, 12)), (1, Tile(0, 0, 12, 12)), (1, Tile(8, 0, 12, 12))]


def test_every_conditioning_and_tile_has_its_prediction():
    latents, layout = torch.randn(2, 4, 20, 12), TileLayout(20, 12, 12, 4)
    blended = torch.zeros(2, 4, 20, 12)
    predict_in_tiles(lambda items: [cut_items(latents, items)], [blended], layout, 4, Runtime())
    assert torch.allclose(blended, latents, atol=1e-6)
    for wrong in (lambda items: [cut_items(latents, items)] * 2, lambda items: [cut_items(latents, items)[1:]]):
        with pytest.raises(ValueError, match="zip"):
            predict_in_tiles(wrong, [torch.zeros(2, 4, 20, 12)], layout, 4, Runtime())


def test_some_images_of_a_batch():
    """The others stay as they are."""
    latents, layout, blended = torch.randn(3, 4, 20, 12), TileLayout(20, 12, 12, 4), torch.zeros(3, 4, 20, 12)
    predict_in_tiles(lambda items: [cut_items(latents, items)], [blended], layout, 4, Runtime(), images=[2, 0])
    assert torch.allclose(blended[[2, 0]], latents[[2, 0]], atol=1e-6) and blended[1].eq(0).all()
    rows = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(take(rows, [3, 0, 3]), rows[[3, 0, 3]])


def test_tile_geometry():
    canvas = torch.arange(30).reshape(5, 6)
    assert Tile(1, 2, 2, 3).cut(canvas).tolist() == [[8, 9, 10], [14, 15, 16]]
    assert Tile(1, 1, 1, 2).cut(canvas, scale=2).tolist() == [[14, 15, 16, 17], [20, 21, 22, 23]]
    layout = TileLayout(100, 64, 64, 8)
    assert layout.tops == [0, 36] and layout.lefts == [0]
    assert TileLayout(120, 64, 64, 8).tops == [0, 56] and TileLayout(121, 64, 64, 8).tops == [0, 28, 57]
    assert TileLayout(9, 9, 8, 7).tops == [0, 1] and TileLayout(8, 8, 8, 0).tops == [0] and TileLayout(9, 9, 8, 0).tops == [0, 1]
    assert layout.tiles == [Tile(0, 0, 64, 64), Tile(36, 0, 64, 64)]
    for overlap in (-1, 64):
        with pytest.raises(ValueError, match="expected from 0 to 63"):
            TileLayout(100, 100, 64, overlap)


def test_window_is_a_squared_sine_over_the_overlap():
    first, second = (TileLayout(12, 4, 8, 4).window(tile) for tile in TileLayout(12, 4, 8, 4).tiles)
    ramp = [math.sin((i + 0.5) / 4 * math.pi / 2) ** 2 for i in range(4)]  # sin^2 + cos^2 = 1, so that nothing is left to divide by
    assert torch.allclose(second[:4, 0], torch.tensor(ramp)) and torch.allclose(first[4:, 0], torch.tensor(ramp[::-1]))
    assert first[:4].eq(1).all() and second[4:].eq(1).all() and first.dtype == torch.float32
    assert TileLayout(12, 4, 8, 4).window(Tile(0, 0, 8, 4), scale=2).shape == (16, 8)
    fine = TileLayout(12, 4, 8, 4).window(Tile(4, 0, 8, 4), scale=2)[:, 0]
    assert torch.allclose(fine[:8], torch.tensor([math.sin((i + 0.5) / 8 * math.pi / 2) ** 2 for i in range(8)]))


CONFIG = NoisePredictorConfig(block_out_channels=(64, 64), latent_channels=4)


def test_noise_map_is_predicted_in_windows():
    picture = torch.rand(2, 3, 2 * (WINDOW + 20), 2 * WINDOW) * 2 - 1
    runtime, shapes = Memory(), []

    def call(windows):
        shapes.append(tuple(windows.shape))
        small = torch.nn.functional.avg_pool2d(windows, 2)
        return Posterior(torch.cat([small, small[:, :1]], 1), torch.full((len(windows), 4, *small.shape[-2:]), 2.0))

    posterior = predict_noise_map(call, picture, CONFIG, lambda height, width: 3 if (height, width) == (WINDOW, WINDOW) else 0, runtime)
    expected = torch.nn.functional.avg_pool2d(picture, 2)
    assert torch.allclose(posterior.mean[:, :3], expected, atol=1e-5) and torch.allclose(posterior.mean[:, 3], expected[:, 0], atol=1e-5)
    assert torch.allclose(posterior.logvar, torch.full_like(posterior.mean, 2.0), atol=1e-4)
    assert shapes == [(3, 3, 128, 128), (1, 3, 128, 128)] and runtime.total == 4 and runtime.told == [3, 1]


@pytest.mark.parametrize(("pictures", "fits", "first"), [(11, 0, 1), (11, 5, 5), (11, 100, MAX_WINDOWS), (1, 5, 1)])
def test_number_of_windows_in_a_call(pictures, fits, first):
    sizes = []

    def call(windows):
        sizes.append(len(windows))
        return Posterior(torch.zeros(len(windows), 4, 8, 8), torch.zeros(len(windows), 4, 8, 8))

    predict_noise_map(call, torch.zeros(pictures, 3, 16, 16), CONFIG, lambda height, width: fits, Runtime())
    assert sizes[0] == first and sum(sizes) == pictures


def test_windows_are_the_published_training_size():
    assert (WINDOW, OVERLAP, MAX_WINDOWS) == (64, 8, 8)
    assert 2 * WINDOW == 128 and predictor.NoiseCanvas(1, 64, 64).layout.tiles == [Tile(0, 0, 64, 64)]
    canvas = NoiseCanvas(2, 100, 65, channels=3)
    assert canvas.mean.shape == canvas.std.shape == (2, 3, 100, 65) and canvas.mean.dtype == torch.float32
    assert [(i, t.top, t.left) for i, t in canvas.windows] == [(i, top, left) for i in (0, 1) for top in (0, 36) for left in (0, 1)]
    predicted = Posterior(torch.full((1, 3, 64, 64), 5.0), torch.full((1, 3, 64, 64), 2 * math.log(3.0)))
    for window in canvas.windows:
        canvas.add([window], predicted)
    assert torch.allclose(canvas.posterior.mean, torch.full((2, 3, 100, 65), 5.0), atol=1e-4)
    assert torch.allclose(canvas.std, torch.full((2, 3, 100, 65), 3.0), atol=1e-4)
    assert torch.allclose(canvas.posterior.logvar, torch.full((2, 3, 100, 65), 2 * math.log(3.0)), atol=1e-4)


def test_tagging_is_one_image_at_a_time():
    config = TaggerConfig(swin=SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4), num_tags=5)
    runtime, shapes = Memory(), []

    def call(image):
        shapes.append(tuple(image.shape))
        return image.mean((1, 2, 3))[:, None].half() * torch.arange(5).half()

    pictures = torch.stack([torch.full((3, 9, 7), 0.2), torch.full((3, 9, 7), 0.8)])
    logits = tag_logits(call, pictures, config, runtime)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32 and logits[1, 4] > 0 > logits[0, 4]
    assert shapes == [(1, 3, config.image_size, config.image_size)] * 2 and runtime.total == 2 and runtime.told == [1, 1] and runtime.calls == 2
