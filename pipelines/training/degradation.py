"""Real-ESRGAN's second-order degradation (Wang et al., ICCVW 2021, section 3): blur, resize, noise and JPEG, twice, and ringing.

It makes the low-quality half of a training pair. Ranges and chances are the published training configuration's. Cameras are milder: a share of the pictures may be
degraded once, by less, see :class:`Mild`.
"""

import io
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

Range = tuple[float, float]

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Order:
    """One round of blur, resize, noise and JPEG."""

    blur_chance: float = 1.0
    sigma: Range = (0.2, 3.0)
    """Of the blur kernel, in pixels."""
    up_down_keep: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Chances that the picture is enlarged, reduced, or kept."""
    resize: Range = (0.15, 1.5)
    gaussian_noise: Range = (1.0, 30.0)
    """Standard deviation in eight-bit steps."""
    poisson_noise: Range = (0.05, 3.0)
    """Strength relative to shot noise."""
    jpeg_quality: Range = (30.0, 95.0)


@dataclass(frozen=True)
class Mild:
    """A camera's degradation, once: a blur, the reduction, little noise, and often a good JPEG. Not of the paper."""

    sigma: Range = (0.4, 2.8)
    """Of the blur kernel, in pixels of the high-quality picture."""
    noise: float = 6.0
    """Largest standard deviation, in eight-bit steps; half of the pictures have less than a quarter of it."""
    jpeg_chance: float = 0.5
    jpeg_quality: Range = (70.0, 98.0)


