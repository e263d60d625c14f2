"""The degradation against Real-ESRGAN's published configuration and against its formulas, written here once more, plainly.

Sources, all of github.com/xinntao/Real-ESRGAN and xinntao/BasicSR:
options/train_realesrnet_x4plus.yml (ranges and chances), realesrgan/data/realesrgan_dataset.py (kernel sizes, cutoffs),
realesrgan/models/realesrnet_model.py (order of the parts), basicsr/data/degradations.py (kernels, noise).
"""

import math
from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from draws import KINDS, MODES, NO, YES, Draws, below, by_formula, filtered, jpeg_by_pillow, noisy_picture, profile

from pipelines.training import degradation as module
from pipelines.training.degradation import Degradation, Mild, Order, _sinc_kernel


def test_ranges_and_chances_are_the_published_ones():
    """options/train_realesrnet_x4plus.yml, under the names that it has there."""
    published = {
        "scale": 4,
        "resize_prob": [0.2, 0.7, 0.1],
        "resize_range": [0.15, 1.5],
        "gaussian_noise_prob": 0.5,
        "noise_range": [1, 30],
        "poisson_scale_range": [0.05, 3],
        "gray_noise_prob": 0.4,
        "jpeg_range": [30, 95],
        "second_blur_prob": 0.8,
        "resize_prob2": [0.3, 0.4, 0.3],
        "resize_range2": [0.3, 1.2],
        "gaussian_noise_prob2": 0.5,
        "noise_range2": [1, 25],
        "poisson_scale_range2": [0.05, 2.5],
        "gray_noise_prob2": 0.4,
        "jpeg_range2": [30, 95],
        "sinc_prob": 0.1,
        "blur_sigma": [0.2, 3],
        "sinc_prob2": 0.1,
        "blur_sigma2": [0.2, 1.5],
        "final_sinc_prob": 0.8,
    }
    ours = Degradation()
    found = {
        "scale": ours.scale,
        "gaussian_noise_prob": ours.gaussian_chance,
        "gaussian_noise_prob2": ours.gaussian_chance,
        "gray_noise_prob": ours.gray_chance,
        "gray_noise_prob2": ours.gray_chance,
        "second_blur_prob": ours.second.blur_chance,
        "sinc_prob": ours.sinc_chance,
        "sinc_prob2": ours.sinc_chance,
        "final_sinc_prob": ours.final_sinc_chance,
    }
    for order, end in ((ours.first, ""), (ours.second, "2")):
        found |= {
            f"resize_prob{end}": list(order.up_down_keep),
            f"resize_range{end}": list(order.resize),
            f"noise_range{end}": list(order.gaussian_noise),
            f"poisson_scale_range{end}": list(order.poisson_noise),
            f"jpeg_range{end}": list(order.jpeg_quality),
            f"blur_sigma{end}": list(order.sigma),
        }
    assert found == published
    assert ours.first.blur_chance == 1  # the first blur has no chance of its own there


COLOUR, GRAY = ("random", 0.4), ("random", below(0.4))


