"""The geometry of tiles and the blending of what was made of them, without any framework."""

import math
from itertools import pairwise

import pytest
import torch
import toys
from torch import nn

from fewstep_sr.networks.posterior import Posterior, draw_noise
from fewstep_sr.tiling.mosaic import Mosaic
from fewstep_sr.tiling.predictor import OVERLAP, WINDOW, NoiseCanvas
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.whole_picture import WholePicture, share_whole_picture

LAYOUTS = [(96, 96, 96, 24), (97, 200, 96, 24), (512, 509, 96, 24), (5, 300, 64, 8), (64, 65, 16, 8), (33, 33, 16, 0), (40, 10, 16, 15)]


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


@pytest.mark.parametrize("scale", [1, 2])
def test_ramp_by_hand(scale):
    """Over an overlap of 12 with margins of 2: nothing for two cells, a squared sine over eight, one for two."""
    layout = TileLayout(36, 8, 24, 12, 2)
    window = layout.window(layout.tiles[1], scale)[:, 0]
    ramp = torch.tensor([math.sin(math.pi / 2 * (i + 0.5) / (8 * scale)) ** 2 for i in range(8 * scale)])
    assert torch.allclose(window, torch.cat([torch.zeros(2 * scale), ramp, torch.ones(14 * scale)]), atol=1e-6)


def test_one_tile_is_the_canvas_bit_for_bit():
    canvas = torch.randn(2, 4, 40, 33)
    assert torch.equal(blend(TileLayout(40, 33, 40, 8), canvas, torch.sin), torch.sin(canvas))


def test_pointwise_networks_do_not_notice_tiles():
    canvas = torch.randn(1, 4, 70, 133)
    assert toys.relative_error(blend(TileLayout(70, 133, 32, 8), canvas, torch.sin), torch.sin(canvas)) < 1e-6


@pytest.mark.parametrize(("height", "width", "side", "overlap"), LAYOUTS)
def test_shares_cover_the_canvas_once(height, width, side, overlap):
    layout, covered = TileLayout(height, width, side, overlap), torch.zeros(height, width)
    for tile in layout.tiles:
        share = layout.share(tile)
        assert tile.top <= share.top and share.top + share.height <= tile.top + tile.height and share.height > 0
        assert tile.left <= share.left and share.left + share.width <= tile.left + tile.width and share.width > 0
        share.cut(covered).add_(1)
    assert covered.eq(1).all()


def test_overlap_must_be_smaller_than_the_tile():
    with pytest.raises(ValueError, match="overlap: found 16 with tiles of 16, expected from 0 to 15"):
        TileLayout(64, 64, 16, 16)


@pytest.mark.parametrize("margin", [4, 5, -1])
def test_margins_leave_some_of_the_overlap(margin):
    assert TileLayout(64, 64, 16, 8, 3).margin == 3
    with pytest.raises(ValueError, match=f"margin: found {margin} with an overlap of 8, expected less than half of it"):
        TileLayout(64, 64, 16, 8, margin)


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


def test_only_what_counts_makes_the_statistics():
    """A mosaic's inner edges may hold anything; what stands for more counts as often."""
    network, whole = nn.GroupNorm(2, 4), WholePicture()
    picture, rows, columns = torch.randn(1, 4, 6, 4), [1.0, 0.0, 2.0, 0.0, 1.0, 1.0], [1.0, 3.0, 0.0, 1.0]
    down, across = ([i for i, weight in enumerate(weights) if weight] for weights in (rows, columns))
    counted = picture[:, :, down][..., across]
    spoiled = torch.full_like(picture, 1e4)
    spoiled[:, :, torch.tensor(down)[:, None], across] = counted
    tiles = shared(network, whole)
    whole.collect(tiles, Mosaic(spoiled.repeat_interleave(3, -1).repeat_interleave(3, -2), rows, columns))
    repeated = picture[:, :, [0, 2, 2, 4, 5]][..., [0, 1, 1, 1, 3]]
    assert torch.allclose(tiles(repeated), network(repeated), atol=1e-4)


def shared(network, whole):
    return share_whole_picture(network, whole, lambda copied, block, whole: None)


def test_statistics_of_the_whole_picture():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 32, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Sequential(nn.Conv2d(32, 4, 1), nn.GroupNorm(2, 4))
    ).requires_grad_(False)
    for norm in (network[1], network[3][1]):
        norm.weight.copy_(torch.randn_like(norm.weight)), norm.bias.copy_(torch.randn_like(norm.bias))
    picture, whole = torch.randn(1, 4, 40, 56) * torch.linspace(0.1, 3, 56), WholePicture()
    tiles = shared(network, whole)
    whole.collect(tiles, Mosaic.whole(picture))
    layout = TileLayout(40, 56, 16, 4)
    assert toys.relative_error(blend(layout, picture, tiles), network(picture)) < 1e-5
    assert toys.relative_error(blend(layout, picture, network), network(picture)) > 0.02  # a tile's own statistics
    assert type(network[1]) is nn.GroupNorm and tiles[0] is network[0]


def test_attention_over_a_sample_stands_for_the_whole_picture():
    whole, block = WholePicture(), nn.Identity()
    q, k, v = torch.randn(3, 1, 1200, 32)
    v = v + k.sin()
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    half = Mosaic(torch.zeros(1, 1, 30, 20), [1.0] * 30, [2.0] * 20)
    whole.collect(lambda x: whole.attend(block, q[:, ::2], k[:, ::2], v[:, ::2]), half)
    tile = slice(200, 400)
    found = whole.attend(block, q[:, tile], k[:, tile], v[:, tile])
    alone = nn.functional.scaled_dot_product_attention(q[:, tile], k[:, tile], v[:, tile])
    assert toys.relative_error(found, expected[:, tile]) < 0.6 * toys.relative_error(alone, expected[:, tile])
