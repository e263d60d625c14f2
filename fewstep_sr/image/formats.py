"""Kinds of image files: which are written, which are read, and which are known but cannot be read."""

from functools import cache

from PIL import Image, features

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Suffixes of results, and Pillow's names of their formats."""

WRITTEN = FORMATS | {".jfif": "JPEG", ".jpe": "JPEG"}
"""Suffixes that a result keeps from its source."""

DEEP = ("PNG", "TIFF")
"""Formats that are written with 16 bits a channel, where the source has them."""

_READERS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
"""All that is opened, whatever a file is called. Others stay shut: Pillow hands PostScript, for one, to an interpreter."""

_ALSO_READ = (".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga")
_BY_FEATURE = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".jpx", ".jpf")}

_NOT_READ = (
    *(".heic", ".heif", ".hif", ".jxl", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".svg", ".eps", ".ai", ".ico", ".dds", ".pcx", ".avifs"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)


@cache
def readable() -> frozenset[str]:
    """Suffixes, in lower case, of what this Pillow reads."""
    return frozenset(WRITTEN).union(_ALSO_READ, *(suffixes for feature, suffixes in _BY_FEATURE.items() if feature in features.get_supported()))


@cache
def unreadable() -> frozenset[str]:
    """Suffixes of images that are not read: named where they are met, so that nobody takes them for done."""
    return frozenset(_NOT_READ).union(*_BY_FEATURE.values()) - readable()


@cache
def readers(suffix: str) -> tuple[str, ...]:
    """Formats to try on a file. Targa has no signature, so that only the suffix tells it from any other bytes."""
    Image.init()
    names = (*_READERS, "TGA") if suffix.lower() == ".tga" else _READERS
    return tuple(name for name in names if name in Image.OPEN)
