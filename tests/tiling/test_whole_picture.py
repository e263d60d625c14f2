"""A VAE in tiles is nearly as near to the untiled picture as with the whole picture's own statistics, at the borders too."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from conftest import ROOT
from diffusers import AutoencoderKL
from graphs import Graphs, fresh_compiler

from benchmarks.networks import diffusers_vae, photo, smooth
from fewstep_sr.tiling import whole_picture
from fewstep_sr.tiling.batching import Runtime
from fewstep_sr.tiling.mosaic import Mosaic, mosaic
from fewstep_sr.tiling.tiles import TileLayout
from fewstep_sr.tiling.vae import MARGIN, OVERLAP, TiledCoder, even_tile, share_of
from fewstep_sr.tiling.whole_picture import WholePicture, share_whole_picture
from pipelines.tiling import _share_attention

GROUP = 4
"""Tiles in a call, as in the nodes."""


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


def encode(vae, part: torch.Tensor) -> torch.Tensor:
    return vae.encode(part * 2 - 1).latent_dist.mean


def decode(vae, part: torch.Tensor) -> torch.Tensor:
    return vae.decode(part).sample


def in_tiles(vae, call: Callable, source: torch.Tensor, tile: int, group: int = GROUP) -> torch.Tensor:
    scale_in, scale_out = (8, 1) if call is encode else (1, 8)
    height, width = (side // scale_in * scale_out for side in source.shape[-2:])
    result = torch.zeros(1, 4 if call is encode else 3, height, width)
    TiledCoder(vae, call, _share_attention, scale_in, scale_out, lambda *size: group, Runtime()).run(lambda i: source, result, tile)
    return result


def with_statistics_of(vae, call: Callable, reduced: Mosaic, source: torch.Tensor, tile: int) -> torch.Tensor:
    """The tiles as they are normalised and attend by ``reduced``."""
    scale_in, scale_out = (8, 1) if call is encode else (1, 8)
    height, width = (side // scale_in for side in source.shape[-2:])
    layout, whole = TileLayout(height, width, even_tile(height, tile), OVERLAP, MARGIN), WholePicture()
    shared = share_whole_picture(vae, whole, _share_attention)
    whole.collect(lambda x: call(shared, x), reduced)
    result = torch.zeros(1, 4 if call is encode else 3, height * scale_out, width * scale_out)
    for part in layout.tiles:
        part.cut(result, scale_out).add_(call(shared, part.cut(source, scale_in)) * layout.window(part, scale_out))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "astronaut", "chelsea"])
@torch.no_grad()
def test_encode_of_the_miniature(miniature, name):
    image = picture(name, 768)
    error, at_borders = errors(in_tiles(miniature, encode, image, 32), encode(miniature, image), 4)
    assert error < 0.025 and at_borders < 0.025


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "astronaut", "chelsea"])
@torch.no_grad()
def test_decode_of_the_miniature(miniature, name):
    latents = encode(miniature, picture(name, 768))
    assert errors(in_tiles(miniature, decode, latents, 32), decode(miniature, latents), 32)[0] < 0.004


@pytest.mark.slow
@torch.no_grad()
def test_another_vae():
    """Random weights, whose attention and far reach alone cost more than statistics do: what these have to do with is gone after a second run."""
    vae, image = diffusers_vae(None), picture("coffee", 240)
    whole, exact = encode(vae, image), with_statistics_of(vae, encode, Mosaic.whole(image, 8), image, 19)
    once = with_statistics_of(vae, encode, mosaic(image, 32**2 // 2, 8), image, 19)
    found = in_tiles(vae, encode, image, 19, group=1)
    of_tiles, of_mosaic, of_corrected = (errors(tiled, whole, 4)[0] for tiled in (exact, once, found))
    assert of_corrected < 1.1 * of_tiles and of_mosaic > 1.4 * of_tiles, (of_tiles, of_mosaic, of_corrected)


def watched(network: nn.Module, image: torch.Tensor, layout: TileLayout, whole: WholePicture) -> None:
    for tile in layout.tiles:
        whole.watch(network, tile.cut(image), [share_of(layout, tile)])


@torch.no_grad()
def test_what_is_off_is_told_and_corrected():
    """A first layer's statistics are the picture's then, and those of the next as near as what differs between mosaic and picture stays the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16))
    image, layout, whole = torch.randn(1, 4, 64, 80) * torch.linspace(0.1, 3, 80), TileLayout(64, 80, 24, 8), WholePicture()
    tiles = share_whole_picture(network, whole, lambda copied, block, whole: None)
    reduced = mosaic(image, 256)

    def differences() -> list[float]:
        expected, found = image, image
        relative = []
        for layer, shared in zip(network, tiles, strict=True):
            expected, found = layer(expected), shared(found)
            if isinstance(layer, nn.GroupNorm):
                relative.append(((found - expected).norm() / expected.norm()).item())
        return relative

    whole.collect(tiles, reduced)
    assert whole.off() == 0  # nothing has been watched
    watched(tiles, image, layout, whole)
    before, off = differences(), whole.off()
    whole.correct(tiles, reduced)
    watched(tiles, image, layout, whole)
    after, still_off = differences(), whole.off()
    assert 0.3 * max(before) < off < 2 * max(before) and 0.3 * max(after) < still_off < 2 * max(after)  # of a deviation, as the error is
    assert before[0] > 0.005 and after[0] < 1e-4
    assert before[1] > 0.005 and after[1] < 0.3 * before[1]


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_sums_are_the_pictures(compiled):
    """Of half precision, far from zero, in batches of tiles that overlap, and whatever memory's end left behind."""
    norm, whole, layout = nn.GroupNorm(2, 4), WholePicture(), TileLayout(40, 56, 24, 8)
    image = (torch.randn(1, 4, 40, 56) * 40 + 300).to(torch.bfloat16)
    tiles = share_whole_picture(norm, whole, lambda copied, block, whole: None)
    whole.collect(tiles, Mosaic.whole(image))

    def fails(part):
        tiles(part)
        raise MemoryError

    with pytest.raises(MemoryError):
        whole.watch(fails, layout.tiles[0].cut(image), [share_of(layout, layout.tiles[0])], compiled=compiled)
    both = layout.tiles[:2]
    whole.watch(tiles, torch.cat([tile.cut(image) for tile in both]), [share_of(layout, tile) for tile in both], compiled=compiled)
    for tile in layout.tiles[2:]:
        whole.watch(tiles, tile.cut(image), [share_of(layout, tile)], compiled=compiled)
    assert 0 < whole.off() < 1e-3
    (found_mean, found_var), group = whole._true()[norm], image.float().view(2, -1)
    var, mean = torch.var_mean(group, dim=1, correction=0)
    assert torch.allclose(found_mean, mean, rtol=1e-5) and torch.allclose(found_var, var, rtol=1e-3)


