"""What numbers and names the options of ``upscale`` take: said at once, before weights are looked for."""

import math
import sys
from collections.abc import Sequence
from numbers import Real
from reprlib import repr as shorten
from typing import TYPE_CHECKING

from fewstep_sr.video.formats import CONTAINERS, require_video_options

if TYPE_CHECKING:
    from .jobs import Job
    from .settings import Settings


LONGEST_SIDE = 2**31 - 1
"""Pixels of the longest side that any format holds, PNG's."""


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) times ``scale``, in whole pixels.

    Raises:
        ValueError: ``scale`` is no finite number above 0, leaves nothing of the picture, or makes a side of more than :data:`LONGEST_SIDE`.
    """
    if not isinstance(scale, Real) or not 0 < scale < math.inf:
        raise ValueError(f"scale: found {scale!r}, expected a finite number above 0.")
    if max(size) * scale > LONGEST_SIDE:
        raise ValueError(f"scale: found {scale:g}, which makes more than {LONGEST_SIDE} pixels a side of a picture of {size[0]} x {size[1]} pixels.")
    width, height = (round(side * scale) for side in size)
    if min(width, height) < 1:
        raise ValueError(f"scale: found {scale:g}, which leaves nothing of a picture of {size[0]} x {size[1]} pixels.")
    return width, height


def require_ranges(settings: "Settings") -> None:
    """Refuse what no image could be done with.

    Raises:
        ValueError: an option is out of its range, or names a device that is not there.
    """
    if not 0 < settings.scale < math.inf:
        raise ValueError(f"--scale: found {settings.scale:g}, expected a finite number of more than 0.")
    if settings.scale > LONGEST_SIDE:
        raise ValueError(f"--scale: found {settings.scale:g}, which makes more than {LONGEST_SIDE} pixels a side of any picture.")
    for option, side in (("--long-side", settings.long_side), ("--short-side", settings.short_side)):
        if side is not None and not 1 <= side <= LONGEST_SIDE:
            raise ValueError(f"{option}: found {shorten(side)}, expected a number of pixels from 1 to {LONGEST_SIDE}.")
    if settings.megapixels is not None and not 0 < settings.megapixels < math.inf:
        raise ValueError(f"--megapixels: found {settings.megapixels:g}, expected a finite number of more than 0, such as 2.")
    if not math.isfinite(settings.cfg):
        raise ValueError(f"--cfg: found {settings.cfg:g}, expected a finite number.")
    if settings.cfg != 1 and not settings.method.guided:
        step = settings.method.one_step
        controls = " and ".join("--" + name.replace("_", "-") for name in (step.controls if step else ()))
        raise ValueError(
            f"--cfg: found {settings.cfg:g}, expected 1: {settings.method.title} has no negative prompt. Leave it out"
            + (f", and say with {controls} how much is restored." if controls else ".")
        )
    if not 0 <= settings.seed < 2**64:
        raise ValueError(f"--seed: found {shorten(settings.seed)}, expected 0 to 2**64 - 1.")
    if not 1 <= settings.quality <= 100:
        raise ValueError(f"--quality: found {shorten(settings.quality)}, expected 1 to 100.")
    if settings.tile and (settings.tile < 256 or settings.tile % 64):
        raise ValueError(f"--tile: found {shorten(settings.tile)}, expected a multiple of 64 from 256 on, or 0 for whole pictures.")
    if settings.fps <= 0:
        raise ValueError(f"--fps: found {settings.fps}, expected a number of more than 0.")
    if settings.crf is not None and not math.isfinite(settings.crf):
        raise ValueError(f"--crf: found {settings.crf:g}, expected a finite number.")
    if settings.segment < 1:
        raise ValueError(f"--segment: found {shorten(settings.segment)}, expected 1 frame or more.")
    if settings.output is not None and settings.output.suffix.lower() in CONTAINERS:
        require_video_options(settings.output, settings.codec, settings.crf, settings.pixel_format)
    if settings.compile and settings.offload:
        raise ValueError(
            "--compile: found it with --offload, which moves the networks between calls, expected one of them. Leave out one or the other."
        )
    if settings.device is not None and settings.ray is None:  # which is the workers'
        require_device(settings.device)


def require_device(name: str) -> None:
    """Refuse a device that is none, or that this machine lacks.

    Raises:
        ValueError: as said.
    """
    import torch  # takes a second that --help need not

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        have = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = ["cpu", *([have.type] if have else [])]
        if have and torch.accelerator.device_count() > 1:
            here += [f"{have.type}:{i}" for i in range(torch.accelerator.device_count())]
        raise ValueError(f"--device: found {name!r}, expected one that this machine has: {', '.join(here)}.") from error
    if device.type == "meta":
        raise ValueError("--device: found 'meta', which holds no values. Choose cpu, cuda or mps.")


def say_ignored_of_videos(settings: "Settings", jobs: Sequence["Job"]) -> None:
    """Say on stderr which options are for videos, where there is none.

    Raises:
        ValueError: ``steady`` is among them, whose results would not be what was asked for.
    """
    if any(job.is_video for job in jobs):
        return
    if settings.steady:
        raise ValueError("--steady: found pictures alone, expected a video, or -o with a video's name for a folder of frames. Leave it out.")
    given = {name: getattr(settings, name) for name in ("codec", "crf", "pixel_format", "fps", "segment")}
    for name, value in given.items():
        if value != getattr(type(settings), name):
            print(f"--{name.replace('_', '-')} is ignored: it is for videos, and these are pictures.", file=sys.stderr)


def say_ignored(settings: "Settings") -> None:
    """Say on stderr which options change nothing."""
    if settings.negative_prompt is not None and settings.cfg == 1:
        print("--negative-prompt is ignored: it has an effect only if --cfg is not 1.", file=sys.stderr)
    if settings.options.get("dape") is not None and settings.options.get("tagger") is None:
        print("--dape is ignored without --tagger.", file=sys.stderr)
    for companion in settings.method.companions:
        if settings.options.get(companion.option) is not None and not companion.is_needed(settings.options):
            saying = " and ".join(f"--{name}" for name in companion.replaced_by)
            print(f"--{companion.option} is ignored: {saying} say what it would.", file=sys.stderr)
    if settings.demo and settings.dtype not in (None, "float32"):
        print("--dtype is ignored: the miniature computes in float32.", file=sys.stderr)
    if settings.demo and settings.download:
        print("--download is ignored: the miniature comes with this package.", file=sys.stderr)
    steps, timesteps = settings.options.get("steps"), settings.options.get("timesteps")
    published = settings.method.schedule.published if settings.method.schedule else {}
    if timesteps and steps not in (None, 1):
        print("--steps is ignored: --timesteps says which.", file=sys.stderr)
    suffix = settings.suffix or (settings.output.suffix.lower() if settings.output else "")
    if suffix in (".png", ".tif", ".tiff") and settings.quality != 95:
        print(f"--quality is ignored: {suffix[1:].upper()} loses nothing.", file=sys.stderr)
    if steps and not timesteps and published and steps not in published:
        print(f"--steps {steps}: {settings.method.title} is published with 1 to {max(published)}; these are evenly spaced.", file=sys.stderr)
