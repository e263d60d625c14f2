"""A mosaic that stands for a larger picture: which cells it takes, how much each counts, and what is made equal to the picture."""

import math

import pytest
import torch

from fewstep_sr.tiling.mosaic import BLOCK, BORDER, EDGE, Mosaic, _spread, cells_of, mosaic, spread_step


def cells(length: int, width: int) -> torch.Tensor:
    """A picture (1, 1, length, width) in which each row is its number."""
    return torch.arange(float(length))[:, None].expand(length, width)[None, None]


def test_mosaic():
    assert torch.equal(mosaic(cells(40, 24), 40 * 24).picture, cells(40, 24))
    found = mosaic(cells(80, 60).repeat_interleave(8, -1).repeat_interleave(8, -2), 80 * 60 // 4, scale=8)
    assert found.picture.shape == (1, 1, 36 * 8, 30 * 8) and (len(found.rows), len(found.columns)) == (36, 30)
    assert sum(found.rows) == 80 and sum(found.columns) == 60
    blocks = found.picture[0, 0, ::8, 0].view(6, 6)
    step = blocks[0, 1] - blocks[0, 0]
    starts = torch.tensor([0, 15, 30, 44, 59, 74])  # 6 blocks of 6, of which the outer ones are at the borders
    assert torch.allclose(blocks.diff(dim=1), step) and torch.allclose(blocks[:, 0] - blocks[0, 0], starts * step, rtol=1e-5)
    assert found.rows[:6] == [1, 1, 1, 3.75, 3.75, 0] and found.rows[-6] == 0  # the border, what is next to it, an edge
    assert not any(found.rows[6 * i + j] for i in range(1, 5) for j in (0, 5))
    weights = found.weights(*found.picture.shape[-2:])
    mean = (found.picture * weights).sum()
    assert torch.allclose(mean, torch.tensor(39.5)) and torch.allclose(
        ((found.picture - mean) ** 2 * weights).sum().sqrt(), cells(80, 60).std(), rtol=1e-3
    )


@pytest.mark.parametrize(("height", "width", "most"), [(16, 4000, 4096), (60, 44, 256), (44, 60, 256), (96, 96, 3600)])
def test_mosaic_has_at_most_so_many_cells(height, width, most):
    found = mosaic(torch.randn(1, 1, height, width), most)
    assert 0.8 * most <= len(found.rows) * len(found.columns) <= most and (sum(found.rows), sum(found.columns)) == pytest.approx((height, width))


def test_sizes_of_its_blocks():
    assert (BLOCK, EDGE, BORDER) == (6, 1, 3)


def test_cells_of_one_axis():
    """Three blocks of six: the outermost three cells stand for themselves, the others for what is nearest, and where blocks meet for nothing."""
    indices, weights = _spread(30, 3)
    assert indices == [*range(6), *range(12, 18), *range(24, 30)]
    assert weights == [1, 1, 1, 3, 3, 0, 0, 3, 3, 3, 3, 0, 0, 3, 3, 1, 1, 1]
    assert _spread(31, 1)[0] == [*range(6), *range(25, 31)]  # two blocks at least
    assert _spread(31, 1)[1] == [1, 1, 1, 6.25, 6.25, 0, 0, 6.25, 6.25, 1, 1, 1]


@pytest.mark.parametrize(("length", "blocks"), [(18, 3), (17, 3), (12, 0), (5, 2)])
def test_an_axis_that_the_blocks_cover_is_whole(length, blocks):
    assert _spread(length, blocks) == (list(range(length)), [1.0] * length)


@pytest.mark.parametrize(("blocks", "whole"), [(3, False), (4, True)])
def test_as_soon_as_blocks_leave_a_cell_out_there_are_blocks(blocks, whole):
    assert (_spread(19, blocks)[0] == list(range(19))) is whole


def test_weights_of_elements():
    """Two elements for a cell along a side; together they weigh one."""
    found = Mosaic(torch.zeros(1, 1, 4, 6), [1.0, 3.0], [1.0, 0.0, 4.0])
    weights = found.weights(4, 6)
    expected = torch.tensor([[1.0], [3.0]]) * torch.tensor([1.0, 0.0, 4.0]) / 20 / 4
    assert torch.allclose(weights, expected.repeat_interleave(2, 0).repeat_interleave(2, 1)) and weights.dtype == torch.float32
    assert found.cells == 20 and not found.is_whole
    assert Mosaic.whole(torch.zeros(1, 1, 4, 6), 2).is_whole and Mosaic.whole(torch.zeros(1, 1, 4, 6), 2).cells == 6


def test_a_sample_of_a_mosaic():
    """The cells that count, in the picture's rows, and the logarithm of each one's part."""
    found = Mosaic(torch.zeros(1, 1, 3, 4), [1.0, 0.0, 3.0], [2.0, 0.0, 1.0, 5.0])
    indices, log_weights = found.sample(100)
    assert indices.tolist() == [0, 2, 3, 8, 10, 11]
    assert torch.allclose(log_weights.exp(), torch.tensor([2, 1, 5, 6, 3, 15]) / 32)
    indices, log_weights = found.sample(3)  # every second
    assert indices.tolist() == [0, 3, 10] and torch.allclose(log_weights.exp(), torch.tensor([2, 5, 3]) / 10)


@pytest.mark.parametrize(("cells", "most", "width", "step"), [(96, 96, 7, 1), (97, 96, 7, 2), (96, 48, 10, 3), (384, 128, 96, 5), (384, 96, 9, 4)])
def test_steps_leave_no_column_out(cells, most, width, step):
    """At least what leaves no more than are wanted, with no divisor in common with the width."""
    assert spread_step(cells, most, width) == step


def test_cells_of_a_picture():
    assert cells_of(torch.zeros(1, 3, 40, 24), 8) == (5, 3)


@pytest.mark.parametrize(("size", "expected"), [((40, 80), (24, 48)), ((80, 40), (48, 24)), ((12, 500), (12, 102)), ((500, 12), (102, 12))])
def test_the_longer_side_gets_what_the_shorter_leaves(size, expected):
    """Of 1250 cells: blocks in the picture's proportions, of a narrow strip all of the shorter side."""
    found = mosaic(torch.randn(1, 1, *size), 1250)
    assert tuple(found.picture.shape[-2:]) == (len(found.rows), len(found.columns)) == expected


def test_its_statistics_are_the_pictures():
    torch.manual_seed(0)
    picture = torch.randn(1, 3, 60, 44) * torch.tensor([1.0, 20, 0.1]).view(1, 3, 1, 1) + torch.tensor([0.0, 5, -3]).view(1, 3, 1, 1)
    found = mosaic(picture, 600)
    weights = found.weights(*found.picture.shape[-2:])
    mean = (found.picture * weights).sum((-2, -1))
    std = ((found.picture - mean[..., None, None]).square() * weights).sum((-2, -1)).sqrt()
    true_std, true_mean = torch.std_mean(picture, dim=(-2, -1))
    assert torch.allclose(mean, true_mean, rtol=1e-4, atol=1e-4) and torch.allclose(std, true_std, rtol=1e-4)


@pytest.mark.parametrize(("taken", "left_out", "factor"), [(1.0, 100.0, 2.0), (10.0, 0.0, 0.5)])
def test_what_blocks_missed_is_not_blown_up(taken, left_out, factor):
    """Along one axis blocks take cells 0 to 5 and 54 to 59; what lies between has another deviation, by more than the factor that is allowed."""
    signs = torch.tensor([1.0, -1.0]).repeat(30)
    picture = (signs * left_out)[:, None].expand(60, 6).clone()
    picture[:6], picture[-6:] = (signs[:6] * taken)[:, None], (signs[-6:] * taken)[:, None]
    found = mosaic(picture[None, None], 72)
    assert (len(found.rows), len(found.columns)) == (12, 6)
    assert math.isclose(found.picture[0, 0, 0, 0] - found.picture[0, 0, 1, 0], 2 * taken * factor, rel_tol=1e-5)


def test_a_picture_of_one_colour_stays_so():
    assert torch.allclose(mosaic(torch.full((1, 2, 60, 44), 0.3), 600).picture, torch.tensor(0.3))


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (90, 84), (70, 130)])
def test_a_sample_of_cells_leaves_no_column_out(size):
    indices, log_weights = Mosaic.whole(torch.zeros(1, 1, *size)).sample(2048)
    assert len(indices) <= 2048 and torch.allclose(log_weights.exp().sum(), torch.tensor(1.0))
    assert len((indices % size[1]).unique()) == size[1] and len((indices // size[1]).unique()) == size[0]