def first_rows(height: int) -> list[tuple[slice, slice]]:
    return [(slice(0, height), slice(0, 6))]


@torch.no_grad()
def test_how_much_is_off():
    """Root mean square over the groups of the shift, in deviations, and of the deviations' logarithm, at the layer where it is most."""
    first, second, whole = nn.GroupNorm(2, 2, eps=1e-12), nn.GroupNorm(1, 2, eps=1e-12), WholePicture()
    layers = share_whole_picture(nn.Sequential(first, nn.Identity(), second), whole, lambda copied, block, whole: None)
    columns = torch.tensor([1.0, -1.0]).repeat(3).expand(2, 6, 6)
    mosaic_of = Mosaic.whole(torch.stack([columns[0], 2 * columns[1]])[None])
    whole.collect(layers, mosaic_of)
    whole.watch(layers, torch.stack([columns[0] + 3, 2 * math.e * columns[1]])[None], first_rows(6))
    # First: group 0 is shifted by 3 deviations, group 1 stretched by e. Second: the mean is 1.5, the variance (1 + e^2) / 2 + 1.5^2.
    var = (1 + math.e**2) / 2 + 2.25
    second_off = math.sqrt(2.25 / var + (math.log(var) / 2) ** 2)
    assert whole.off() == pytest.approx(max(math.sqrt((9 + 1) / 2), second_off), rel=1e-5) == pytest.approx(math.sqrt(5), rel=1e-5)


