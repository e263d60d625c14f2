"""Frames of RGB into the packets of an encoder: its options, the format and colours of its frames, and what it shall not do to the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from einops import rearrange

from .formats import CODECS, Codec
from .frames import FULL, RGB16_WHITE, SWSCALE, Frames, require_av

SHIFT = 2**32
"""Added to a segment's timestamps: reordered frames would have negative decoding times, around which muxers move the whole segment."""

_REPEATABLE = {"libx264": {"x264-params": "asm=avx2"}} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}
"""x264's MB-tree in AVX-512 reads past the macroblocks of a row unless their number is a multiple of 8 (mbtree_propagate_list in x264 of 2024): two runs
differ in rates and bits. That in AVX2 takes as long."""


class Encoding:
    """How frames are encoded.

    Args:
        codec: a key of :data:`fewstep_sr.video.formats.CODECS`.
        crf: None for the codec's default.
        size: (width, height).
    """

    def __init__(self, codec: str, crf: float | None, pixel_format: str, size: tuple[int, int], source: Frames):
        self.codec: Codec = CODECS[codec]
        self.pixel_format, self.size, self.source = pixel_format, size, source
        self.crf = crf if crf is not None else self.codec.crf[0] if self.codec.crf else None

    def open(self, container) -> Any:
        """The stream of a container that is written."""
        options = {**self.codec.options, **_REPEATABLE.get(self.codec.encoder, {})}
        if self.crf is not None:
            options["crf"] = f"{self.crf:g}"
        stream = container.add_stream(self.codec.encoder, rate=self.source.rate, options=options)
        context, colors = stream.codec_context, self.source.colors
        stream.width, stream.height = self.size
        stream.pix_fmt = self.pixel_format
        context.time_base = self.source.time_base
        context.sample_aspect_ratio = self.source.sample_aspect_ratio
        context.colorspace, context.color_range = colors.matrix, colors.range
        context.color_primaries, context.color_trc = colors.primaries, colors.transfer
        with _same_priority():
            context.open()
        return stream

    def frame(self, image: torch.Tensor, pts: int, duration: int) -> Any:
        """A frame of the codec's own format of RGB (3, H, W) in [0, 1]. A side that would be odd has had its last row or column repeated."""
        av, colors = require_av(), self.source.colors
        rgb = rearrange(image, "c h w -> h w c").float().cpu().clamp(0, 1)
        deep = "10" in self.pixel_format
        values = (rgb * (RGB16_WHITE if deep else 255)).round().numpy().astype(np.uint16 if deep else np.uint8)
        width, height = self.size
        values = np.pad(values, ((0, height - values.shape[0]), (0, width - values.shape[1]), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb48le" if deep else "rgb24").reformat(
            format=self.pixel_format,
            dst_colorspace=colors.swscale,
            src_color_range=FULL,
            dst_color_range=colors.range,
            interpolation=SWSCALE,
        )
        frame.color_primaries, frame.color_trc = colors.primaries, colors.transfer
        frame.pts, frame.time_base, frame.duration = pts + SHIFT, self.source.time_base, duration
        return frame


@contextmanager
def _same_priority() -> Iterator[None]:
    """Whatever is opened inside, the process keeps its priority. Run by root, SVT-AV1 gives its threads and the one that opens it real-time priority and
    leaves it so: for hours nothing else on the machine would run beside them.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != before[0]:
            for thread in os.listdir("/proc/self/task"):
                with suppress(OSError):  # it has ended
                    os.sched_setscheduler(int(thread), *before)
