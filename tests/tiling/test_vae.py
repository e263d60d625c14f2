"""The loop over a VAE's pictures and tiles with small networks of its shape: what is called with what, and what comes of it."""

import dataclasses
import logging

import pytest
import torch
from coder import Coder, Mean, SharedMean
from memory import Memory
from torch import nn

from fewstep_sr.tiling import vae
from fewstep_sr.tiling.batching import Runtime
from fewstep_sr.tiling.mosaic import Mosaic, mosaic
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.vae import TiledCoder, even_tile


def test_limits_in_latent_pixels():
    assert (vae.OVERLAP, vae.MARGIN, vae.MIN_TILE, vae.MIN_MOSAIC, vae.MAX_MOSAIC) == (8, 2, 16, 1024, 16384)
    assert (vae.TOLERANCE, vae.MAX_RUNS) == (0.03, 3)


@pytest.mark.parametrize("room", [True, False])
def test_a_canvas_lies_on_the_device_where_it_fits(room):
    """Asked with the canvas's bytes."""
    asked = []

    class Room(Runtime):
        def has_room(self, size, device):
            asked.append((size, device.type))
            return room

    coder = dataclasses.replace(Coder(runtime=Room()).coder, device=torch.device("meta"))
    assert coder._place(torch.zeros(1, 3, 8, 8)).device.type == ("meta" if room else "cpu") and asked == [(3 * 64 * 4, "meta")]


def test_canvases_lie_on_the_cpu_where_nobody_says_more():
    assert Runtime().has_room(1, torch.device("cpu")) and not Runtime().has_room(1, torch.device("cuda"))


@pytest.mark.parametrize(("length", "tile", "expected"), [
    (64, 64, 64), (63, 64, 63), (5, 64, 16), (65, 64, 37), (120, 64, 64), (121, 64, 46), (100, 32, 31), (17, 16, 16), (1000, 128, 119)
])  # fmt: skip
def test_even_tile(length, tile, expected):
    """The smallest that gives no more tiles than the one asked for: (length + 8 (n - 1)) / n of n tiles."""
    assert even_tile(length, tile) == expected
    count = len(TileLayout(length, 1, tile, vae.OVERLAP).tops)
    assert len(TileLayout(length, 1, expected, vae.OVERLAP).tops) == count
    assert expected == vae.MIN_TILE or len(TileLayout(length, 1, expected - 1, vae.OVERLAP).tops) > count


@pytest.mark.parametrize(("scale_in", "scale_out"), [(8, 1), (1, 8), (1, 1)])
def test_pictures_that_are_whole_go_together(scale_in, scale_out):
    coder, pictures = Coder(scale_in, scale_out, fits=2), torch.randn(5, 3, 20 * scale_in, 24 * scale_in)
    expected = pictures[..., ::scale_in, ::scale_in].repeat_interleave(scale_out, -1).repeat_interleave(scale_out, -2)
    assert torch.equal(coder.run(pictures, 24), expected)
    assert coder.calls == [(True, (n, 3, 20 * scale_in, 24 * scale_in)) for n in (2, 2, 1)] and coder.asked == [(20, 24)]
    assert coder.pictures == [0, 1, 2, 3, 4] and coder.runtime.total == 5 and coder.runtime.told == [2, 2, 1] and coder.runtime.freed == 0


def test_where_nothing_fits_pictures_go_one_by_one():
    coder = Coder(fits=0)
    coder.run(torch.randn(2, 3, 20, 24), 24)
    assert coder.calls == [(True, (1, 3, 20, 24))] * 2


