"""Training pictures: crops of a folder's pictures, with their degraded halves.

Sample number k is the same in each run with the same seed, whoever reads it and when: a run that goes on from a checkpoint sees what the
uncut run would have seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..pictures import FORMATS
from .degradation import Degradation

CACHE_PIXELS = 300_000_000
"""Pictures are kept in memory while they are together no larger than this; 900 MB."""


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """Pictures of folders (with their subfolders), of text lists (a path on each line, relative to the list), and single files, in a fixed order.

    Raises:
        ValueError: a source is missing or holds no pictures.
    """
    found = []
    for source in sources:
        if source.is_dir():
            pictures = sorted(path for path in source.rglob("*") if path.suffix.lower() in FORMATS)
        elif source.suffix.lower() in FORMATS and source.is_file():
            pictures = [source]
        elif source.is_file():
            pictures = [source.parent / line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            raise ValueError(f"data: found nothing at {source}, expected a folder of pictures, a text list of paths, or a picture.")
        missing = [path for path in pictures if not path.is_file()]
        if missing or not pictures:
            what = f"{missing[0]}, which is not there" if missing else "no pictures"
            raise ValueError(f"data: found {what} in {source}, expected {', '.join(sorted(FORMATS))}.")
        found += pictures
    return found


class TrainingPictures(Dataset):
    """Random crops, turned and mirrored; with a degradation also their low-quality halves.

    Args:
        paths: the pictures. Those smaller than a patch are enlarged to it.
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
        self.chances = None if weights is None else np.asarray(weights, float) / sum(weights)
        self.crops = crops
        self._degraded: dict[int, torch.Tensor] = {}
        self._cache: dict[Path, np.ndarray] = {}
        self._cached = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = index % self.crops if self.crops else index
        rng = np.random.default_rng((self.seed, index))
        pixels = self._read(self.paths[rng.choice(len(self.paths), p=self.chances)])
        top, left = (int(rng.integers(side - self.patch + 1)) for side in pixels.shape[:2])
        crop = np.rot90(pixels[top : top + self.patch, left : left + self.patch], int(rng.integers(4)))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        hq = rearrange(torch.from_numpy(crop.copy()), "h w c -> c h w").float() / 255
        sample = {"hq": hq, "number": index} if self.crops else {"hq": hq}
        if self.degradation is not None:
            sample["lq"] = self._degraded.get(index)
            if sample["lq"] is None:
                sample["lq"] = self.degradation(hq, (self.seed, index, 1))
                if self.crops:
                    self._degraded[index] = sample["lq"]
        return sample

    def _read(self, path: Path) -> np.ndarray:
        if path in self._cache:
            return self._cache[path]
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except OSError as error:
            raise ValueError(f"data: found {path}, which can't be read ({error}), expected a picture. Take it out of the folder.") from error
        if min(picture.size) < self.patch:
            picture = ImageOps.fit(picture, [max(side, self.patch) for side in picture.size], Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
        if self._cached + pixels.size <= 3 * CACHE_PIXELS:
            self._cache[path], self._cached = pixels, self._cached + pixels.size
        return pixels


def load_batches(pictures: TrainingPictures, batch: int, first: int = 0, workers: int = 0) -> DataLoader:
    """Batches of the samples from number ``first`` on, in order."""
    rest = range(first, len(pictures))
    return DataLoader(pictures, batch, sampler=rest, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
