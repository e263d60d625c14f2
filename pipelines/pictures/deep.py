"""Sixteen bits a channel, which Pillow reads in grey alone: of colours and alpha it keeps the upper eight bits.

Its unpackers know both byte orders, however, and each keeps one byte of two. Two passes, one in the file's byte order and one in the other, give the upper
and the lower bytes.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

_OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
PLANAR = 284
_PREMULTIPLIED = "RGBa;16"


def raw_mode(image: Image.Image) -> str:
    """How the file's pixels are packed, as Pillow calls it; "" after loading, and for formats that do not say."""
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    arguments = tile[0][3]
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colours or alpha of 16 bits, contiguous, that :func:`read_deep` reads."""
    raw = raw_mode(image)
    if raw[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16", _PREMULTIPLIED, "LA;16") or raw[-1] not in _OTHER:
        return False
    return getattr(image, "tag_v2", {}).get(PLANAR, 1) == 1


def read_deep(open_again, image: Image.Image) -> np.ndarray:
    """(H, W, 2, 3 or 4) in 16 bits, upright where Pillow turns while it loads (TIFF).

    Args:
        open_again: opens the same file once more.
        image: the file, opened and not loaded.
    """
    raw = raw_mode(image)
    if raw == "LA;16B":  # four bytes a pixel like RGBA, and in PNG alone, whose numbers are big-endian
        return np.ascontiguousarray(_read(image, "RGBA", "RGBA")).view(">u2").astype(np.uint16)
    kind, order = raw[:-1], raw[-1]
    kind = kind.replace("RGBa", "RGBA")
    mode = "RGB" if kind in ("RGB;16", "RGBX;16") else "RGBA"
    with open_again() as again:
        lower = np.asarray(_read(again, mode, kind + _OTHER[order]))
    values = np.asarray(_read(image, mode, kind + order)).astype(np.uint16) << 8 | lower
    return _divide_by_alpha(values) if raw.startswith(_PREMULTIPLIED) else values


def _read(image: Any, mode: str, raw: str) -> Image.Image:
    image._mode = mode
    image.tile = [_packed(tile, raw) for tile in image.tile]
    image.load()
    return image


def _packed(tile: tuple, raw: str) -> tuple:
    arguments = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)  # plain tuples before Pillow 11


def _divide_by_alpha(values: np.ndarray) -> np.ndarray:
    alpha = values[..., 3:].astype(np.float64)
    colours = np.divide(values[..., :3] * 65535.0, alpha, out=np.zeros(values[..., :3].shape), where=alpha > 0)
    values[..., :3] = colours.clip(0, 65535).round()
    return values
