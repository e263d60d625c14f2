"""Frames out of a video's file one after another: as RGB, upright, with the time of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange

_SD_HEIGHT = 576
"""Up to here, where a file does not name its matrix, players take BT.601, above it BT.709."""

_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
"""FFmpeg's colour spaces (ISO/IEC 23091-2) that are a matrix, and swscale's numbers of them: BT.709, FCC, BT.601 twice, SMPTE 240M, BT.2020."""

_UNKNOWN = 2
LIMITED, FULL = 1, 2

SWSCALE = 0x4 | 0x2000 | 0x4000 | 0x40000
"""Bicubic, with full chroma interpolation in and out and accurate rounding: without these chroma is off by ten times as much."""

RGB16_WHITE = 255 * 256
"""White in swscale's RGB of 16 bits where YUV is on the other side: 8 bits shifted, not stretched."""


@dataclass(frozen=True)
class Colors:
    """How a video's numbers become colours, by the numbers of ISO/IEC 23091-2; 2 is unspecified. Ranges: 1 limited, 2 full."""

    matrix: int = 1
    range: int = LIMITED
    primaries: int = 1
    transfer: int = 1

    @property
    def swscale(self) -> int:
        return _MATRICES[self.matrix]


class Frames(Protocol):
    """A source of frames.

    Attributes:
        path: the file or folder.
        size: (width, height) of the upright frames.
        time_base: seconds that a timestamp counts in.
        rate: frames a second, on average.
        count: how many, as far as known before; None where not.
        deep: more than 8 bits.
        sample_aspect_ratio: width of a pixel by its height.
        notes: what is not kept.
        origin: timestamp in the file of what counts as 0; known once the first frame was read.
        end: timestamp in the file at which the source ends; None for the file's own end.
    """

    path: Path
    size: tuple[int, int]
    time_base: Fraction
    rate: Fraction
    deep: bool
    colors: Colors
    sample_aspect_ratio: Fraction
    notes: list[str]
    origin: int
    end: int | None

    @property
    def count(self) -> int | None: ...

    def read(self, skip: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Timestamp, duration and RGB (1, 3, H, W) in [0, 1] of each frame but the first ``skip``. Timestamps rise."""
        ...


def require_av() -> Any:
    """PyAV.

    Raises:
        RuntimeError: it is missing or broken.
    """
    try:
        import av
    except Exception as error:
        raise RuntimeError(f"Video needs PyAV, which cannot be imported ({error or type(error).__name__}). Install it: pip install av.") from error
    return av


class Clip:
    """A video's file, or a part of it, whose first frame then is at time 0. The stream is the first that is no cover picture.

    Args:
        start: seconds from which frames count.
        duration: seconds until the part's end; 0 for the file's.

    Raises:
        ValueError: no video, a damaged one, or one whose colours have no matrix.
    """

    def __init__(self, path: Path, start: float = 0.0, duration: float = 0.0):
        self._av = require_av()
        self.path = path
        self.notes: list[str] = []
        with self._open() as container:
            stream = self._stream(container)
            self.index = stream.index
            first = next(iter(self._decode(container, stream)), None)
            if first is None:
                raise ValueError("no frame of it can be decoded.")
            self._orient = _orientation(first)
            width, height = first.width, first.height
            self.size = (height, width) if self._orient[0] else (width, height)
            self._coded = (width, height)
            self.time_base = stream.time_base
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self._step = max(1, round(1 / (self.rate * self.time_base)))
            self.origin = 0
            self._start = int(start / self.time_base) if start or duration else None
            self.end = int((start + duration) / self.time_base) if duration else None
            self.count: int | None = stream.frames or _count(stream, container, self.rate)
            if self.count and self._start is not None:
                self.count = max(1, min(round(duration * self.rate) or self.count, self.count - round(start * self.rate)))
            self.deep = first.format.components[0].bits > 8
            aspect = stream.sample_aspect_ratio or Fraction(1)
            self.sample_aspect_ratio = 1 / aspect if self._orient[0] else aspect
            self._rgb = first.format.is_rgb
            self.colors = self._colors(first)
            if first.interlaced_frame:
                self.notes.append("it is interlaced, and its frames are taken whole: deinterlace it first")
            if len(first.format.components) in (2, 4):
                self.notes.append("its transparency is left out")

    def _open(self):
        try:
            return self._av.open(str(self.path), metadata_errors="replace")
        except self._av.error.FFmpegError as error:
            raise ValueError(f"it cannot be read as a video ({error.strerror}).") from error

    def _stream(self, container):
        streams = [s for s in container.streams.video if not s.disposition & self._av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError("it has no video stream.")
        streams[0].thread_type = "AUTO"
        return streams[0]

    def _colors(self, frame) -> Colors:
        matrix = int(frame.colorspace)
        if self._rgb or matrix == _UNKNOWN:
            matrix = 6 if frame.height <= _SD_HEIGHT and not self._rgb else 1
        if matrix not in _MATRICES:
            raise ValueError(f"its colours have the matrix number {matrix} (ISO/IEC 23091-2), which is not read. Convert it to BT.709 first.")
        limited = self._rgb or int(frame.color_range) != FULL
        if frame.format.name.startswith("yuvj"):
            limited = False
        return Colors(matrix, LIMITED if limited else FULL, int(frame.color_primaries), int(frame.color_trc))

    def _decode(self, container, stream):
        """Frames of the stream; what cannot be decoded is passed over, and said."""
        broken = 0
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except self._av.error.FFmpegError:
                broken += 1
                if broken == 1:
                    self.notes.append("damaged parts of it are passed over")

    def read(self, skip: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
        last, number = None, 0
        with self._open() as container:
            stream = container.streams[self.index]
            if self._start:
                container.seek(self._start, stream=stream)
            for frame in self._decode(container, stream):
                # A file without timestamps, or with one twice: the next at the usual distance.
                pts = frame.pts if frame.pts is not None and (last is None or frame.pts > last) else (0 if last is None else last + self._step)
                last = pts
                if self._start is not None and pts < self._start:
                    continue
                if self.end is not None and pts >= self.end:
                    return
                if self._start is not None and number == 0:
                    self.origin = pts
                number += 1
                if number > skip:
                    yield pts - self.origin, frame.duration or self._step, self._tensor(frame)

    def _tensor(self, frame) -> torch.Tensor:
        width, height = self._coded
        rgb = frame.reformat(
            width=width,  # a stream may change its size
            height=height,
            format="rgb48le",
            src_colorspace=self.colors.swscale,
            src_color_range=FULL if self._rgb else self.colors.range,
            dst_color_range=FULL,
            interpolation=SWSCALE,
        ).to_ndarray()
        swapped, across, down = self._orient
        if swapped:
            rgb = rgb.swapaxes(0, 1)
        rgb = rgb[:: -1 if down else 1, :: -1 if across else 1]
        white = 65535 if self._rgb else RGB16_WHITE
        tensor = torch.from_numpy(rgb.astype(np.float32)) / white
        return rearrange(tensor, "h w c -> 1 c h w").clamp(0, 1)


def _orientation(frame) -> tuple[bool, bool, bool]:
    """What turns a frame upright, by its display matrix: axes exchanged, then mirrored across and down."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return (False, a < 0, d < 0) if abs(a) >= abs(b) else (True, c < 0, b < 0)
    return False, False, False


def _count(stream, container, rate: Fraction) -> int | None:
    seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    return round(seconds * rate) or None