@torch.no_grad()
def test_off_where_there_is_next_to_no_variance():
    """A layer's eps stands below both deviations: a flat picture's mosaic is off by nothing much."""
    norm, whole = nn.GroupNorm(1, 1, eps=1.0), WholePicture()
    layer = share_whole_picture(norm, whole, lambda copied, block, whole: None)
    columns = torch.tensor([1.0, -1.0]).repeat(3).expand(1, 1, 6, 6)
    whole.collect(layer, Mosaic.whole(columns * 0))
    whole.watch(layer, columns * 2 + 3, first_rows(6))  # a variance of 4
    assert whole.off() == pytest.approx(math.sqrt(9 / 5 + (math.log(5) / 2) ** 2), rel=1e-5)


@torch.no_grad()
def test_correction():
    """What was watched, moved on as the mosaic's statistics have moved since: in deviations, each variance with the layer's eps."""
    norm, whole = nn.GroupNorm(1, 1, eps=1.0), WholePicture()
    layer = share_whole_picture(norm, whole, lambda copied, block, whole: None)
    columns = torch.tensor([1.0, -1.0]).repeat(3).expand(1, 1, 6, 6)
    whole.collect(layer, Mosaic.whole(columns + 2))  # mean 2, variance 1
    whole.watch(layer, columns * 3 + 4, first_rows(6))  # 4 and 9
    whole.correct(layer, Mosaic.whole(columns * 7**0.5 + 1))  # now 1 and 7: the deviation with eps has doubled
    mean, var = whole._statistics[norm]
    assert mean.item() == pytest.approx(1 + (4 - 2) * 2) and var.item() == pytest.approx(9 * 4)
    whole.collect(layer, Mosaic.whole(columns))  # another picture: nothing is corrected
    assert [value.item() for value in whole._statistics[norm]] == pytest.approx([0, 1])


@torch.no_grad()
def test_sums_by_hand():
    """Of two tiles, two elements for each cell along a side: each one's own share, and no more, whether there is one group or more."""
    for groups in (1, 2):
        norm, whole = nn.GroupNorm(groups, 2), WholePicture()
        layer = share_whole_picture(norm, whole, lambda copied, block, whole: None)
        whole.collect(layer, Mosaic.whole(torch.randn(1, 2, 6, 6)))
        tiles = torch.arange(2 * 2 * 8 * 12.0).view(2, 2, 8, 12)
        whole.watch(layer, tiles, [(slice(0, 3), slice(1, 6)), (slice(2, 4), slice(0, 5))], scale=2)
        parts = [tiles[0, :, 0:6, 2:12], tiles[1, :, 4:8, 0:10]]
        expected = sum(
            torch.stack([x.new_full((groups,), x[0].numel()), x.sum(1), x.square().sum(1)]) for x in (p.reshape(groups, -1) for p in parts)
        )
        assert torch.allclose(whole._sums[norm], expected)
        whole.watch(layer, tiles, [(slice(0, 3), slice(1, 6)), (slice(2, 4), slice(0, 5))], scale=2)
        assert torch.allclose(whole._sums[norm], 2 * expected)
        with pytest.raises(ValueError, match="zip"):
            whole.watch(layer, tiles, [(slice(0, 3), slice(1, 6))], scale=2)


def test_keys_are_about_as_many_as_an_untiled_middle_has():
    assert whole_picture.MAX_KEYS == 64**2  # of a picture of 512 x 512 pixels


