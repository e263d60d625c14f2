"""The degradation against Real-ESRGAN's published configuration and against its formulas, written here once more, plainly.

Sources, all of github.com/xinntao/Real-ESRGAN and xinntao/BasicSR:
options/train_realesrnet_x4plus.yml (ranges and chances), realesrgan/data/realesrgan_dataset.py (kernel sizes, cutoffs),
realesrgan/models/realesrnet_model.py (order of the parts), basicsr/data/degradations.py (kernels, noise).
"""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("diffusers")

from pipelines.training import degradation as module
from pipelines.training.degradation import Degradation, Order, _blur_kernel, _cutoff, _factor, _filter, _resize, _sinc_kernel, jpeg

MODES = ["area", "bilinear", "bicubic"]


class Draws:
    """Stands in for a random generator: what is drawn is given in the order in which it is to be drawn, with what it is to be drawn from.

    ``("uniform", 1, 30, 7.5)``: uniform(1, 30) shall be asked for and gives 7.5. Arrays come from a real generator.
    """

    def __init__(self, *expected: tuple):
        self.expected, self.real, self.arrays = list(expected), np.random.default_rng(0), []

    def _next(self, *asked):
        assert self.expected, f"drew {asked}, expected no more"
        *wanted, result = self.expected.pop(0)
        assert len(asked) == len(wanted), f"drew {asked}, expected {wanted}"
        for found, value in zip(asked, wanted, strict=True):
            assert found == (pytest.approx(value) if isinstance(value, float | tuple) else value), f"drew {asked}, expected {wanted}"
        return result

    def random(self):
        return self._next("random")

    def uniform(self, low, high):
        return self._next("uniform", low, high)

    def integers(self, low, high):
        return self._next("integers", low, high)

    def choice(self, what, p=None):
        return self._next("choice", what, *(() if p is None else (tuple(p),)))

    def standard_normal(self, shape, dtype):
        self.arrays.append(self.real.standard_normal(shape, dtype))
        return self._next("standard_normal", shape, dtype) or self.arrays[-1]

    def poisson(self, rates):
        self.arrays.append(rates)
        return self._next("poisson") or np.round(rates + 0.5)

    def done(self) -> bool:
        return not self.expected


# What a chance is compared with is seen from both sides: a draw just below it, and one at it.
YES, NO = 1e-9, 1 - 1e-9


def below(chance: float) -> float:
    return chance - 1e-9


# ---- the configuration


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


# ---- kernels


def grid(side: int):
    """Distances of a kernel's cells from its middle, to the right and down."""
    cells = np.arange(side) - (side - 1) / 2
    return np.meshgrid(cells, cells)


def by_formula(side: int, sigmas: tuple[float, float], angle: float, profile) -> np.ndarray:
    """profile(q) over the quadratic form q = v^T S^-1 v, S = R diag(sigmas^2) R^T with R the rotation by ``angle``, to the sum 1."""
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(rotation @ np.diag(np.square(sigmas)) @ rotation.T)
    x, y = grid(side)
    kernel = profile(inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y)
    return kernel / kernel.sum()


KINDS = ("choice", ["gauss", "general", "plateau"], (0.7, 0.15, 0.15))
# kernel_prob of the configuration: iso 0.45, aniso 0.25, generalized_iso 0.12, generalized_aniso 0.03, plateau_iso 0.12, plateau_aniso 0.03
ISO = {"gauss": 0.45 / (0.45 + 0.25), "general": 0.12 / (0.12 + 0.03), "plateau": 0.12 / (0.12 + 0.03)}
SHAPES = {"gauss": (1.0, 1.0), "general": (0.5, 4.0), "plateau": (1.0, 2.0)}  # betag_range, betap_range


