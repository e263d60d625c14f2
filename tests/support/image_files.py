"""Image files that Pillow does not write, byte by byte from the formats' specifications."""

import struct
import zlib
from pathlib import Path

import numpy as np

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(row: np.ndarray, bits: int) -> bytes:
    """A row's numbers of so many bits, one behind the other."""
    digits = "".join(f"{int(v):0{bits}b}" for v in row.ravel())
    return int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8), "big")


def write_png(path: Path, values: np.ndarray, bits: int = 16, key: tuple[int, ...] = (), before: bytes = b"", after: bytes = b"") -> None:
    """(H, W, channels) with each filter by turns up to Up; ``key`` is the transparent colour, ``before`` and ``after`` chunks around the pixels."""
    height, width, channels = values.shape
    rows, above = b"", None
    for y, row in enumerate(values):
        line = np.frombuffer(packed(row, bits) if bits < 8 else row.astype(f">u{bits // 8}").tobytes(), np.uint8)
        step = max(1, channels * bits // 8)
        left = np.concatenate([np.zeros(step, np.uint8), line[:-step]])
        kind = y % 3 if y else y % 2
        rows += bytes([kind]) + (line - (0, left, above)[kind]).astype(np.uint8).tobytes()
        above = line
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOR_TYPES[channels], 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", header) + before + transparent + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff(
    path: Path,
    values: np.ndarray,
    order: str = "<",
    white_is_zero: bool = False,
    alpha: int = 2,
    orientation: int = 1,
    planar: bool = False,
    bits: int | None = None,
) -> None:
    """(H, W, 1, 3 or 4), any integer or floating-point type, uncompressed. ``alpha``: 1 multiplied into the colours, 2 not. ``bits``: of packed numbers."""
    height, width, channels = values.shape
    pixels = b"".join(packed(row, bits) for row in values) if bits else None
    bits = bits or 8 * values.dtype.itemsize
    planes = channels if planar else 1
    photometric = 2 if channels > 2 else 0 if white_is_zero else 1
    tags = [
        (256, 4, (width,)), (257, 4, (height,)), (258, 3, (bits,) * channels), (259, 3, (1,)), (262, 3, (photometric,)), (273, 4, (0,) * planes),
        (274, 3, (orientation,)), (277, 3, (channels,)), (278, 4, (height,)), (279, 4, (len(pixels),) if pixels else (values.nbytes // planes,) * planes),
        (284, 3, (1 + planar,)),
    ]  # fmt: skip
    tags += [(338, 3, (alpha,))] if channels == 4 else []
    tags += [(339, 3, ({"f": 3, "i": 2}[values.dtype.kind],) * channels)] if values.dtype.kind != "u" else []
    at = 8 + 2 + 12 * len(tags) + 4
    extra, entries = b"", b""
    offsets = {tag: len(v) * (2 if kind == 3 else 4) for tag, kind, v in tags}
    start = at + sum(size for size in offsets.values() if size > 4)
    for tag, kind, value in tags:
        value = tuple(start + i * values.nbytes // planes for i in range(planes)) if tag == 273 else value
        data = struct.pack(f"{order}{len(value)}{'H' if kind == 3 else 'I'}", *value)
        if len(data) > 4:
            entries += struct.pack(f"{order}HHII", tag, kind, len(value), at + len(extra))
            extra += data
        else:
            entries += struct.pack(f"{order}HHI", tag, kind, len(value)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    values = values.transpose(2, 0, 1) if planar else values
    path.write_bytes(head + entries + bytes(4) + extra + (pixels or values.astype(values.dtype.newbyteorder(order)).tobytes()))
