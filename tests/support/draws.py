"""What the tests of the degradation share: a random generator that knows what it will be asked, and the formulas once more, plainly."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

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


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Bessel's integral, (1 / pi) times that of cos(t - x sin t) from 0 to pi, by the trapezium rule, which is exact to rounding for it."""
    t = (np.arange(2000) + 0.5) * math.pi / 2000
    return np.cos(t - x[..., None] * np.sin(t)).mean(-1)


def filtered(x: torch.Tensor, kernel: np.ndarray, mode: str = "reflect") -> torch.Tensor:
    """Each pixel the sum of its neighbourhood times the kernel, in NumPy."""
    margin = len(kernel) // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(2, 3))
    return torch.from_numpy(np.einsum("bchwij,ij->bchw", windows, kernel).astype(np.float32))


def noisy_picture(height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def jpeg_by_pillow(x: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(np.round(255 * x[0].clamp(0, 1).permute(1, 2, 0).numpy()).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
