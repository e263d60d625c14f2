"""The metrics of the papers: PSNR, SSIM and GMSD of our own, all others through pyiqa with the calls that the authors make (OSEDiff's test_metrics.py).

pyiqa is optional. Its licence is PolyForm Noncommercial 1.0.0, and it fetches a metric's weights when the metric is first used.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fewstep_sr.image import quality

LICENCE = "PolyForm Noncommercial License 1.0.0"
_Y = {"test_y_channel": True, "color_space": "ycbcr"}


@dataclass(frozen=True)
class Metric:
    """A metric: how pyiqa's ``create_metric`` is called for it, and what it looks at. ``digits`` are those that are printed."""

    needs_original: bool = True
    higher_is_better: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    digits: int = 4
    of_folders: bool = False


METRICS: dict[str, Metric] = {
    "psnr": Metric(higher_is_better=True, options=_Y),
    "ssim": Metric(higher_is_better=True, options=_Y),
    "gmsd": Metric(),
    "lpips": Metric(),
    "dists": Metric(),
    "fid": Metric(of_folders=True),
    "niqe": Metric(needs_original=False),
    "musiq": Metric(needs_original=False, higher_is_better=True),
    "maniqa-pipal": Metric(needs_original=False, higher_is_better=True),
    "clipiqa": Metric(needs_original=False, higher_is_better=True),
}
"""In the order of the papers' tables. GMSD is in none of them, and needs no weights."""

OWN = tuple(quality.METRICS)
"""Metrics that need neither pyiqa nor weights."""


class Meter:
    """The metrics of a run. Those that cannot be had are in ``left_out`` with the reason, and the others go on.

    Args:
        names: of :data:`METRICS`.
        originals: whether there are any.
        through_pyiqa: compute by pyiqa also what we can do ourselves.

    Raises:
        ValueError: none of the metrics can be had.
    """

    def __init__(self, names: Sequence[str], device: torch.device, originals: bool = True, through_pyiqa: bool = False):
        self.device, self.left_out, self.by = device, {}, {}  # type: torch.device, dict[str, str], dict[str, str]
        self._calls: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            if METRICS[name].needs_original and not originals:
                self.left_out[name] = "it compares with originals, and there are none. Give --hq."
            elif name in OWN and not through_pyiqa:
                self._calls[name], self.by[name] = quality.METRICS[name], f"fewstep_sr {own_version()}"
            else:
                self._add(name)
        if not self._calls:
            raise ValueError(f"--metrics: none can be computed. {self.explain()}")

    def _add(self, name: str) -> None:
        try:
            import pyiqa  # optional

            self._calls[name] = pyiqa.create_metric(name, device=self.device, **METRICS[name].options)
            self.by[name] = f"pyiqa {version('pyiqa')}"
        except ImportError as error:
            missing = getattr(error, "name", None) or "pyiqa"
            self.left_out[name] = f"{missing} is not installed here (pip install pyiqa; its licence is {LICENCE})."
        except Exception as error:  # whatever its weights' servers, unpickling and networks raise
            logging.getLogger(__name__).debug("%s", name, exc_info=True)
            self.left_out[name] = f"pyiqa cannot make it ready, most often for want of its weights: {_line(error)}"

    @property
    def names(self) -> list[str]:
        return list(self._calls)

    @property
    def of_images(self) -> list[str]:
        return [name for name in self._calls if not METRICS[name].of_folders]

    def explain(self) -> str:
        return " ".join(f"{name}: {reason}" for name, reason in self.left_out.items())

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, original: torch.Tensor | None, names: Iterable[str]) -> dict[str, float]:
        """Figures of one image (1, 3, H, W) in [0, 1], of the values that an 8-bit file holds. A metric that fails is left out from here on."""
        image = quality.to_8_bit(image)
        if original is not None:
            quality.require_alike(image, original)
            original = quality.to_8_bit(original)
        figures = {}
        for name in names:
            own = name in OWN and self.by[name].startswith("fewstep_sr")
            pictures = [image, original] if METRICS[name].needs_original else [image]
            try:
                value = float(self._calls[name](*(p if own or p is None else p.to(self.device) for p in pictures)).item())
                if not math.isfinite(value):
                    raise ValueError(f"found {value} for an image")
                figures[name] = value
            except Exception as error:
                if own:
                    raise
                self._leave_out(name, error)
        return figures

    def of_folder(self, images: Sequence[Path], originals: Sequence[Path]) -> dict[str, float]:
        """Figures of all images together, against all originals (FID)."""
        figures = {}
        for name in [name for name in self._calls if METRICS[name].of_folders]:
            try:
                with TemporaryDirectory() as folder:
                    sides = [_gather(paths, Path(folder) / side) for side, paths in (("original", originals), ("image", images))]
                    figures[name] = float(self._calls[name](*map(str, sides)))
            except Exception as error:
                self._leave_out(name, error)
        return figures

    def _leave_out(self, name: str, error: Exception) -> None:
        logging.getLogger(__name__).debug("%s", name, exc_info=True)
        del self._calls[name], self.by[name]
        self.left_out[name] = f"pyiqa fails at it: {_line(error)}"


def _gather(paths: Sequence[Path], folder: Path) -> Path:
    """A folder of these images alone: a results folder may hold more than the pairs."""
    folder.mkdir()
    for number, path in enumerate(paths):
        target = folder / f"{number:06}{path.suffix}"
        try:
            target.symlink_to(path.resolve())
        except OSError:  # Windows without the right to
            shutil.copy(path, target)
    return folder


def own_version() -> str:
    """The installed package's version; a checkout that is not installed has none of its own."""
    try:
        return version("comfyui-fewstepsr")
    except PackageNotFoundError:
        return "checkout"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
