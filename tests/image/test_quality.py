"""PSNR, SSIM and GMSD: values worked out by hand, against pyiqa's calls where it is installed, and what cannot be compared."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT

from fewstep_sr.image.quality import METRICS, compare, gmsd, psnr, ssim, to_8_bit
from pipelines.pictures import read_pixels


def photo(height=96, width=128) -> torch.Tensor:
    return read_pixels(ROOT / "tests" / "data" / "photos" / "chelsea.png").tensor()[..., :height, :width].contiguous()


def worse(image: torch.Tensor, amount=0.1) -> torch.Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return to_8_bit(image + amount * noise)


def test_equal_images():
    figures = compare(photo(), photo())
    assert figures["psnr"].item() == pytest.approx(80) and figures["ssim"].item() == pytest.approx(1) and figures["gmsd"].item() == 0


def test_psnr_of_a_known_error():
    """Grey 100 against 110: Y of BT.601 has 219 steps for 255, without rounding."""
    flat = torch.full((1, 3, 16, 16), 100 / 255)
    error = 10 / 255 * 219 / 255
    assert psnr(flat + 10 / 255, flat).item() == pytest.approx(-20 * math.log10(error), abs=1e-3)


def test_ssim_of_flat_images():
    """Without structure there is the term of luminance alone, of Y rounded to 8 bits."""
    dark, light = torch.full((1, 3, 16, 16), 50 / 255), torch.full((1, 3, 16, 16), 100 / 255)
    a, b = (round(16 + 219 * value / 255) for value in (50, 100))
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, light).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_ssim_against_the_formula():
    """The windowed sums written out in NumPy, at one place of an image that is one window large."""
    image, other = photo(11, 11), worse(photo(11, 11))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    window /= window.sum()
    weights = np.array([65.481, 128.553, 24.966])
    x, y = (np.round(np.einsum("chw,c->hw", t[0].double().numpy(), weights) + 16) for t in (image, other))
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, cov = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) / (mx**2 + my**2 + c1) * (2 * cov + c2) / (vx + vy + c2)
    assert ssim(image, other).item() == pytest.approx(expected, abs=1e-9)


def test_gmsd_against_the_formula():
    image, other = photo(12, 14), worse(photo(12, 14))

    def gradient(t):
        gray = np.round(np.einsum("chw,c->hw", t[0].double().numpy(), [0.299, 0.587, 0.114]) * 255)
        half = (gray[::2, ::2] + gray[1::2, ::2] + gray[::2, 1::2] + gray[1::2, 1::2]) / 4
        padded = np.pad(half, 1)
        h, w = half.shape
        across = sum(padded[i : i + h, 2 : 2 + w] - padded[i : i + h, 0:w] for i in range(3)) / 3
        down = sum(padded[2 : 2 + h, j : j + w] - padded[0:h, j : j + w] for j in range(3)) / 3
        return np.hypot(across, down)

    a, b = gradient(image), gradient(other)
    assert gmsd(other, image).item() == pytest.approx(np.std((2 * a * b + 170) / (a * a + b * b + 170), ddof=1), abs=1e-6)


def test_worse_is_worse_and_a_batch_is_its_images():
    good = photo()
    batch = torch.cat([worse(good, amount) for amount in (0.02, 0.1)])
    figures = compare(batch, good)
    assert figures["psnr"][0] > figures["psnr"][1] and figures["ssim"][0] > figures["ssim"][1] and figures["gmsd"][0] < figures["gmsd"][1]
    for i in range(2):
        assert all(compare(batch[i : i + 1], good)[name].item() == figures[name][i].item() for name in METRICS)


def test_values_are_those_of_an_8_bit_file():
    good = photo()
    off = (good + 0.3 / 255).clamp(0, 1)  # rounds back to the same file
    assert compare(off, good)["psnr"].item() == pytest.approx(80)


@pytest.mark.parametrize(
    ("image", "original", "message"),
    [
        ((1, 3, 16, 20), (1, 3, 16, 24), "image: found 20 x 16 pixels, expected 24 x 16, as original has"),
        ((3, 3, 16, 16), (2, 3, 16, 16), "original: found 2 images, expected 1 or 3"),
        ((1, 3, 10, 40), (1, 3, 10, 40), "expected 11 a side at least"),
    ],
)
def test_what_cannot_be_compared(image, original, message):
    with pytest.raises(ValueError, match=message):
        compare(torch.rand(image), torch.rand(original))


@pytest.mark.slow
def test_pyiqa_gives_the_same():
    pyiqa = pytest.importorskip("pyiqa", reason="pyiqa is not installed")
    good = photo()
    for amount in (0.02, 0.1, 0.3):
        bad = worse(good, amount)
        figures = compare(bad, good)
        for name, call in {
            "psnr": {"test_y_channel": True, "color_space": "ycbcr"},
            "ssim": {"test_y_channel": True, "color_space": "ycbcr"},
            "gmsd": {},
        }.items():
            expected = pyiqa.create_metric(name, device="cpu", **call)(bad, good).item()
            assert figures[name].item() == pytest.approx(expected, abs=2e-5), name
