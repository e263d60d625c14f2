"""The parts of the degradation by their formulas: blur and low-pass kernels, the filter, resizing, JPEG. Sources: see test_degradation.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from draws import ISO, KINDS, MODES, SHAPES, YES, Draws, below, bessel_j1, by_formula, filtered, grid, jpeg_by_pillow, noisy_picture, profile

from pipelines.training.degradation import Degradation, _blur_kernel, _cutoff, _factor, _filter, _resize, _sinc_kernel, jpeg


@pytest.mark.parametrize("side", [7, 21])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind", ISO)
def test_blur_kernels(kind, small, side):
    """Round and stretched, with a shape below 1 and above 1: both sides of each chance, and each value of the kernel by its formula."""
    low, high = SHAPES[kind]
    end = (low, 1.0) if small else (1.0, high)
    shape = 1.0 if kind == "gauss" else end[0] + 0.7 * (end[1] - end[0])
    which = ("random", below(0.5) if small else 0.5), ("uniform", *end, shape)
    sigma = (0.2, 3.0)

    draws = Draws((*KINDS, kind), ("uniform", *sigma, 1.7), ("random", below(ISO[kind])), *which)
    kernel = _blur_kernel(draws, side, sigma)
    assert draws.done() and kernel.dtype == torch.float32
    np.testing.assert_allclose(kernel, by_formula(side, (1.7, 1.7), 0, profile(kind, shape)), atol=1e-6)

    stretched = (
        ("uniform", *sigma, 2.5),
        ("random", 0.45 / 0.7 if kind == "gauss" else 0.8),
        ("uniform", *sigma, 0.8),
        ("uniform", -math.pi, math.pi, 0.6),
    )
    draws = Draws((*KINDS, kind), *stretched, *which)
    kernel = _blur_kernel(draws, side, sigma)
    assert draws.done() and abs(kernel.sum().item() - 1) < 1e-6
    np.testing.assert_allclose(kernel, by_formula(side, (2.5, 0.8), 0.6, profile(kind, shape)), atol=1e-6)


@pytest.mark.parametrize("side, cutoff", [(7, math.pi / 3), (13, 1.0), (21, math.pi)])
def test_sinc_kernels(side, cutoff):
    """The Fourier transform of a disc of radius ``cutoff``: cutoff J1(cutoff r) / (2 pi r), and cutoff^2 / (4 pi) in the middle."""
    x, y = grid(side)
    r = np.hypot(x, y)
    r[side // 2, side // 2] = 1
    expected = cutoff * bessel_j1(cutoff * r) / (2 * math.pi * r)
    expected[side // 2, side // 2] = cutoff**2 / (4 * math.pi)
    kernel = _sinc_kernel(side, cutoff)
    assert kernel.dtype == torch.float32
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize("side, low", [(7, math.pi / 3), (11, math.pi / 3), (13, math.pi / 5), (21, math.pi / 5)])
def test_cutoffs(side, low):
    draws = Draws(("uniform", low, math.pi, 1.5))
    assert _cutoff(draws, side) == 1.5 and draws.done()


@pytest.mark.parametrize("half", [3, 10])
def test_kernel_of_a_round(half):
    """Sides are 2 v + 1 with v from 3 to 10; below sinc_chance it is a low-pass."""
    side = 2 * half + 1
    draws = Draws(("integers", 3, 11, half), ("random", below(0.1)), ("uniform", math.pi / (3 if half == 3 else 5), math.pi, 2.0))
    assert torch.equal(Degradation()._kernel(draws, (0.2, 1.5)), _sinc_kernel(side, 2.0)) and draws.done()
    draws = Draws(
        ("integers", 3, 11, half),
        ("random", 0.1),
        (*KINDS, "gauss"),
        ("uniform", 0.2, 1.5, 1.2),
        ("random", YES),
        ("random", YES),
        ("uniform", 1.0, 1.0, 1.0),
    )
    kernel = Degradation()._kernel(draws, (0.2, 1.5))
    assert draws.done()
    np.testing.assert_allclose(kernel, by_formula(side, (1.2, 1.2), 0, profile("gauss", 1)), atol=1e-6)


def test_final_kernel():
    draws = Draws(("integers", 3, 11, 4), ("uniform", math.pi / 3, math.pi, 2.0), ("random", below(0.8)))
    assert torch.equal(Degradation()._final_kernel(draws), _sinc_kernel(9, 2.0)) and draws.done()
    draws = Draws(("integers", 3, 11, 4), ("uniform", math.pi / 3, math.pi, 2.0), ("random", 0.8))
    assert torch.equal(Degradation()._final_kernel(draws), torch.ones(1, 1)) and draws.done()


@pytest.mark.parametrize("size, mode", [((24, 40), "reflect"), ((4, 9), "reflect"), ((3, 9), "edge"), ((9, 3), "edge"), ((2, 2), "edge")])
def test_filter_reflects_the_edges(size, mode):
    """What is no wider than the margin of 3 can't be reflected: its border goes on instead."""
    kernel = np.random.default_rng(0).random((7, 7)).astype(np.float32)  # no symmetry hides a flip
    x = noisy_picture(*size)
    torch.testing.assert_close(_filter(x, torch.from_numpy(kernel)), filtered(x, kernel, mode))


