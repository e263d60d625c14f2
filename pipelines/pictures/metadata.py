"""What a file says about its image, and what of it the result's file gets."""

import re
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128

# Description, make, model, software, date, artist, copyright. What speaks of the old file's pixels is left out.
_KEPT = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_DROPPED = (0xA002, 0xA003, 0x927C, 0xA005)  # width, height, the maker's note, whose offsets break, and the pointer behind it

_EXIF_HEADER = 20
"""Bytes of EXIF that says nothing."""

_XMP_TEXT = "XML:com.adobe.xmp"
_OF_OLD_PIXELS = rb"tiff:Orientation|tiff:ImageWidth|tiff:ImageLength|exif:PixelXDimension|exif:PixelYDimension"


class _Text(str):
    """EXIF's text: bytes, mostly of UTF-8, that Pillow reads as Latin-1 and writes as ASCII. Written as the same bytes again."""

    def encode(self, *_: str) -> bytes:
        return super().encode("latin-1", "replace")


@dataclass(frozen=True)
class Metadata:
    """What goes into the result's file beside its pixels.

    Args:
        exif: EXIF's tags, by directory: 0 for the first one, ``EXIF_IFD``, ``GPS_IFD``.
        dpi: pixels an inch, across and down.
        xmp: the packet, without what speaks of the old pixels.
        text: of PNG, by keyword.
        comment: of JPEG and GIF.
        notes: what could not be kept, and why.
    """

    icc_profile: bytes | None = None
    exif: dict[int, dict[int, Any]] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
    comment: bytes | None = None
    notes: tuple[str, ...] = ()


def read_metadata(image: Image.Image) -> Metadata:
    """The description of an image that is loaded. Nothing in it can raise: what is broken is left out and named."""
    exif, notes = _read_exif(image)
    comment = image.info.get("comment")
    return Metadata(
        icc_profile=image.info.get("icc_profile") or None,
        exif=exif,
        dpi=_resolution(image),
        xmp=_read_xmp(image),
        text=_read_text(image),
        comment=comment if isinstance(comment, bytes) else None,
        notes=tuple(notes),
    )


def _read_exif(image: Image.Image) -> tuple[dict[int, dict[int, Any]], list[str]]:
    try:
        exif = image.getexif()
        directories = {0: {tag: _tag(exif, tag) for tag in _KEPT if tag in exif}}
    except Exception as error:
        return {}, [f"its EXIF cannot be read ({error or type(error).__name__}) and is left out"]
    notes = []
    if len(image.info.get("exif") or b"") > _EXIF_HEADER and not len(exif):  # Pillow raises over it once, and then finds it empty
        return {}, ["its EXIF cannot be read and is left out"]
    for directory in (EXIF_IFD, GPS_IFD):
        try:
            directories[directory] = {tag: value for tag, value in exif.get_ifd(directory).items() if tag not in _DROPPED}
        except Exception as error:
            notes.append(f"its EXIF directory {directory:#06x} cannot be read ({error or type(error).__name__}) and is left out")
    whole: dict[int, dict[int, Any]] = {}
    for directory, tags in directories.items():
        good = {
            tag: _Text(value) if isinstance(value, str) else value
            for tag, value in tags.items()
            if value is not None and can_be_written(directory, tag, value)
        }
        if len(good) < len(tags):
            bad = ", ".join(f"{tag:#06x}" for tag in tags if tag not in good)
            notes.append(f"its EXIF entries {bad} are broken and are left out")
        if good:
            whole[directory] = good
    return whole, notes


def _tag(exif: Image.Exif, tag: int) -> Any:
    try:
        return exif[tag]
    except Exception:
        return None


def can_be_written(directory: int, tag: int, value: Any) -> bool:
    try:
        exif_bytes({directory: {tag: value}})
    except Exception:  # of whatever type the value is, the entry has another
        return False
    return True


def exif_bytes(directories: dict[int, dict[int, Any]]) -> bytes:
    """As JPEG, PNG and WebP hold it; empty where there is nothing."""
    exif = Image.Exif()
    for directory, tags in directories.items():
        if directory == 0:
            for tag, value in tags.items():
                exif[tag] = value
        elif tags:
            exif[directory] = dict(tags)
    return exif.tobytes() if len(exif) else b""


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    try:
        if image.format in ("JPEG", "MPO") and not image.info.get("jfif_unit") and X_RESOLUTION not in image.getexif():
            return None  # Pillow says 72 where the file says nothing
        if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:  # type: ignore[attr-defined]
            return None  # and 1 here
        across, down = (float(value) for value in image.info["dpi"])
    except Exception:  # none, or none that is two numbers
        return None
    return (across, down) if 1 <= across <= 65535 and 1 <= down <= 65535 else None


def _read_xmp(image: Image.Image) -> bytes | None:
    xmp = image.info.get("xmp") or image.info.get(_XMP_TEXT)
    if isinstance(xmp, str):
        xmp = xmp.encode(errors="replace")
    if not isinstance(xmp, bytes) or not xmp.strip(b"\0 \n"):
        return None
    # As an attribute, and as an element.
    xmp = re.sub(rb"\s(?:" + _OF_OLD_PIXELS + rb")\s*=\s*(?:\"[^\"]*\"|'[^']*')", b"", xmp)
    return re.sub(rb"<(" + _OF_OLD_PIXELS + rb")>[^<]*</\1>", b"", xmp)


def _read_text(image: Image.Image) -> dict[str, str]:
    """A PNG's text, but for other programs' ways to keep EXIF, XMP and profiles in it."""
    try:
        text = getattr(image, "text", None) or {}
    except Exception:  # already noted when the image was loaded
        return {}
    return {key: value for key, value in text.items() if key != _XMP_TEXT and not key.startswith("Raw profile type")}