def profile(kind: str, shape: float):
    return (lambda q: 1 / (1 + q**shape)) if kind == "plateau" else (lambda q: np.exp(-0.5 * q**shape))


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

    stretched = ("uniform", *sigma, 2.5), ("random", ISO[kind] + 1e-9), ("uniform", *sigma, 0.8), ("uniform", -math.pi, math.pi, 0.6)
    draws = Draws((*KINDS, kind), *stretched, *which)
    kernel = _blur_kernel(draws, side, sigma)
    assert draws.done() and abs(kernel.sum().item() - 1) < 1e-6
    np.testing.assert_allclose(kernel, by_formula(side, (2.5, 0.8), 0.6, profile(kind, shape)), atol=1e-6)


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Bessel's integral, (1 / pi) times that of cos(t - x sin t) from 0 to pi, by the trapezium rule, which is exact to rounding for it."""
    t = (np.arange(2000) + 0.5) * math.pi / 2000
    return np.cos(t - x[..., None] * np.sin(t)).mean(-1)


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


# ---- the parts


def filtered(x: torch.Tensor, kernel: np.ndarray, mode: str = "reflect") -> torch.Tensor:
    """Each pixel the sum of its neighbourhood times the kernel, in NumPy."""
    margin = len(kernel) // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(2, 3))
    return torch.from_numpy(np.einsum("bchwij,ij->bchw", windows, kernel).astype(np.float32))


def noisy_picture(height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


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
    assert (spot * x * x).sum() == pytest.approx(1.5**2, rel=1e-3) == (spot * y * y).sum()


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


def jpeg_by_pillow(x: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(np.round(255 * x[0].clamp(0, 1).permute(1, 2, 0).numpy()).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255


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


# ---- noise

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
    x = torch.tensor([-0.5, 0.0, 1.0, 1.5]).repeat(1, 3, 20, 20)
    real = np.random.default_rng(0)
    draws = SimpleNamespace(
        random=lambda: 0.45 if gaussian else 0.9, poisson=real.poisson, uniform=lambda low, high: high, standard_normal=real.standard_normal
    )
    found = Degradation()._noise(x, draws, Order())
    assert found.min() == 0 and found.max() == 1


# ---- the whole


def blur(sigma_range: tuple[float, float], sigma: float, half: int):
    """A round Gaussian blur's draws, after the chance that there is one."""
    kernel = ("integers", 3, 11, half), ("random", NO), (*KINDS, "gauss"), ("uniform", *sigma_range, sigma)
    return *kernel, ("random", YES), ("random", YES), ("uniform", 1.0, 1.0, 1.0)


def whole(first: list, second: list, final: list, size=(48, 80), **options) -> tuple[torch.Tensor, Draws, torch.Tensor]:
    """The result of these draws, the draws, and the picture it was made of."""
    picture, draws = noisy_picture(*size), Draws(*first, *second, *final)
    seeds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.np.random, "default_rng", lambda seed: seeds.append(seed) or draws)
        result = Degradation(**options)(picture[0], (3, 5))
    assert seeds == [(3, 5)] and draws.done()
    return result, draws, picture


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
    found, draws, picture = whole(first, second, final)

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


def test_tiny_pictures_keep_a_pixel():
    """No side becomes 0, however small the factor."""
    none = (1, 1, 1)
    first = [("random", NO), *blur((0.2, 3.0), 0.9, 3), *sizes((0.2, 0.7, 0.1), DOWN, 1.5, 1.3, 0.15, 0.15), ("choice", MODES, "area")]
    first += [
        COLOUR,
        ("random", YES),
        ("standard_normal", (1, 3, 1, 1), np.float32, None),
        ("uniform", *none[:1], 30, 1.0),
        ("uniform", 30, 95, 95.0),
    ]
    second = [("random", NO), *sizes((0.3, 0.4, 0.3), DOWN, 1.2, 1.1, 0.3, 0.3), ("choice", MODES, "area")]
    second += [COLOUR, ("random", YES), ("standard_normal", (1, 3, 1, 1), np.float32, None), ("uniform", 1, 25, 1.0)]
    final = [
        ("integers", 3, 11, 3),
        ("uniform", math.pi / 3, math.pi, 2.0),
        ("random", NO),
        ("uniform", 30, 95, 95.0),
        ("random", NO),
        ("choice", MODES, "area"),
    ]
    found, _, _ = whole(first, second, final, size=(4, 4))
    assert found.shape == (3, 1, 1)
