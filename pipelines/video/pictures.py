"""Picture files as frames."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch

from fewstep_sr.video.frames import Colors

from ..pictures import read_pixels, read_size


class PictureFrames:
    """Picture files of one size as frames, so many a second. Their colours are written as BT.709.

    Raises:
        ValueError: they have several sizes.
    """

    def __init__(self, folder: Path, files: tuple[Path, ...], fps: Fraction):
        self.path, self.files = folder, files
        self.size = read_pixels(files[0]).size
        sizes = {read_size(path) for path in files[1:]}  # as stored; turned ones are found out when they are read
        if others := sizes - {self.size, self.size[::-1]}:
            raise ValueError(
                f"its frames have several sizes, {self.size[0]} x {self.size[1]} and {' x '.join(map(str, others.pop()))}, expected one."
            )
        self.time_base, self.rate, self.count = 1 / fps, fps, len(files)
        self.deep, self.colors, self.sample_aspect_ratio = False, Colors(), Fraction(1)
        self.notes: list[str] = []
        self.origin = 0
        self.end: int | None = None

    def read(self, skip: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
        for number, path in enumerate(self.files[skip:], skip):
            pixels = read_pixels(path)
            if pixels.size != self.size:
                raise ValueError(
                    f"{path.name} has {' x '.join(map(str, pixels.size))} pixels, expected {' x '.join(map(str, self.size))}, as the first."
                )
            yield number, 1, pixels.tensor()
