"""The geometry of tiles and the blending of what was made of them, without any framework."""

from itertools import pairwise

import pytest
import torch
import toys

from sr.posterior import Posterior, draw_noise
from sr.tiled_noise import OVERLAP, WINDOW, NoiseCanvas
from sr.tiles import TileLayout

LAYOUTS = [(96, 96, 96, 24), (97, 200, 96, 24), (512, 509, 96, 24), (5, 300, 64, 8), (64, 65, 16, 8), (33, 33, 16, 0), (100, 10, 16, 15)]


def blend(layout: TileLayout, canvas: torch.Tensor, network, scale: int = 1) -> torch.Tensor:
    blended = torch.zeros(*canvas.shape[:-2], layout.height * scale, layout.width * scale)
    for tile in layout.tiles:
        tile.cut(blended, scale).add_(network(tile.cut(canvas)) * layout.window(tile, scale))
    return blended


@pytest.mark.parametrize(("height", "width", "side", "overlap"), LAYOUTS)
def test_layout(height, width, side, overlap):
    layout = TileLayout(height, width, side, overlap)
    assert {(t.height, t.width) for t in layout.tiles} == {(min(side, height), min(side, width))}
    for starts, length in ((layout.tops, height), (layout.lefts, width)):
        strides = [b - a for a, b in pairwise(starts)]
        assert starts[0] == 0 and starts[-1] + min(side, length) == length
        assert all(0 < stride <= side - overlap for stride in strides)
        assert not strides or max(strides) - min(strides) <= 1


@pytest.mark.parametrize("scale", [1, 2, 8])
@pytest.mark.parametrize(("height", "width", "side", "overlap"), LAYOUTS)
def test_windows_add_up_to_one(height, width, side, overlap, scale):
    layout = TileLayout(height, width, side, overlap)
    total = blend(layout, torch.ones(height, width), lambda part: torch.ones(part.shape[0] * scale, part.shape[1] * scale), scale)
    assert (total - 1).abs().max() < 1e-6


def test_windows_fall_to_neighbours_alone():
    layout = TileLayout(160, 96, 96, 32)
    first, second = (layout.window(tile) for tile in layout.tiles)
    assert first[:64].eq(1).all() and second[32:].eq(1).all()
    assert (first[64:].diff(dim=0) < 0).all() and first[-1].max() < 1e-3
    assert torch.equal(first, first[:, :1].expand(-1, 96))  # flat along the axis with one tile


def test_one_tile_is_the_canvas_bit_for_bit():
    canvas = torch.randn(2, 4, 40, 33)
    assert torch.equal(blend(TileLayout(40, 33, 40, 8), canvas, torch.sin), torch.sin(canvas))


def test_pointwise_networks_do_not_notice_tiles():
    canvas = torch.randn(1, 4, 70, 133)
    assert toys.relative_error(blend(TileLayout(70, 133, 32, 8), canvas, torch.sin), torch.sin(canvas)) < 1e-6


def test_overlap_must_be_smaller_than_the_tile():
    with pytest.raises(ValueError, match="overlap: found 16 with tiles of 16, expected from 0 to 15"):
        TileLayout(64, 64, 16, 16)


def test_blended_noise_is_the_blend_of_the_windows_draws():
    canvas = NoiseCanvas(1, 2 * WINDOW, WINDOW)
    predictions = [Posterior(torch.randn(1, 4, WINDOW, WINDOW), torch.randn(1, 4, WINDOW, WINDOW)) for _ in canvas.windows]
    noise, expected = draw_noise((1, 4, 2 * WINDOW, WINDOW), 3), torch.zeros(1, 4, 2 * WINDOW, WINDOW)
    for window, prediction in zip(canvas.windows, predictions, strict=True):
        canvas.add([window], prediction)
        tile = window[1]
        tile.cut(expected).add_(prediction.sample(tile.cut(noise)) * canvas.layout.window(tile))
    assert len(canvas.windows) == 3 and canvas.layout.tops[1] + OVERLAP <= WINDOW
    assert toys.relative_error(canvas.posterior.sample(noise), expected) < 1e-5