def test_rounding_makes_no_negative_variance():
    """Of 4 elements of value 3, the sum of whose squares came out a little less than 36."""
    norm, whole = nn.GroupNorm(1, 1), WholePicture()
    whole._sums[norm] = torch.tensor([[4.0], [12.0], [35.99]])
    assert [value.item() for value in whole._true()[norm]] == [3, 0]


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_keys_of_the_tiles(monkeypatch, compiled):
    """Of each tile's share, in steps that leave no column out; after a correction they are what tiles attend to, each as much as any other."""
    monkeypatch.setattr(whole_picture, "MAX_KEYS", 6)
    whole, block = WholePicture(), nn.Identity()
    tokens = torch.randn(3, 2, 16, 5)  # q, k and v of two tiles of 4 x 4 cells
    picture = torch.randn(3, 1, 16, 5)
    network = lambda x: whole.attend(block, *(picture if whole._mosaic else tokens))  # noqa: E731
    mosaic_of = Mosaic(torch.zeros(1, 1, 4, 4), [1.0] * 4, [1.0, 2.0, 2.0, 1.0])
    whole.collect(network, mosaic_of)  # 24 cells: every fourth, and a share of 3 x 2 has a divisor in common with 4
    for _ in range(2):
        whole.watch(network, torch.zeros(2, 1, 4, 4), [(slice(0, 3), slice(2, 4)), (slice(1, 4), slice(0, 2))], compiled=compiled)
    whole.correct(network, mosaic_of)
    cells = torch.arange(32).view(2, 4, 4)
    chosen = torch.cat([cells[0, 0:3, 2:4].flatten()[::5], cells[1, 1:4, 0:2].flatten()[::5]]).repeat(2)
    k, v, log_weights = whole._keys[block]
    assert torch.equal(k[0], tokens[1].flatten(0, 1)[chosen]) and torch.equal(v[0], tokens[2].flatten(0, 1)[chosen])
    assert log_weights.shape == (8,) and torch.allclose(log_weights, torch.tensor(0.125).log())
    with pytest.raises(ValueError, match="zip"):
        whole.watch(network, torch.zeros(2, 1, 4, 4), [(slice(0, 3), slice(2, 4))])


@torch.no_grad()
def test_attention_by_hand():
    """The mosaic attends to its sample by weight; a tile to its own cells once and to the sample as often as there are cells outside it."""
    whole, block, q, k, v = WholePicture(), nn.Identity(), *torch.randn(3, 1, 4, 8)
    rows, columns = [1.0, 3.0], [1.0, 4.0]
    weights = torch.tensor([1.0, 4, 3, 12])
    sides = []
    whole.collect(lambda x: sides.append(whole.attend(block, q, k, v)), Mosaic(torch.zeros(1, 1, 2, 2), rows, columns))
    logits = q @ k.mT / 8**0.5
    assert torch.allclose(sides[0], (logits + weights.log()).softmax(-1) @ v, atol=1e-6)
    tile_q, tile_k, tile_v = torch.randn(3, 2, 6, 8)
    found = whole.attend(block, tile_q, tile_k, tile_v)
    logits = torch.cat([tile_q @ tile_k.mT, tile_q @ k.mT], -1) / 8**0.5
    counts = torch.cat([torch.ones(6), weights / 20 * (20 - 6)])
    assert torch.allclose(found, (logits + counts.log()).softmax(-1) @ torch.cat([tile_v, v.expand(2, -1, -1)], 1), atol=1e-6)


class TwoSizes(nn.Module):
    """Normalises at twice the size, then rows of cells, and attends: what a VAE's middle and its other levels do."""

    def __init__(self, whole: WholePicture):
        super().__init__()
        self.fine, self.flat, self.block, self.whole = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.Identity(), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = nn.functional.avg_pool2d(self.fine(nn.functional.interpolate(x, scale_factor=2.0)).sin(), 2)
        tokens = self.flat(fine.flatten(2)).mT
        return self.whole.attend(self.block, tokens, tokens.cos(), tokens)