def test_a_blur_has_its_standard_deviation():
    """A point becomes a spot whose second moment is sigma^2."""
    draws = Draws((*KINDS, "gauss"), ("uniform", 0.2, 3.0, 1.5), ("random", YES), ("random", YES), ("uniform", 1.0, 1.0, 1.0))
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    spot = _filter(point, _blur_kernel(draws, 21, (0.2, 3.0)))[0, 0].numpy()
    x, y = grid(41)
    assert spot.sum() == pytest.approx(1, abs=1e-5)
    assert [(spot * axis * axis).sum() for axis in (x, y)] == pytest.approx([1.5**2] * 2, rel=1e-3)


@pytest.mark.parametrize("order, low, high", [(Degradation().first, 0.15, 1.5), (Degradation().second, 0.3, 1.2)])
def test_resize_factors(order, low, high):
    chances = tuple(order.up_down_keep)
    draws = Draws(("choice", 3, chances, 0), ("uniform", 1, high, 1.1), ("uniform", low, 1, 0.4))
    assert _factor(draws, order) == 1.1
    draws = Draws(("choice", 3, chances, 1), ("uniform", 1, high, 1.1), ("uniform", low, 1, 0.4))
    assert _factor(draws, order) == 0.4
    draws = Draws(("choice", 3, chances, 2), ("uniform", 1, high, 1.1), ("uniform", low, 1, 0.4))
    assert _factor(draws, order) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(10, 17), (30, 50), (24, 17), (24, 40)])
def test_resize(mode, size):
    x, draws = noisy_picture(), Draws(("choice", MODES, mode))
    corners = {} if mode == "area" else {"align_corners": False}
    torch.testing.assert_close(_resize(x, size, draws), F.interpolate(x, size, mode=mode, **corners))
    assert draws.done()


@pytest.mark.parametrize("quality, whole", [(30.4, 30), (59.6, 60), (95.0, 95)])
def test_jpeg_is_the_files(quality, whole):
    x = 1.2 * noisy_picture() - 0.1  # it is cut to [0, 1], not wrapped
    assert torch.equal(jpeg(x, quality), jpeg_by_pillow(x, whole))


def test_jpeg_leaves_blocks_of_eight():
    """On a ramp, what the compression adds is steps between blocks: differences across their borders are larger than within."""
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64).contiguous()
    error = (jpeg(ramp, 30) - ramp)[0, 0].diff(dim=1).abs().mean(0)
    across = error[7::8].mean()
    within = torch.stack([error[i] for i in range(63) if i % 8 != 7]).mean()
    assert across > 2 * within