@pytest.mark.parametrize("order, low, high", [(Degradation().first, 1, 30), (Degradation().second, 1, 25)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_noise(order, low, high, channels):
    """Standard normal times a standard deviation in eight-bit steps; below gray_chance the same in all channels."""
    x = torch.full((1, 3, 60, 80), 0.5)
    shape = (1, channels, 60, 80)
    draws = Draws(
        GRAY if channels == 1 else COLOUR, ("random", below(0.5)), ("standard_normal", shape, np.float32, None), ("uniform", low, high, 12.0)
    )
    noise = Degradation()._noise(x, draws, order) - x
    assert draws.done()
    torch.testing.assert_close(noise, torch.from_numpy(draws.arrays[0] * 12 / 255).expand(1, 3, 60, 80))
    assert noise.std().item() == pytest.approx(12 / 255, rel=0.05)
    assert torch.equal(noise[:, :1], noise[:, 1:2]) == (channels == 1)


@pytest.mark.parametrize("order, low, high", [(Degradation().first, 0.05, 3), (Degradation().second, 0.05, 2.5)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("values, levels", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (200, 256)])
def test_poisson_noise(order, low, high, channels, values, levels):
    """Counts of ``levels`` times the eight-bit picture (gray: its luma), levels the power of two from the number of its values on, less the picture, times a strength."""
    steps = torch.arange(40 * 60) % values
    x = ((steps + 20.3) / 255).view(1, 1, 40, 60).expand(1, 3, 40, 60).clone()
    if channels == 1:
        x += torch.tensor([0.05, -0.02, 0.0]).view(1, 3, 1, 1)  # luma is not the mean
    source = x if channels == 3 else (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    source = (source * 255).round() / 255
    assert len(source.unique()) == values
    draws = Draws(GRAY if channels == 1 else COLOUR, ("random", 0.5), ("poisson", None), ("uniform", low, high, 0.3))
    found = Degradation()._noise(x, draws, order)
    assert draws.done()
    np.testing.assert_allclose(draws.arrays[0], source.numpy() * levels, rtol=1e-4)
    counts = torch.from_numpy(np.round(draws.arrays[0] + 0.5))
    torch.testing.assert_close(found, (x + 0.3 * (counts / levels - source)).clamp(0, 1), atol=1e-5, rtol=0)


def test_poisson_noise_is_as_strong_as_light():
    """Of brightness v at L levels its variance is v / L, times the strength's square: brighter parts have more."""
    x = torch.full((1, 3, 100, 200), 0.2)
    x[..., 100:] = 0.6
    x[..., 0, :64] = torch.arange(64) / 255  # so that there are 65 or 66 values: 128 levels
    real = np.random.default_rng(0)
    draws = SimpleNamespace(random=lambda: 0.9, poisson=real.poisson, uniform=lambda low, high: 0.5)
    noise = (Degradation()._noise(x, draws, Order()) - x)[:, :, 1:]
    for part, value in ((noise[..., :100], 0.2), (noise[..., 100:], 0.6)):
        assert part.std().item() == pytest.approx(0.5 * math.sqrt(value / 128), rel=0.03) and abs(part.mean().item()) < 2e-3


@pytest.mark.parametrize("gaussian", [True, False])
def test_noise_is_cut_to_the_range(gaussian):
    """Resizing goes beyond the range, and so does noise; there are no fewer photons than none, and none beyond white."""
    x = torch.tensor([-0.5, 0.0, 1.0, 1.5]).repeat(1, 3, 20, 20)
    real, rates = np.random.default_rng(0), [np.array([0, 2])]
    draws = SimpleNamespace(random=lambda: 0.45 if gaussian else 0.9, uniform=lambda low, high: high, standard_normal=real.standard_normal)
    draws.poisson = lambda asked: rates.append(asked) or real.poisson(asked)
    found = Degradation()._noise(x, draws, Order())
    assert found.min() == 0 and found.max() == 1
    assert set(rates[-1].flatten()) == {0, 2}  # black and white are two levels


def blur(sigma_range: tuple[float, float], sigma: float, half: int):
    """A round Gaussian blur's draws, after the chance that there is one."""
    kernel = ("integers", 3, 11, half), ("random", NO), (*KINDS, "gauss"), ("uniform", *sigma_range, sigma)
    return *kernel, ("random", YES), ("random", YES), ("uniform", 1.0, 1.0, 1.0)


def whole(picture: torch.Tensor, first: list, second: list, final: list) -> tuple[torch.Tensor, Draws]:
    """What these draws make of a picture, and the draws."""
    draws, seeds = Draws(*first, *second, *final), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.np.random, "default_rng", lambda seed: seeds.append(seed) or draws)
        result = Degradation()(picture[0], (3, 5))
    assert seeds == [(3, 5)] and draws.done()
    return result, draws


def gaussian_blur(sigma: float, side: int) -> np.ndarray:
    return by_formula(side, (sigma, sigma), 0, profile("gauss", 1))


def area(x, size):
    return F.interpolate(x, size, mode="area")


FIRST_NOISE = COLOUR, ("random", YES)
UP, DOWN, KEEP = 0, 1, 2


def sizes(chances, kind, high, up, low, down):
    """A factor's draws: both are drawn, one is taken."""
    return ("choice", 3, chances, kind), ("uniform", 1, high, up), ("uniform", low, 1, down)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("blurred", [True, False])
@pytest.mark.parametrize("ringing", [True, False])
def test_parts_in_their_order(last, blurred, ringing):
    """Blur, resize, noise, JPEG; blur, resize, noise; then either resize, sinc and JPEG or JPEG, resize and sinc. Each part's result goes into the next."""
    first = [
        ("random", NO),
        *blur((0.2, 3.0), 0.9, 4),
        *sizes((0.2, 0.7, 0.1), DOWN, 1.5, 1.3, 0.15, 0.77),
        ("choice", MODES, "bilinear"),
        *FIRST_NOISE,
        ("standard_normal", (1, 3, 36, 61), np.float32, None),
        ("uniform", 1, 30, 9.0),
        ("uniform", 30, 95, 44.0),
    ]
    second = [
        ("random", below(0.8) if blurred else 0.8),
        *(blur((0.2, 1.5), 0.6, 3) if blurred else ()),
        *sizes((0.3, 0.4, 0.3), UP, 1.2, 1.15, 0.3, 0.5),
        ("choice", MODES, "bicubic"),
        GRAY,
        ("random", YES),
        ("standard_normal", (1, 1, 13, 23), np.float32, None),
        ("uniform", 1, 25, 5.0),
    ]
    final = [
        ("integers", 3, 11, 3),
        ("uniform", math.pi / 3, math.pi, 2.0),
        ("random", below(0.8) if ringing else 0.8),
        ("uniform", 30, 95, 71.0),
        ("random", below(0.5) if last else 0.5),
        ("choice", MODES, "area"),
    ]
    picture = noisy_picture(48, 80)
    found, draws = whole(picture, first, second, final)

    x = filtered(picture, gaussian_blur(0.9, 9))
    x = F.interpolate(x, (36, 61), mode="bilinear", align_corners=False)
    x = (x + torch.from_numpy(draws.arrays[0]) * 9 / 255).clamp(0, 1)
    x = jpeg_by_pillow(x, 44)
    if blurred:
        x = filtered(x, gaussian_blur(0.6, 7))
    x = F.interpolate(x, (13, 23), mode="bicubic", align_corners=False)
    x = (x + torch.from_numpy(draws.arrays[1]) * 5 / 255).clamp(0, 1)
    kernel = _sinc_kernel(7, 2.0).numpy() if ringing else np.ones((1, 1))
    x = jpeg_by_pillow(filtered(area(x, (12, 20)), kernel), 71) if last else filtered(area(jpeg_by_pillow(x, 71), (12, 20)), kernel)
    expected = (x[0].clamp(0, 1) * 255).round() / 255

    assert found.shape == (3, 12, 20)
    # Sums in another order round a few pixels to the eight-bit step beside, which JPEG spreads in its block.
    off = (found - expected).abs() * 255
    assert off.max() < 8 and off.mean() < 0.05 and (off > 0.5).float().mean() < 0.05


def little(kind: int, sizes_of_noise: list[tuple[int, int]], ringing: bool) -> tuple[list, list, list]:
    """Draws of a run with hardly any noise, one sharp blur, area resizing, and JPEG before the last filter."""
    first = [("random", NO), *blur((0.2, 3.0), 0.2, 3), *sizes((0.2, 0.7, 0.1), kind, 1.5, 1.1, 0.15, 0.15)]
    second = [("random", NO), *sizes((0.3, 0.4, 0.3), kind, 1.2, 1.1, 0.3, 0.3)]
    for order, size, high in zip((first, second), sizes_of_noise, (30, 25), strict=True):
        order += [("choice", MODES, "area"), COLOUR, ("random", YES), ("standard_normal", (1, 3, *size), np.float32, None), ("uniform", 1, high, 1.0)]
    final = [("integers", 3, 11, 3), ("uniform", math.pi / 3, math.pi, 1.5), ("random", YES if ringing else NO)]
    final += [("uniform", 30, 95, 95.0), ("random", NO), ("choice", MODES, "area")]
    return [*first, ("uniform", 30, 95, 95.0)], second, final


def test_tiny_pictures_keep_a_pixel():
    """No side becomes 0, however small the factor."""
    found, _ = whole(noisy_picture(4, 4), *little(DOWN, [(1, 1), (1, 1)], ringing=False))
    assert found.shape == (3, 1, 1)


def test_ringing_is_cut_to_the_range():
    """Beside an edge from black to white the low-pass goes below 0 and above 1."""
    edge = torch.zeros(1, 3, 64, 128)
    edge[..., 64:] = 1
    found, _ = whole(edge, *little(KEEP, [(64, 128), (16, 32)], ringing=True))
    ringing = filtered(area(edge, (16, 32)), _sinc_kernel(7, 1.5).numpy())
    assert ringing.min() < -0.05 and ringing.max() > 1.05
    assert found.min() == 0 and found.max() == 1
    assert (found - ringing[0].clamp(0, 1)).abs().max() < 0.05


@pytest.mark.parametrize("height, width", [(62, 64), (64, 62), (61, 63)])
def test_sides_that_are_no_multiples(height, width):
    with pytest.raises(ValueError, match=f"found {width} x {height} pixels, expected multiples of 4. Crop it first"):
        Degradation()(torch.zeros(3, height, width), 0)


@pytest.mark.parametrize("compressed", [True, False])
def test_mild_degradation(compressed):
    """One blur of 21 pixels' side, the reduction, noise of which small is likelier than large, and often a good JPEG."""
    mild, picture = Mild(), noisy_picture(48, 80)
    assert (mild.sigma, mild.noise, mild.jpeg_chance, mild.jpeg_quality) == ((0.4, 2.8), 6.0, 0.5, (70.0, 98.0))
    draws = Draws(
        *blur((0.4, 2.8), 1.5, 3)[2:],
        ("choice", MODES, "area"),
        ("standard_normal", (1, 3, 12, 20), np.float32, None),
        ("random", 0.7),
        ("random", below(0.5) if compressed else 0.5),
        *([("uniform", 70, 98, 84.0)] if compressed else []),
    )
    found = Degradation(mild=Mild(noise=100.0))._once(picture, (12, 20), draws)
    assert draws.done()
    x = area(filtered(picture, gaussian_blur(1.5, 21)), (12, 20)) + torch.from_numpy(draws.arrays[0]) * 100 * 0.49 / 255
    expected = ((jpeg_by_pillow(x, 84) if compressed else x)[0].clamp(0, 1) * 255).round() / 255
    off = (found - expected).abs() * 255
    assert off.max() < 8 and off.mean() < 0.05


@pytest.mark.parametrize("settings", [Degradation(), Order(), Mild()])
def test_settings_stay(settings):
    """All samples of a run have the same ranges, also where several share the object."""
    for field in fields(settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, field.name, None)
