"""A VAE in tiles whose statistics were measured: as near to the untiled picture as docs/performance.md says, at the borders too."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from conftest import ROOT
from diffusers import AutoencoderKL

from benchmarks.networks import diffusers_vae, photo, smooth
from fewstep_sr.tiling.batching import Runtime
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.vae import MARGIN, OVERLAP, TiledCoder, share_of
from fewstep_sr.tiling.whole_picture import WholePicture, mosaic, share_whole_picture
from pipelines.runtime import PipelineRuntime
from pipelines.tiling import Tiling, _share_attention

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def miniature() -> AutoencoderKL:
    return diffusers_vae(str(ROOT / "miniature" / "vae"))


def errors(found: torch.Tensor, expected: torch.Tensor, band: int) -> tuple[float, float]:
    """Relative to the deviation of what is compared: of the whole, and of the worst of the four bands along the borders."""
    ends = (slice(0, band), slice(-band, None))
    parts = [found.new_ones(found.shape[-2:], dtype=torch.bool)] + [torch.zeros(found.shape[-2:], dtype=torch.bool) for _ in range(4)]
    for i, end in enumerate(ends):
        parts[1 + i][end] = True
        parts[3 + i][:, end] = True
    relative = [((found - expected)[..., part].norm() / (expected[..., part] - expected[..., part].mean()).norm()).item() for part in parts]
    return relative[0], max(relative[1:])


def picture(name: str, size: int) -> torch.Tensor:
    return smooth(size) if name == "smooth" else photo(str(ROOT / "tests" / "data" / "photos" / f"{name}.png"), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "astronaut"])
@torch.no_grad()
def test_encode_of_the_miniature(miniature, name):
    image = picture(name, 768)
    whole, tiled = (tiling.encode(miniature, image, CPU, PipelineRuntime())[:, :4] for tiling in (Tiling(), Tiling(32)))
    error, at_borders = errors(tiled, whole, 4)
    assert error < 0.025 and at_borders < 0.025


@pytest.mark.slow
@torch.no_grad()
def test_decode_of_the_miniature(miniature):
    latents = Tiling(32).encode(miniature, picture("astronaut", 768), CPU, PipelineRuntime())[:, :4]
    whole, tiled = (tiling.decode(miniature, latents, CPU, PipelineRuntime()) for tiling in (Tiling(), Tiling(32)))
    assert errors(tiled, whole, 32)[0] < 0.004


@torch.no_grad()
@pytest.mark.slow
def test_encode_of_another_vae():
    """Random weights, whose attention and far reach alone cost more than that: what statistics have to do with is gone."""
    vae, image, layout = diffusers_vae(None), picture("coffee", 240), TileLayout(30, 30, 19, OVERLAP, MARGIN)
    whole = WholePicture()
    shared = share_whole_picture(vae, whole, _share_attention)

    def encode(vae, part):
        return vae.encode(part * 2 - 1).latent_dist.mean

    def in_tiles_with_statistics_of(reduced):
        whole.collect(partial(encode, shared), reduced, (30, 30), 8)
        tiled = torch.zeros(1, 4, 30, 30)
        for tile in layout.tiles:
            tile.cut(tiled).add_(encode(shared, tile.cut(image, 8)) * layout.window(tile))
        return tiled

    measured = torch.zeros(1, 4, 30, 30)
    TiledCoder(vae, encode, _share_attention, 8, 1, lambda height, width: 1, Runtime()).run(lambda i: image, measured, 19)
    results = in_tiles_with_statistics_of(image), in_tiles_with_statistics_of(mosaic(image, 19 * 19, 8)), measured
    of_tiles, of_mosaic, of_measured = (errors(tiled, encode(vae, image), 4)[0] for tiled in results)
    assert of_measured < 1.1 * of_tiles and of_mosaic > 1.4 * of_tiles, (of_tiles, of_mosaic, of_measured)


@torch.no_grad()
def test_a_first_layers_statistics_are_the_pictures():
    """And those of the next are as near as what differs between mosaic and picture stays the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16))
    image, layout, whole = torch.randn(1, 4, 64, 80) * torch.linspace(0.1, 3, 80), TileLayout(64, 80, 24, 8), WholePicture()
    tiles = share_whole_picture(network, whole, lambda copied, block, whole: None)
    reduced = mosaic(image, 1024)

    def differences() -> list[float]:
        expected, found = image, image
        relative = []
        for layer, shared in zip(network, tiles, strict=True):
            expected, found = layer(expected), shared(found)
            if isinstance(layer, nn.GroupNorm):
                relative.append(((found - expected).norm() / expected.norm()).item())
        return relative

    whole.collect(tiles, reduced, (64, 80))
    before = differences()
    for tile in layout.tiles:
        whole.measure(tiles, tile.cut(image), [share_of(layout, tile, 0)])
    whole.correct(tiles, reduced, (64, 80))
    after = differences()
    assert before[0] > 0.005 and after[0] < 1e-4
    assert before[1] > 0.005 and after[1] < 0.3 * before[1]


@torch.no_grad()
def test_what_is_measured_twice_after_memory_ran_out_counts_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 3, padding=1), nn.GroupNorm(2, 4))
    image = torch.randn(2, 3, 56, 72)

    class Memory(Runtime):
        total = 0

        def __init__(self, most: int):
            self.most, self.done = most, 0

        def is_out_of_memory(self, error):
            return isinstance(error, MemoryError)

        def progress(self, total):
            self.total = total
            return lambda done: setattr(self, "done", self.done + done)

    def run(most: int) -> torch.Tensor:
        runtime = Memory(most)

        def call(network, part):
            middle = network[:2](part)  # statistics are taken here, and then there is no memory
            if len(part) > runtime.most:
                raise MemoryError
            return network[2:](middle)

        result = torch.zeros(2, 4, 56, 72)
        coder = TiledCoder(network, call, lambda copied, block, whole: None, 1, 1, lambda height, width: 4, runtime)
        coder.run(lambda i: image[i : i + 1], result, 32)
        assert runtime.done == runtime.total == 2 * 2 * len(TileLayout(56, 72, 32, OVERLAP).tiles)
        return result

    assert torch.allclose(run(4), run(1), atol=1e-5)