@torch.no_grad()
def test_a_compiled_networks_tiles_are_watched_alike():
    """Sums by masks, keys by indices and the number of cells as a tensor: the same sums, keys and answers."""
    picture = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 16)
    tiles = torch.cat([picture[..., :8, :10], picture[..., 4:, 6:]])
    shares = [(slice(0, 6), slice(0, 8)), (slice(2, 8), slice(2, 10))]
    found = []
    for compiled in (False, True):
        whole = WholePicture()
        network = TwoSizes(whole)
        shared = share_whole_picture(network, whole, lambda copied, block, whole: None)
        whole.collect(shared, Mosaic.whole(picture))
        answers = [whole.watch(shared, tiles, shares, compiled=compiled) for _ in range(2)]
        keys = [torch.cat([part[i] for part in whole._tiles_keys[network.block]], 1) for i in (0, 1)]
        found.append([*answers, *keys, whole._sums[network.fine], whole._sums[network.flat]])
    for plain, masked in zip(*found, strict=True):
        assert plain.shape == masked.shape and torch.allclose(plain, masked, rtol=1e-4, atol=1e-4)
    assert found[0][4][0, 0] == 2 * 2 * 4 * (6 * 8 + 6 * 8)  # twice watched, two channels in a group, four elements of each cell
    assert found[0][5][0, 0] == 2 * 4 * (6 * 8 + 6 * 8)


@torch.no_grad()
def test_a_compiled_network_has_one_graph():
    """Whatever sizes pictures and tiles have, where their shares lie, and how many keys there are."""
    whole, graphs = WholePicture(), Graphs()
    shared = share_whole_picture(TwoSizes(whole), whole, lambda copied, block, whole: None)
    with fresh_compiler():
        compiled = torch.compile(shared, backend=graphs)
        for height, width in ((12, 16), (20, 14)):
            whole.collect(shared, Mosaic.whole(torch.randn(1, 4, height, width)))
            for rows, columns in (slice(0, 6), slice(0, 8)), (slice(2, 7), slice(3, 9)):
                tile = torch.randn(1, 4, rows.stop + 1, columns.stop + 2)
                for dim in (2, 3):
                    torch._dynamo.maybe_mark_dynamic(tile, dim)
                whole.watch(compiled, tile, [(rows, columns)], compiled=True)
    assert len(graphs) == 1


