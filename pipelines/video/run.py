"""A clip, or a folder of frames, through a pipeline: to a video in segments, or to one picture a frame."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from fewstep_sr.image.sizes import VAE_MULTIPLE
from fewstep_sr.image.temporal import Steady
from fewstep_sr.video.encoding import Encoding
from fewstep_sr.video.formats import CODECS, CONTAINERS, default_codec, default_pixel_format, is_pattern, require_video_options
from fewstep_sr.video.frames import Clip, Frames
from fewstep_sr.video.segments import Segments, require_copies

from ..batch import Written
from ..jobs import Job
from ..pictures import Picture, Pixels, require_place, require_writable, write_picture
from ..pictures.record import read_record, same_result
from ..pictures.write import output_error
from ..ranges import scaled
from ..settings import Settings
from ..tiling import fitting
from .pictures import PictureFrames

Restore = Callable[[torch.Tensor], torch.Tensor]
"""Frames (B, 3, h, w) in [0, 1] to (B, 3, H, W)."""


def upscale_frames(job: Job, settings: Settings, restore: Restore, record: str, position: int = 0) -> Written:
    """Do a job whose source or result is a video. Memory is that of a few frames, however long it is.

    Args:
        record: how the result is made.
        position: line of the progress bar.

    Raises:
        ValueError: no video, or one that the result's container or codec does not hold.
        OutputError: the result cannot be written. Whole segments stay, and another run goes on from them.
    """
    source: Frames = PictureFrames(job.source, job.frames, settings.fps) if job.frames else Clip(job.source)
    if is_pattern(job.target):
        return _to_pictures(job, settings, source, restore, record, position)
    width, height = scaled(source.size, settings.scale_of(source.size))
    encoding = _encoding(job.target, settings, source, (width, height))
    index = source.index if isinstance(source, Clip) else None
    if index is not None:
        require_copies(source.path, job.target, index)
    require_place(job.target, (width, height))
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        segments = Segments(job.target, record)
        notes = ["it was begun with other settings, and is begun anew"] if segments.anew else []
        last_duration = 1
        done = len(segments.pts)
        with tqdm(total=source.count, initial=done, unit="frame", position=position, leave=False, dynamic_ncols=True) as bar:
            # The last that is there is read for its duration; what is averaged over time, from the beginning, so that a run that goes on gives the same.
            skipped = 0 if settings.steady else max(0, done - 1)
            frames = _steadied(source.read(skipped), settings)
            for _, last_duration, _ in itertools.islice(frames, done - skipped):
                pass

            def restored() -> Iterator[tuple[int, int, torch.Tensor]]:
                """A segment, in groups of its own: what goes through the networks together changes the last bits."""
                nonlocal last_duration
                for pts, last_duration, image in _restored(itertools.islice(frames, settings.segment), restore, (width, height)):
                    yield pts, last_duration, image
                    bar.update()

            while (first := next(stream := restored(), None)) is not None:
                segments.write(itertools.chain([first], stream), encoding)
        notes += segments.join(job.target, source, index, last_duration, record)
    except OSError as error:
        raise output_error(job.target, error) from error
    segments.remove()
    return Written(job.target, encoding.size, job.target.stat().st_size, (*source.notes, *notes))


def _steadied(frames: Iterator[tuple[int, int, torch.Tensor]], settings: Settings) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The frames, averaged over time where the settings want it."""
    steady = Steady() if settings.steady else None
    for pts, duration, image in frames:
        yield pts, duration, steady(image) if steady else image


def _restored(frames: Iterable[tuple[int, int, torch.Tensor]], restore: Restore, size: tuple[int, int]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Frames through the pipeline, as many at a time as go through its networks in one call."""
    frames = iter(frames)
    together = fitting(*(-(-side // VAE_MULTIPLE) for side in size))
    while group := list(itertools.islice(frames, together)):
        images = restore(torch.cat([image for _, _, image in group]))
        for (pts, duration, _), image in zip(group, images, strict=True):
            yield pts, duration, image


def _encoding(target: Path, settings: Settings, source: Frames, size: tuple[int, int]) -> Encoding:
    name = settings.codec or default_codec(CONTAINERS[target.suffix.lower()], source.deep)
    pixel_format = settings.pixel_format or default_pixel_format(CODECS[name], source.deep)
    require_video_options(target, name, settings.crf, pixel_format)
    even = size[0] + size[0] % 2, size[1] + size[1] % 2
    return Encoding(name, settings.crf, pixel_format, even, source)


def _to_pictures(job: Job, settings: Settings, source: Frames, restore: Restore, record: str, position: int) -> Written:
    """One file a frame, counted from 1; those that are there are left as they are."""
    width, height = scaled(source.size, settings.scale_of(source.size))
    bytes_written, path = 0, job.target
    missing: list[Path] = []

    def todo() -> Iterator[tuple[int, int, torch.Tensor]]:
        for number, (_, _, image) in enumerate(_steadied(source.read(), settings), 1):
            bar.update()
            path = job.target.with_name(job.target.name % number)
            if settings.overwrite or not _is_done(path, record):
                missing.append(path)
                yield 0, 0, image

    with tqdm(total=source.count, unit="frame", position=position, leave=False, dynamic_ncols=True) as bar:
        for _, _, image in _restored(todo(), restore, (width, height)):
            path = missing.pop(0)
            picture = Picture(_as_pixels(image, source.deep))
            require_writable(picture, (width, height), path)
            require_place(path, (width, height))
            write_picture(image[None], picture, path, settings.quality, record)
            bytes_written += path.stat().st_size
    return Written(path.parent, (width, height), bytes_written, tuple(source.notes))


def _is_done(path: Path, record: str) -> bool:
    found = read_record(path) if path.is_file() else None
    return found is not None and same_result(found, record)


def _as_pixels(image: torch.Tensor, deep: bool) -> Pixels:
    most, dtype = (65535, np.uint16) if deep else (255, np.uint8)
    return Pixels((rearrange(image, "c h w -> h w c").float().cpu().clamp(0, 1) * most).round().numpy().astype(dtype))