@dataclass(frozen=True)
class Degradation:
    """Real-ESRGAN's degradation to 1/``scale`` of the size.

    ``sinc_chance`` is of a low-pass kernel in place of a blur, which rings; ``final_sinc_chance`` of one more at the end.
    ``gaussian_chance`` is of Gaussian instead of Poisson noise, ``gray_chance`` of the same noise in all three channels.
    ``mild_chance`` is of ``mild`` in place of all that; the others are what they are without it.
    """

    scale: int = 4
    first: Order = field(default_factory=Order)
    second: Order = field(default_factory=lambda: Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), (30.0, 95.0)))
    sinc_chance: float = 0.1
    final_sinc_chance: float = 0.8
    gaussian_chance: float = 0.5
    gray_chance: float = 0.4
    mild_chance: float = 0.0
    mild: Mild = field(default_factory=Mild)

    def __call__(self, picture: torch.Tensor, seed: int | tuple[int, ...]) -> torch.Tensor:
        """The low-quality picture (3, H / scale, W / scale), in eight-bit steps, of ``picture`` (3, H, W), RGB in [0, 1], float32.

        Raises:
            ValueError: the sides are no multiples of ``scale``.
        """
        height, width = picture.shape[-2:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"picture: found {width} x {height} pixels, expected multiples of {self.scale}. Crop it first.")
        size = (height // self.scale, width // self.scale)
        if self.mild_chance and (rng := np.random.default_rng((*np.atleast_1d(seed), 2))).random() < self.mild_chance:
            return self._once(picture[None], size, rng)
        rng = np.random.default_rng(seed)
        x = picture[None]
        for order in (self.first, self.second):
            if rng.random() < order.blur_chance:
                x = _filter(x, self._kernel(rng, order.sigma))
            if order is self.first:
                factor = _factor(rng, order)
                x = _resize(x, (max(1, int(height * factor)), max(1, int(width * factor))), rng)
            else:
                factor = _factor(rng, order)
                x = _resize(x, tuple(max(1, int(side * factor)) for side in size), rng)
            x = self._noise(x, rng, order)
            if order is self.first:
                x = jpeg(x, rng.uniform(*order.jpeg_quality))
        ringing = self._final_kernel(rng)
        quality = rng.uniform(*self.second.jpeg_quality)
        jpeg_last = rng.random() < 0.5
        x = _filter(_resize(x if jpeg_last else jpeg(x, quality), size, rng), ringing)
        if jpeg_last:
            x = jpeg(x, quality)
        return _eight_bit(x)

    def _once(self, x: torch.Tensor, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
        mild = self.mild
        x = _resize(_filter(x, _blur_kernel(rng, 21, mild.sigma)), size, rng)
        x = x + torch.from_numpy(rng.standard_normal(x.shape, np.float32)) * (mild.noise * rng.random() ** 2 / 255)
        return _eight_bit(jpeg(x, rng.uniform(*mild.jpeg_quality)) if rng.random() < mild.jpeg_chance else x)

    def _kernel(self, rng: np.random.Generator, sigma: Range) -> torch.Tensor:
        side = 2 * int(rng.integers(3, 11)) + 1
        if rng.random() < self.sinc_chance:
            return _sinc_kernel(side, _cutoff(rng, side))
        return _blur_kernel(rng, side, sigma)

    def _final_kernel(self, rng: np.random.Generator) -> torch.Tensor:
        side = 2 * int(rng.integers(3, 11)) + 1
        cutoff = rng.uniform(math.pi / 3, math.pi)
        return _sinc_kernel(side, cutoff) if rng.random() < self.final_sinc_chance else torch.ones(1, 1)

    def _noise(self, x: torch.Tensor, rng: np.random.Generator, order: Order) -> torch.Tensor:
        channels = 1 if rng.random() < self.gray_chance else 3
        shape = (1, channels, *x.shape[-2:])
        if rng.random() < self.gaussian_chance:
            noise = torch.from_numpy(rng.standard_normal(shape, np.float32)) * (rng.uniform(*order.gaussian_noise) / 255)
        else:
            source = x if channels == 3 else (x * x.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)
            source = (source.clamp(0, 1) * 255).round() / 255
            levels = 2 ** math.ceil(math.log2(len(source.unique())))
            counts = torch.from_numpy(rng.poisson(source.numpy() * levels).astype(np.float32))
            noise = (counts / levels - source) * rng.uniform(*order.poisson_noise)
        return (x + noise).clamp(0, 1)


def _eight_bit(x: torch.Tensor) -> torch.Tensor:
    return (x[0].clamp(0, 1) * 255).round() / 255


def jpeg(x: torch.Tensor, quality: float) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1] after JPEG of this quality, 1 to 100, with the usual halved chroma."""
    pixels = (rearrange(x[0], "c h w -> h w c").clamp(0, 1) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=round(quality))
    return rearrange(torch.from_numpy(np.asarray(Image.open(file)).copy()), "h w c -> 1 c h w").float() / 255


def _factor(rng: np.random.Generator, order: Order) -> float:
    kind = rng.choice(3, p=order.up_down_keep)
    return (rng.uniform(1, order.resize[1]), rng.uniform(order.resize[0], 1), 1.0)[kind]


def _resize(x: torch.Tensor, size: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    mode = str(rng.choice(["area", "bilinear", "bicubic"]))
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode=mode) if mode == "area" else F.interpolate(x, size=size, mode=mode, align_corners=False)


def _filter(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) filtered with one kernel (k, k), the edges reflected."""
    margin = kernel.shape[-1] // 2
    mode = "reflect" if margin < min(x.shape[-2:]) else "replicate"
    padded = F.pad(x, [margin] * 4, mode=mode)
    return F.conv2d(padded.transpose(0, 1), kernel[None, None].to(x)).transpose(0, 1)


def _blur_kernel(rng: np.random.Generator, side: int, sigma: Range) -> torch.Tensor:
    """A Gaussian, generalised Gaussian or plateau kernel, round or stretched, that sums to 1."""
    kind = rng.choice(["gauss", "general", "plateau"], p=[0.7, 0.15, 0.15])
    round_chance = 0.45 / 0.7 if kind == "gauss" else 0.8
    first = rng.uniform(*sigma)
    second, angle = (first, 0.0) if rng.random() < round_chance else (rng.uniform(*sigma), rng.uniform(-math.pi, math.pi))
    # the shape below and above 1 equally often, although its range is not symmetric
    low, high = {"gauss": (1.0, 1.0), "general": (0.5, 4.0), "plateau": (1.0, 2.0)}[str(kind)]
    shape = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    y, x = np.mgrid[:side, :side] - side // 2
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = (along / first) ** 2 + (across / second) ** 2
    kernel = 1 / (1 + distance**shape) if kind == "plateau" else np.exp(-0.5 * distance**shape)
    return torch.from_numpy((kernel / kernel.sum()).astype(np.float32))


def _cutoff(rng: np.random.Generator, side: int) -> float:
    """Small kernels can't hold low frequencies back."""
    return rng.uniform(math.pi / 3 if side < 13 else math.pi / 5, math.pi)


def _sinc_kernel(side: int, cutoff: float) -> torch.Tensor:
    """The round low-pass filter of this cutoff, in radians a pixel: cutoff J1(cutoff r) / (2 pi r), cut off at the kernel's border."""
    y, x = np.mgrid[:side, :side] - side // 2
    r = torch.from_numpy(np.hypot(x, y))
    kernel = torch.where(r > 0, cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r.clamp(min=1e-9)), cutoff**2 / (4 * math.pi))
    return (kernel / kernel.sum()).float()
