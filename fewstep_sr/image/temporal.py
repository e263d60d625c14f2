"""Frames of a video steadied over time, before they are restored: grain that is new in each frame becomes new detail in each frame."""

import math

import torch
import torch.nn.functional as F

_LONGEST = 8
"""Frames that an average holds at most: noise falls with the root of their number."""

_CERTAIN = 3.0
"""Deviations of the noise from which a difference is a change of the picture."""

_WINDOW = 5
"""Side of the square, in pixels, over which a change is looked for."""

_ENERGY = 1 + _CERTAIN * math.sqrt(2 / _WINDOW**2)
"""How many times the noise's variance a square's differences may have: its mean of squares varies by sqrt(2 / N), of N pixels, where channels share one noise."""

_GROWTH = 1.5
"""How many times the noise of the frame before a frame's may be."""

_ROUNDING = 0.5 / 255
"""What eight bits leave out."""


class Steady:
    """A recursive average of frames along the picture's global motion, at each pixel as long as nothing changes there.

    Give it a shot's frames one after another. The frame before, averaged, is moved by the whole pixels that phase correlation finds (Kuglin and Hines, 1975).
    Where the difference to it, over 5 x 5 pixels, is within what noise explains, in its mean and in its mean of squares, the pixel goes into a running mean of up to
    eight frames; elsewhere the mean begins anew, so that what moves by itself, and another shot, leaves no ghost. The noise is the smaller of what changes and what
    second differences say in a frame's smoother parts (Immerkaer, 1996), and does not jump.
    """

    def __init__(self) -> None:
        self._noise = math.inf
        self._mean: torch.Tensor | None = None
        self._count: torch.Tensor | None = None

    def __call__(self, frame: torch.Tensor) -> torch.Tensor:
        """A frame (1, 3, H, W) in [0, 1], steadied."""
        if self._mean is None or self._count is None or self._mean.shape != frame.shape:
            self._noise, self._mean, self._count = math.inf, frame, torch.ones_like(frame[:, :1])
            return frame
        down, across = global_shift(self._mean, frame)
        mean, count = (_moved(tensor, down, across) for tensor in (self._mean, self._count))
        count = _without_border(count, down, across)
        difference = frame - mean
        # A whole picture that moves, or another one, is no noise, and in one that is all texture it grows no faster than grain does.
        noise = self._noise = min(difference.abs().median().item() * 1.4826, _noise(frame), max(_GROWTH * self._noise, 1 / 255))
        same = (_around(difference.mean(1, keepdim=True)).abs() < _CERTAIN * noise / math.sqrt(_WINDOW**2 * 3) + _ROUNDING) & (count > 0)
        same &= _around(difference.square().mean(1, keepdim=True)) < _ENERGY * (1 + 1 / count) * noise**2 + _ROUNDING**2
        count = torch.where(same, (count + 1).clamp_max(_LONGEST), torch.ones_like(count))
        self._mean, self._count = torch.where(same, mean + (frame - mean) / count, frame), count
        return self._mean


def _around(tensor: torch.Tensor) -> torch.Tensor:
    """Means over the squares around each pixel."""
    margin = _WINDOW // 2
    return F.avg_pool2d(F.pad(tensor, (margin,) * 4, mode="replicate"), _WINDOW, 1)


def _noise(frame: torch.Tensor) -> float:
    """The standard deviation of a frame's noise: by the quarter of it, in blocks of 16 x 16 pixels, with the least detail."""
    response = F.pad(frame, (1, 1, 1, 1), mode="replicate").diff(2, -1).diff(2, -2).abs().mean(1, keepdim=True)
    blocks = F.avg_pool2d(response, [min(16, side) for side in response.shape[-2:]])
    return blocks.flatten().quantile(0.25).item() * math.sqrt(math.pi / 2) / 6


def global_shift(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """By how many pixels down and to the right a picture (1, 3, H, W) has moved as a whole; (0, 0) unless the move explains it better than none."""
    height, width = before.shape[-2:]
    window = torch.outer(torch.hann_window(height, periodic=False), torch.hann_window(width, periodic=False)).to(before)
    spectra = [torch.fft.rfft2(window * (image.mean((0, 1)) - image.mean())) for image in (before, after)]
    cross = spectra[1] * spectra[0].conj()
    correlation = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-12), s=(height, width))
    down, across = divmod(int(correlation.argmax()), width)
    down, across = (at - side if at > side // 2 else at for at, side in ((down, height), (across, width)))
    if abs(down) > height // 4 or abs(across) > width // 4:
        return 0, 0
    moved = (after - _moved(before, down, across)).abs()
    margin_y, margin_x = abs(down), abs(across)
    inner = (..., slice(margin_y, height - margin_y), slice(margin_x, width - margin_x))
    return (down, across) if moved[inner].mean() < (after - before).abs()[inner].mean() else (0, 0)


def _moved(tensor: torch.Tensor, down: int, across: int) -> torch.Tensor:
    return tensor.roll((down, across), (-2, -1))


def _without_border(count: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """0 where the move brought in what was on the other side."""
    count = count.clone()
    for axis, shift in ((-2, down), (-1, across)):
        if shift:
            count.narrow(axis, 0 if shift > 0 else count.shape[axis] + shift, abs(shift)).zero_()
    return count
