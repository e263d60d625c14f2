"""A file's image data without its descriptions, for files whose descriptions cannot be read."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_DESCRIPTIONS = (*range(0xE0, 0xEE), 0xEF, 0xFE)  # without APP14, which says how the colours are stored
_ICC = b"ICC_PROFILE\0"


def without_descriptions(path: Path) -> BytesIO | None:
    """The file without text, EXIF and the like, if it is a PNG or JPEG; the colour profile stays where it is whole."""
    data = path.read_bytes()
    if data.startswith(_PNG):
        return BytesIO(_bare_png(data))
    if data.startswith(b"\xff\xd8"):
        return BytesIO(_bare_jpeg(data))
    return None


def png_chunks(data: bytes):
    """Kinds of a PNG's chunks, their data, and the whole chunks."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + length], data[at : at + 12 + length]
        at += 12 + length


def _bare_png(data: bytes) -> bytes:
    return _PNG + b"".join(chunk for kind, body, chunk in png_chunks(data) if kind in _PNG_KEPT or (kind == b"iCCP" and _is_whole(body, chunk)))


def _is_whole(body: bytes, chunk: bytes) -> bool:
    try:
        zlib.decompress(body[body.index(b"\0") + 2 :])
    except (ValueError, zlib.error):
        return False
    return struct.unpack(">I", chunk[-4:])[0] == zlib.crc32(chunk[4:-4])


def _bare_jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        length = 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] == 0xDA:  # the pixels from here on
            break
        if data[at + 1] not in _JPEG_DESCRIPTIONS or data[at + 4 : at + length].startswith(_ICC):
            kept.append(data[at : at + length])
        at += length
    return b"".join(kept) + data[at:]
