"""PNG of 16 bits a channel with colours or alpha, which Pillow does not write: its chunks, around pixels of our own."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .bare import png_chunks

_COLOR_TYPES = {2: 4, 3: 2, 4: 6}
_MODES = {2: "LA", 3: "RGB", 4: "RGBA"}
_ROWS = 64


def encode_png(values: np.ndarray, options: dict[str, Any]) -> bytes:
    """A PNG file of (H, W, 2, 3 or 4), uint16.

    Args:
        options: of Pillow's writer, for the description: icc_profile, exif, dpi, pnginfo.
    """
    height, width, channels = values.shape
    small = BytesIO()
    Image.new(_MODES[channels], (1, 1)).save(small, "PNG", **options)
    head: list[bytes] = [small.getvalue()[:8]]
    tail: list[bytes] = []
    seen = False
    for kind, body, chunk in png_chunks(small.getvalue()):
        if kind == b"IHDR":
            head.append(_chunk(kind, struct.pack(">IIBB", width, height, 16, _COLOR_TYPES[channels]) + body[10:]))
        elif kind == b"IDAT":
            seen = True
        else:
            (tail if seen else head).append(chunk)
    return b"".join([*head, *_pixels(values), *tail])


def _pixels(values: np.ndarray):
    """IDAT chunks. Each row gets the filter whose result is the smallest in absolute value, as the PNG specification advises."""
    step = 2 * values.shape[-1]
    compressor = zlib.compressobj(6)
    above = np.zeros((1, values.shape[1] * step), np.uint8)
    for first in range(0, len(values), _ROWS):
        rows = np.ascontiguousarray(values[first : first + _ROWS].astype(">u2")).view(np.uint8).reshape(-1, above.shape[1])
        up = np.concatenate([above, rows[:-1]])
        left, corner = np.zeros_like(rows), np.zeros_like(rows)
        left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
        filtered = np.stack([rows, rows - left, rows - up, rows - _average(left, up), rows - _paeth(left, up, corner)])
        cost = np.abs(filtered.view(np.int8).astype(np.int16)).sum(-1)
        best = cost.argmin(0)
        lines = np.concatenate([best[:, None].astype(np.uint8), filtered[best, np.arange(len(rows))]], -1)
        above = rows[-1:]
        if data := compressor.compress(lines.tobytes()):
            yield _chunk(b"IDAT", data)
    yield _chunk(b"IDAT", compressor.flush())


def _average(left: np.ndarray, up: np.ndarray) -> np.ndarray:
    return ((left.astype(np.uint16) + up) // 2).astype(np.uint8)


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    a, b, c = (values.astype(np.int16) for values in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    return np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
