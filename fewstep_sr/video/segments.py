"""Segments of an encoded video: each whole or not there, so that a run that was cut goes on at the last; joined without encoding again."""

import heapq
import io
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import remove_stale, written_whole
from .encoding import SHIFT, Encoding
from .formats import CONTAINERS
from .frames import Frames, require_av

_NOT_KEPT = ("encoder", "major_brand", "minor_version", "compatible_brands", "comment")
_OF_STREAMS = ("language", "title", "handler_name")


class Segments:
    """The segments of a result, in a folder beside it that is gone when the result is there.

    Args:
        record: how the result is made; segments of another record are begun anew.
    """

    def __init__(self, target: Path, record: str):
        self.folder = target.with_name(f".{target.name[:200]}.segments")
        self._record_file = self.folder / "record.txt"
        self.anew = self.folder.is_dir() and (not self._record_file.is_file() or self._record_file.read_text(encoding="utf-8") != record)
        if self.anew:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale(self.folder)
        with written_whole(self._record_file) as partial:
            partial.write_text(record, encoding="utf-8")
        self.pts = array("q")
        """Of the frames that are there, each segment's in the order in which they are decoded."""
        self.files: list[Path] = []
        while (path := self._path(len(self.files))).is_file():
            self._add(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.nut"  # whatever container it is: files are known by their content

    def _add(self, path: Path) -> None:
        self.pts.extend(packet.pts for packet in _packets(path, None))
        self.files.append(path)

    def write(self, frames: Iterable[tuple[int, int, torch.Tensor]], encoding: Encoding) -> None:
        """Encode frames, each (3, H, W), as the next segment, which begins with a key frame."""
        path, kind = self._path(len(self.files)), encoding.codec.segments
        # In QuickTime's container the time before the first frame is counted in the file's own time base.
        options = {"movie_timescale": str(encoding.source.time_base.denominator)} if kind == "mov" else {}
        with written_whole(path) as partial, require_av().open(str(partial), "w", format=kind, options=options) as container:
            stream = encoding.open(container)
            for pts, duration, image in frames:
                container.mux(stream.encode(encoding.frame(image, pts, duration)))
            container.mux(stream.encode())
        self._add(path)

    def join(self, target: Path, source: Frames, index: int | None, last_duration: int, record: str) -> list[str]:
        """Write the result: the segments as one stream in the place of stream ``index`` of ``source``'s file, and all else of that file.

        Returns:
            What could not be kept.
        """
        av = require_av()
        container = CONTAINERS[target.suffix.lower()]
        options = {"movflags": "+faststart"} if container in ("mp4", "mov") else {}
        with (
            written_whole(target) as partial,
            av.open(str(self.files[0])) as template,
            av.open(str(partial), "w", format=container, options=options) as output,
        ):
            original = av.open(str(source.path), metadata_errors="replace") if index is not None else None
            try:
                notes = _write(output, template.streams.video[0], self, original, index, source, last_duration, record)
            finally:
                if original is not None:
                    original.close()
        return notes

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(output, template, segments: Segments, original, index: int | None, source: Frames, last_duration: int, record: str) -> list[str]:
    notes: list[str] = []
    outputs: dict[int, Any] = {}
    video = None
    for stream in original.streams if original is not None else ():
        if stream.index == index:
            video = _add_video(output, template)
            _describe(video, stream)
        elif (copied := _add_copy(output, stream)) is not None:
            outputs[stream.index] = copied
            _describe(copied, stream)
        elif stream.type != "attachment" or not _attach(output, stream):
            notes.append(f"its stream {stream.index} ({_named(stream)}) is left out: {output.format.name} does not hold it")
    if video is None:
        video = _add_video(output, template)
    if original is not None:
        output.metadata.update({key: value for key, value in original.metadata.items() if key.lower() not in _NOT_KEPT})
        whole = not source.origin and source.end is None
        if whole and hasattr(output, "set_chapters") and (chapters := original.chapters()):
            output.set_chapters(chapters)
    comment = next((value for key, value in original.metadata.items() if key.lower() == "comment"), "") if original is not None else ""
    output.metadata["comment"] = "\n".join(filter(None, (comment, record)))
    packets = [_video_packets(segments, source.time_base, last_duration, video)]
    if outputs:
        packets.append(_copied_packets(original, outputs, source))
    damaged: Counter[str] = Counter()
    errors = require_av().error
    for packet in heapq.merge(*packets, key=lambda packet: packet.dts * packet.time_base):
        stream = packet.stream
        try:
            output.mux(packet)
        except (errors.InvalidDataError, errors.PatchWelcomeError):  # of sound that comes in another form into this container
            if stream is video:
                raise
            damaged[_named(stream)] += 1
    notes += [f"{count} damaged packets of its stream ({name}) are left out" for name, count in damaged.items()]
    return notes


def _add_video(output, template) -> Any:
    stream = output.add_stream_from_template(template, opaque=True)  # copied: there need be no encoder of the decoder's name, as for AV1
    if template.codec_context.name == "hevc" and output.format.name in ("mp4", "mov"):
        stream.codec_tag = "hvc1"  # without which Apple's players show nothing
    return stream


def _add_copy(output, stream) -> Any:
    """The same stream in the output; None where its container does not hold it."""
    if stream.type not in ("audio", "subtitle"):
        return None
    try:
        return output.add_stream_from_template(stream)
    except ValueError:
        return None


def _attach(output, stream) -> bool:
    if output.format.name != "matroska" or not hasattr(output, "add_attachment"):
        return False
    output.add_attachment(stream.metadata.get("filename", "attachment"), stream.mimetype or "application/octet-stream", stream.data)
    return True


def _named(stream) -> str:
    codec = getattr(stream.codec_context, "name", None) if stream.codec_context else None
    return f"{stream.type}, {codec}" if codec else stream.type


def _describe(stream, original) -> None:
    stream.metadata.update({key: value for key, value in original.metadata.items() if key.lower() in _OF_STREAMS})
    stream.disposition = original.disposition


def require_copies(path: Path, target: Path, index: int) -> None:
    """Refuse, before the work is done, a container that would lose sound or subtitles.

    Raises:
        ValueError: as said.
    """
    av = require_av()
    container = CONTAINERS[target.suffix.lower()]
    with av.open(str(path), metadata_errors="replace") as original, av.open(io.BytesIO(), "w", format=container) as output:
        for stream in original.streams:
            if stream.index != index and stream.type in ("audio", "subtitle") and _add_copy(output, stream) is None:
                raise ValueError(f"its {_named(stream)} stream does not go into {target.suffix}. Give a name that ends in .mkv with -o.")


def _packets(path: Path, time_base: Fraction | None) -> Iterator[Any]:
    """A segment's packets; timestamps in ``time_base``."""
    with require_av().open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.pts is None:  # the one that flushes decoders
                continue
            if time_base is not None:
                packet.pts = round(packet.pts * packet.time_base / time_base) - SHIFT
                packet.time_base = time_base
            yield packet


def _video_packets(segments: Segments, time_base: Fraction, last_duration: int, stream) -> Iterator[Any]:
    """All segments' packets with the durations and decoding times of one stream.

    Each encoder began anew and knows nothing of its neighbours, and its decoding times overlap with theirs where rates vary. So they are
    counted anew: frame i in decoding order is decoded at the i-th time of presentation, earlier by as many frames as order changes at most.
    """
    every = np.array(array("q", (packet.pts for path in segments.files for packet in _packets(path, time_base))))
    order = np.sort(every)
    ranks = np.searchsorted(order, every)
    delay = int((np.arange(len(every)) - ranks).max())
    number = 0
    for path in segments.files:
        for packet in _packets(path, time_base):
            after = ranks[number] + 1
            packet.duration = int(order[after]) - packet.pts if after < len(order) else last_duration
            packet.dts = int(order[number - delay]) if number >= delay else int(order[0]) - delay + number
            number += 1
            if number == len(order) and stream.container.format.name in ("mp4", "mov"):  # which take the end of decoding for the stream's
                packet.duration = int(order[-1]) + last_duration - delay - packet.dts
            packet.stream = stream
            yield packet


def _copied_packets(original, outputs: dict[int, Any], source: Frames) -> Iterator[Any]:
    """Packets of the streams that go along: of a part of a file, those of its time, moved with it."""
    last: dict[int, int] = {}
    begin, end = source.origin * source.time_base, None if source.end is None else source.end * source.time_base
    for packet in original.demux([stream for stream in original.streams if stream.index in outputs]):
        if packet.dts is None or packet.size == 0:
            continue
        stream = packet.stream_index
        if packet.dts < last.get(stream, packet.dts):  # a broken file's: containers take rising times alone
            continue
        last[stream] = packet.dts
        time = packet.dts * packet.time_base
        if (begin and time < begin) or (end is not None and time >= end):
            continue
        if begin:
            shift = round(begin / packet.time_base)
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
        packet.stream = outputs[stream]
        yield packet
