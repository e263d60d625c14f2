"""Picture files: read upright, with alpha, profile and description apart; written whole or not at all."""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Description, make, model, software, date, artist, copyright. What speaks of the old file's pixels is left out.
_EXIF_KEPT = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_EXIF_DROPPED = (0xA002, 0xA003, 0x927C)  # width, height, and the maker's note, whose offsets break


@dataclass(frozen=True)
class Picture:
    """A picture as read: RGB pixels, its alpha if any, and what goes into the result's file beside them."""

    image: Image.Image
    alpha: Image.Image | None
    gray: bool
    icc_profile: bytes | None
    exif: bytes


def read_picture(path: Path) -> Picture:
    """Read a picture and turn it upright.

    The colours stay in the file's own RGB or grey profile, which the result gets, too; others (CMYK, Lab) are brought to sRGB.

    Raises:
        OSError, ValueError: no picture, damaged, or of a kind that would lose something.
    """
    with Image.open(path) as opened:
        if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":  # a camera's MPO is a JPEG with previews
            raise ValueError(f"it has {opened.n_frames} frames or pages, expected one. Take it apart first.")
        upright = ImageOps.exif_transpose(opened)
        exif = _described(upright.getexif())
        profile = opened.info.get("icc_profile")
    if upright.mode.startswith("I;16") or upright.mode == "I":
        upright = _to_eight_bit(upright)
    if upright.mode == "F":
        raise ValueError("it has floating-point pixels, whose range is unknown. Save it with 8 or 16 bits first.")
    has_alpha = upright.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in upright.info
    gray = upright.mode in ("1", "L", "LA", "La")
    if upright.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        upright, profile = _to_srgb(upright, profile), None
    alpha = upright.convert("RGBA").getchannel("A") if has_alpha else None
    return Picture(upright.convert("RGB"), alpha, gray, profile, exif)


def _to_eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"it has values from {values.min()} to {values.max()}, expected 8 or 16 bits without sign.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile is None:
        return image.convert("RGB")
    return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB")


def _described(exif: Image.Exif) -> bytes:
    kept = Image.Exif()
    for tag in _EXIF_KEPT:
        if tag in exif:
            kept[tag] = exif[tag]
    for ifd in (_EXIF_IFD, _GPS_IFD):
        if tags := {k: v for k, v in exif.get_ifd(ifd).items() if k not in _EXIF_DROPPED}:
            kept[ifd] = tags
    return kept.tobytes() if len(kept) else b""


def require_writable(picture: Picture, size: tuple[int, int], path: Path) -> None:
    """Refuse, before the work is done, what the output's format cannot hold. ``size`` is (width, height)."""
    kind = FORMATS[path.suffix.lower()]
    if picture.alpha is not None and kind == "JPEG":
        raise ValueError("it has transparency, which JPEG cannot hold. Choose --format png, webp or tiff.")
    if max(size) > _MAX_SIDE.get(kind, max(size)):
        raise ValueError(f"the result would be {size[0]} x {size[1]}, but {kind} holds {_MAX_SIDE[kind]} a side. Choose --format png or tiff.")


def write_picture(restored: Image.Image, picture: Picture, path: Path, quality: int) -> None:
    """Write the restored RGB with the original's alpha (enlarged by Lanczos), greyness, profile and description.

    Whole or not at all: under another name first, then renamed.
    """
    if picture.gray:
        restored = restored.convert("L")
    if picture.alpha is not None:
        restored.putalpha(picture.alpha.resize(restored.size, Image.Resampling.LANCZOS))
    kind = FORMATS[path.suffix.lower()]
    options = {
        "PNG": {},
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality},
        "TIFF": {"compression": "tiff_deflate"},
    }[kind]
    if picture.icc_profile:
        options["icc_profile"] = picture.icc_profile
    if picture.exif:
        options["exif"] = picture.exif
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = BytesIO()  # takes seconds, the file then a moment: a run that is killed leaves nothing
    restored.save(encoded, kind, **options)
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(encoded.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