@pytest.mark.parametrize(("scale_in", "scale_out"), [(2, 1), (1, 2)])
def test_tiles_of_pictures(scale_in, scale_out):
    """For each picture a reduced pass, then its tiles in groups, through a copy of the network."""
    coder, pictures = Coder(scale_in, scale_out, fits=2), torch.randn(2, 3, 60 * scale_in, 50 * scale_in)
    expected = pictures[..., ::scale_in, ::scale_in].repeat_interleave(scale_out, -1).repeat_interleave(scale_out, -2)
    assert torch.allclose(coder.run(pictures, 34), expected, atol=1e-6)
    reduced = tuple(mosaic(pictures[:1], 60 * 50 // 2, scale_in).picture.shape)
    tiles = [(False, (2, 3, 34 * scale_in, 34 * scale_in))] * 2
    assert coder.calls == [(False, reduced), *tiles] * 2 and coder.asked == [(34, 34)]
    assert coder.pictures == [0, 1] and coder.runtime.total == 2 * 4 and coder.runtime.told == [2] * 4
    assert coder.runtime.calls == 2 * (1 + 2)  # the user may stop before each


@pytest.mark.parametrize("compiled", [False, True])
def test_tiles_know_whether_they_are_compiled(compiled):
    """They go one at a time through the compiled call then, with masks, and the reduced pass through the other; without, in groups and without masks."""
    coder, masks, calls = Coder(network=nn.Sequential(Mean()), fits=2), [], []

    class Attention(SharedMean):
        def forward(self, x):
            masks.append(len(self.whole._masks))
            return super().forward(x)

    def share(copied, block, whole):
        copied._modules.update({name: Attention(child, whole) for name, child in block._modules.items()})

    def compiled_call(network, part):
        calls.append(tuple(part.shape))
        return network(part.double())

    TiledCoder(coder.network, coder.call, share, 1, 1, coder.coder.fitting, coder.runtime, compiled=compiled_call if compiled else None).run(
        lambda i: torch.zeros(1, 1, 60, 50), torch.zeros(1, 1, 60, 50), 34
    )
    assert masks == ([0, 2, 2, 2, 2] if compiled else [0, 0, 0])
    assert calls == ([(1, 1, 34, 34)] * 4 if compiled else []) and len(coder.calls) == (1 if compiled else 3)


@pytest.mark.parametrize(("height", "width", "tile", "fits", "cells"), [
    (40, 40, 24, 9, 32**2),  # at least
    (90, 80, 88, 9, 80**2),  # one tile's
    (160, 120, 40, 9, 160 * 120 // 2),  # a half
    (160, 120, 40, 2, 2 * 39**2),  # what fits
    (400, 300, 64, 9, 128**2),  # at most
])  # fmt: skip
def test_size_of_the_reduced_pass(height, width, tile, fits, cells):
    coder, picture = Coder(fits=fits), torch.randn(1, 1, height, width)
    coder.run(picture, tile)
    assert coder.calls[0] == (False, tuple(mosaic(picture, cells).picture.shape))


def test_attention_in_tiles_is_to_the_whole_picture():
    """Where every cell is attended alike, a tile gets the whole picture's mean: what is outside it counts by its number, which the sample stands for."""
    picture = torch.linspace(-1, 1, 48)[:, None].expand(48, 40)[None, None].contiguous() + torch.linspace(0, 3, 40)
    assert torch.allclose(Coder(network=nn.Sequential(Mean())).run(picture, 48), picture.mean().expand_as(picture))
    coder = Coder(network=nn.Sequential(Mean()), fits=4)
    found = coder.run(picture, 28)
    tiles = TileLayout(48, 40, 28, vae.OVERLAP, vae.MARGIN)
    sample = picture.mean().item()
    expected = torch.zeros_like(picture)
    for tile in tiles.tiles:
        inside = tile.cut(picture)
        tile.cut(expected).add_((inside.sum() + (48 * 40 - inside.numel()) * sample) / (48 * 40) * tiles.window(tile))
    assert torch.allclose(found, expected, atol=1e-5)


def test_smaller_tiles_where_memory_runs_out(caplog):
    """Half as large, from the size that a tile really has, one at a time, from the beginning; at the smallest it ends."""
    picture, runtime = torch.randn(1, 1, 60 * 2, 44 * 2), Memory()
    coder = Coder(scale_in=2, fits=9, most=2 * 2 * 30 * 30, runtime=runtime)
    with caplog.at_level(logging.WARNING):
        found = coder.run(picture, 1000)
    assert torch.allclose(found, picture[..., ::2, ::2], atol=1e-6)
    assert "tiles of 60 pixels" in caplog.text and runtime.freed == 1
    assert coder.calls[0] == (True, (1, 1, 120, 88)) and {shape[0] for _, shape in coder.calls} == {1} and coder.asked == [(60, 44)]
    coder = Coder(most=16 * 16 - 1)
    with pytest.raises(MemoryError):
        coder.run(picture, 64)
    assert coder.runtime.freed == 2 and coder.calls[-1] == (False, (1, 1, 16, 16))
    coder = Coder(most=0, runtime=Runtime())
    with pytest.raises(MemoryError):  # no lack of memory to this runtime
        coder.run(picture, 64)
    assert len(coder.calls) == 1


@pytest.mark.parametrize("tile", [34, 64])
def test_parts_are_prepared(tile):
    """Tiles, their reduced pass and whole pictures alike."""
    coder, picture = Coder(), torch.randn(1, 1, 60, 50)
    coder.coder = dataclasses.replace(coder.coder, prepare=lambda part: 2 * part)
    assert torch.allclose(coder.run(picture, tile), 2 * picture, atol=1e-5) and len(coder.calls) == (5 if tile == 34 else 1)


def test_the_reduced_pass_is_prepared():
    """What tiles attend to outside of themselves comes from it."""
    picture = torch.linspace(-1, 1, 48)[:, None].expand(48, 40)[None, None].contiguous() + torch.linspace(0, 3, 40)
    found = Coder(network=nn.Sequential(Mean())).run(picture, 28)
    coder = Coder(network=nn.Sequential(Mean()))
    coder.coder = dataclasses.replace(coder.coder, prepare=lambda part: 2 * part)
    assert torch.allclose(coder.run(picture, 28), 2 * found, atol=1e-5)


def test_what_was_done_before_memory_ran_out_is_done_again(monkeypatch):
    """The third of four tiles does not fit, although the second did; nothing of the first two is left in the result."""
    picture, call = torch.randn(1, 1, 60, 50), Coder.call

    def third(self, network, part):
        if len(self.calls) == 3:  # the reduced pass, two tiles
            self.calls.append((False, tuple(part.shape)))
            raise MemoryError
        return call(self, network, part)

    monkeypatch.setattr(Coder, "call", third)
    coder = Coder()
    assert torch.allclose(coder.run(picture, 34), picture, atol=1e-6)
    assert coder.calls[1:4] == [(False, (1, 1, 34, 34))] * 3 and coder.runtime.freed == 1


def test_every_tile_has_its_answer(monkeypatch):
    call = Coder.call
    monkeypatch.setattr(Coder, "call", lambda self, network, part: call(self, network, part)[: len(part) - (len(self.calls) > 1)])
    with pytest.raises(ValueError, match="zip"):
        Coder(fits=2).run(torch.randn(1, 1, 60, 50), 34)


def test_a_result_that_is_blended_elsewhere_comes_back(monkeypatch):
    monkeypatch.setattr(TiledCoder, "_place", lambda self, canvas: canvas.clone())
    picture = torch.randn(2, 1, 60, 50)
    assert torch.allclose(Coder().run(picture, 34), picture, atol=1e-6)


@pytest.mark.parametrize(
    "record",
    [Coder().coder, Mosaic.whole(torch.zeros(1, 1, 2, 2)), TileLayout(8, 8, 8, 0), TileLayout(8, 8, 8, 0).tiles[0]],
    ids=lambda record: type(record).__name__,
)
def test_records_do_not_change(record):
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)
