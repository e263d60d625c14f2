"""Training pictures: crops of a folder's pictures, with their degraded halves.

Sample number k is the same in each run with the same seed, whoever reads it and when: a run that goes on from a checkpoint sees what the
uncut run would have seen.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..pictures import UnreadableError, read_pixels
from .degradation import Degradation
from .sources import find_pictures

__all__ = ["CACHE_BYTES", "TrainingPictures", "find_pictures", "load_batches"]

_log = logging.getLogger(__name__)

CACHE_BYTES = 900_000_000
"""Pictures are kept in memory while they are together no larger than this."""


class TrainingPictures(Dataset):
    """Random crops, turned and mirrored; with a degradation also their low-quality halves.

    Args:
        paths: the pictures, read as the command line reads them: upright, of 8 or 16 bits, filled where they are transparent. Those smaller than a
            patch are enlarged to it. Those that turn out to be damaged are named, once, and another is drawn in their place, in each run the same.
        weights: how often each picture is taken, relative to the others; equally often without.
        crops: how many different samples there are, after which they come again; each new without.
        patch: side of the crops in pixels.
        degradation: makes ``lq``; without it there is ``hq`` alone.
        length: number of samples; a sample's number is all that its crop depends on, besides ``seed``.

    Each sample is a dict of ``hq`` (3, patch, patch) and ``lq`` (3, patch / 4, patch / 4), RGB in [0, 1], float32, and ``number`` where samples come again.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        patch: int,
        length: int,
        seed: int = 0,
        degradation: Degradation | None = None,
        weights: Sequence[float] | None = None,
        crops: int | None = None,
    ):
        self.paths, self.patch, self.length, self.seed, self.degradation = list(paths), patch, length, seed, degradation
        self.chances = None if weights is None else _chances(weights)
        self.crops = crops
        self._degraded: dict[int, torch.Tensor] = {}
        self._cache: dict[Path, np.ndarray] = {}
        self._cached = 0
        self._damaged: set[Path] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = index % self.crops if self.crops else index
        rng = np.random.default_rng((self.seed, index))
        pixels = self._draw(rng)
        top, left = (int(rng.integers(side - self.patch + 1)) for side in pixels.shape[:2])
        crop = np.rot90(pixels[top : top + self.patch, left : left + self.patch], int(rng.integers(4)))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        hq = rearrange(torch.from_numpy(crop.astype(np.float32)), "h w c -> c h w") / np.iinfo(crop.dtype).max
        hq = hq.expand(3, -1, -1).contiguous()
        sample = {"hq": hq, "number": index} if self.crops else {"hq": hq}
        if self.degradation is not None:
            lq = self._degraded.get(index)
            if lq is None:
                lq = self.degradation(hq, (self.seed, index, 1))
                if self.crops:
                    self._degraded[index] = lq
            sample["lq"] = lq
        return sample

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """A picture's pixels (H, W, 1 or 3). One that cannot be read is drawn again, so that the sample does not depend on when that was noticed."""
        while True:
            path = self.paths[rng.choice(len(self.paths), p=self.chances)]
            if path in self._damaged:
                continue
            try:
                return self._read(path)
            except (UnreadableError, OSError, MemoryError) as error:
                reason = str(error) or "there is too little memory for it"
                self._damaged.add(path)
                if self._damaged.issuperset(path for i, path in enumerate(self.paths) if self.chances is None or self.chances[i] > 0):
                    raise ValueError(f"data: found {path}, which can't be read ({reason}), expected a picture, and there is no other.") from error
                _log.warning("data: %s can't be read (%s); others are taken in its place.", path, reason)

    def _read(self, path: Path) -> np.ndarray:
        if path in self._cache:
            return self._cache[path]
        pixels = read_pixels(path).values
        if min(pixels.shape[:2]) < self.patch:
            height, width = pixels.shape[:2]
            pixels = _enlarged(pixels, (max(width, self.patch), max(height, self.patch)))
        if self._cached + pixels.nbytes <= CACHE_BYTES:
            self._cache[path], self._cached = pixels, self._cached + pixels.nbytes
        return pixels


def _chances(weights: Sequence[float]) -> np.ndarray:
    shares = np.asarray(weights, float)
    shares = shares / shares.max()  # whose sum may be beyond what a float holds
    return shares / shares.sum()


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of (H, W, C), cut to the proportions of ``size`` (width, height) and brought to it, bicubic."""
    eight = pixels.dtype == np.uint8
    channels = [Image.fromarray(channel if eight else channel.astype(np.float32)) for channel in np.moveaxis(pixels, -1, 0)]
    fitted = [np.asarray(ImageOps.fit(channel, size, Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(fitted, -1).clip(0, np.iinfo(pixels.dtype).max).round().astype(pixels.dtype)


def load_batches(pictures: TrainingPictures, batch: int, first: int = 0, workers: int = 0) -> DataLoader:
    """Batches of the samples from number ``first`` on, in order."""
    rest = range(first, len(pictures))
    return DataLoader(pictures, batch, sampler=rest, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