@torch.no_grad()
def test_masks_are_a_compiled_networks_alone():
    """Each tile's rows and columns of its share, where the network is; other networks' sums copy the shares out, which takes less memory."""
    whole, norm, masks = WholePicture(), nn.GroupNorm(2, 4, device="meta"), []
    layer = share_whole_picture(norm, whole, lambda copied, block, whole: None)
    network = lambda x: masks.append(whole._masks) or layer(x.to("meta"))  # noqa: E731
    assert whole._device.type == "cpu"  # before a reduced pass
    whole.collect(network, Mosaic.whole(torch.zeros(1, 4, 6, 6)))
    tiles, shares = torch.zeros(2, 4, 3, 6), [(slice(0, 2), slice(1, 6)), (slice(1, 3), slice(0, 5))]
    whole.watch(network, tiles, shares)
    whole.watch(network, tiles, shares, compiled=True)
    assert masks[:2] == [(), ()] and whole._masks == ()
    assert {tensor.device.type for tensor in (*masks[2], whole._picked, whole._open_cells)} == {"meta"}
    assert [mask.shape for mask in masks[2]] == [(2, 3), (2, 6)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cells", [4, 5])
@torch.no_grad()
def test_one_cell_outside(compiled, cells):
    """A tile of four cells of a picture of five: the sample stands for one. It does so, too, where the tile is the picture."""
    whole, block, picture, (q, k, v) = WholePicture(), nn.Identity(), torch.randn(3, 1, cells, 8), torch.randn(3, 1, 4, 8)
    whole.collect(lambda x: whole.attend(block, *picture), Mosaic.whole(torch.zeros(1, 1, 1, cells)))
    found = whole.watch(lambda x: whole.attend(block, q, k, v), torch.zeros(1, 1, 1, 4), [(slice(0, 1), slice(0, 4))], compiled=compiled)
    counts = torch.cat([torch.ones(4), torch.full((cells,), 1 / cells)])
    logits = q @ torch.cat([k, picture[1]], 1).mT / 8**0.5
    assert torch.allclose(found, (logits + counts.log()).softmax(-1) @ torch.cat([v, picture[2]], 1), atol=1e-6)


@torch.no_grad()
def test_a_tile_that_is_the_whole_picture_attends_to_it():
    whole, block, tokens = WholePicture(), nn.Identity(), torch.randn(1, 4, 8)
    whole.collect(lambda x: whole.attend(block, tokens, tokens, tokens), Mosaic.whole(torch.zeros(1, 1, 2, 2)))
    expected = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    assert torch.allclose(whole.attend(block, tokens, tokens, tokens), expected, atol=1e-6)


def test_networks_with_a_part_left_out_are_copied():
    network = nn.Sequential(nn.GroupNorm(2, 4))
    network.register_module("absent", None)
    assert share_whole_picture(network, WholePicture(), lambda copied, block, whole: None)._modules["absent"] is None


@torch.no_grad()
def test_affine_is_asked_of_the_layer():
    norm = nn.GroupNorm(2, 4, eps=0.5)
    norm.weight.copy_(torch.tensor([1.0, 2, -3, 0.5])), norm.bias.copy_(torch.tensor([0.0, -1, 4, 2]))
    weight, bias = whole_picture._affine(norm, torch.zeros(1, 4, 3, 3))
    assert torch.allclose(weight, norm.weight, atol=1e-6) and torch.allclose(bias, norm.bias, atol=1e-6)


class Counting(Runtime):
    def __init__(self):
        self.totals, self.done, self.calls = [], 0, 0

    def before_call(self):
        self.calls += 1

    def progress(self, total):
        self.totals.append(total)
        return lambda done: setattr(self, "done", self.done + done)


@pytest.mark.parametrize(("strays", "runs"), [(0.0, 1), (20.0, 2)])
@torch.no_grad()
def test_tiles_run_again_where_the_mosaic_was_off(strays, runs):
    """Four cells that no block of the mosaic holds change the picture's statistics."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
    along = torch.arange(96.0)
    image = torch.stack([(along / period).sin() * (along[:, None] / (period + 1)).cos() for period in (1, 2, 3, 4)])[None]
    image[:, :, 40:42, 40:42] += strays  # blocks of 6 begin at 0, 22, 45, 68 and 90
    runtime = Counting()
    result = torch.zeros(1, 8, 96, 96)
    coder = TiledCoder(network, lambda network, part: network(part), lambda copied, block, whole: None, 1, 1, lambda *size: 1, runtime)
    coder.run(lambda i: image, result, 32)
    assert runtime.totals == [16] * runs and runtime.done == 16 * runs
    assert errors(result, network(image), 8)[0] < 0.04


@torch.no_grad()
def test_tiles_of_a_picture_whose_statistics_are_its_own_run_once(monkeypatch):
    """Where the reduced pass is the picture itself, what tiles find is no better."""
    monkeypatch.setattr(WholePicture, "off", lambda self: 1.0)
    network, runtime = nn.GroupNorm(2, 4), Counting()
    image, result = torch.randn(1, 4, 32, 32), torch.zeros(1, 4, 32, 32)
    TiledCoder(network, lambda network, part: network(part), lambda copied, block, whole: None, 1, 1, lambda *size: 4, runtime).run(
        lambda i: image, result, 24
    )
    assert runtime.totals == [4] and torch.allclose(result, network(image), atol=1e-5)


@pytest.mark.parametrize("off", [0.0301, 0.03])
@torch.no_grad()
def test_tiles_run_three_times_at_most(monkeypatch, off):
    """As long as statistics are off by more than is allowed."""
    monkeypatch.setattr(WholePicture, "off", lambda self: off)
    network, runtime = nn.GroupNorm(2, 4), Counting()
    TiledCoder(network, lambda network, part: network(part), lambda copied, block, whole: None, 1, 1, lambda *size: 4, runtime).run(
        lambda i: torch.randn(1, 4, 64, 64), torch.zeros(1, 4, 64, 64), 36
    )
    assert runtime.totals == ([4, 4, 4] if off > 0.03 else [4])
    assert runtime.calls == 2 * len(runtime.totals)  # the user may stop before each: the reduced pass, and four tiles at once


@torch.no_grad()
def test_memory_that_runs_out_changes_nothing():
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
        assert runtime.done == runtime.total == 2 * len(TileLayout(56, 72, 32, OVERLAP).tiles)
        return result

    assert torch.allclose(run(4), run(1), atol=1e-5)
