"""Results: with the original's alpha, greyness, depth, profile and description; written whole or not at all."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin

from fewstep_sr.files import require_room, written_whole
from fewstep_sr.image.color import LUMA
from fewstep_sr.image.formats import DEEP, WRITTEN

from .deep_png import encode_png
from .metadata import RESOLUTION_UNIT, X_RESOLUTION, Y_RESOLUTION, Metadata, exif_bytes
from .pixels import Pixels
from .read import Picture
from .record import RECORD_TAG
from .tiff import encode_tiff

_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383, "PNG": 2**31 - 1, "TIFF": 2**32 - 1}
_MAX_BYTES = {"TIFF": 2**32 - 2**20}
_MAX_JPEG_SEGMENT = 65533
_MAX_JPEG_PROFILE = 255 * (_MAX_JPEG_SEGMENT - 14)
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"


class OutputError(OSError):
    """A result could not be written though the work was done; ``errno`` is the system's."""


def require_writable(picture: Picture, size: tuple[int, int], path: Path) -> None:
    """Refuse, before the work is done, what the output's format cannot hold. ``size`` is (width, height)."""
    kind = WRITTEN[path.suffix.lower()]
    if picture.pixels.alpha is not None and kind == "JPEG":
        raise ValueError("it has transparency, which JPEG cannot hold. Choose --format png, webp or tiff.")
    if max(size) > _MAX_SIDE[kind]:
        raise ValueError(f"the result would be {size[0]} x {size[1]}, but {kind} holds {_MAX_SIDE[kind]} a side. Choose --format png or tiff.")
    if size[0] * size[1] * 4 * (2 if picture.pixels.is_deep else 1) > _MAX_BYTES.get(kind, 2**62):
        raise ValueError(f"the result would be {size[0]} x {size[1]}, but {kind} holds 4 GiB. Choose --format png.")


def require_place(path: Path, size: tuple[int, int]) -> None:
    """Refuse, before the work is done, a place that cannot be written to or has no room for (width, height), at a byte for each ten pixels.

    Raises:
        OutputError: as the system says it.
        ValueError: a folder has the name, or it is too long.
    """
    try:
        require_room(path, size[0] * size[1] // 10)
    except OSError as error:
        raise output_error(path, error) from error


def write_picture(restored: torch.Tensor, picture: Picture, path: Path, quality: int, record: str | None = None) -> list[str]:
    """Write the restored RGB (1, 3, H, W) in [0, 1] with what else the original has.

    Its alpha is enlarged by Lanczos. A grey image stays grey: stored as grey where the original is, else as equal RGB. Sixteen bits stay
    sixteen where the format has them (PNG, TIFF). Descriptions that the format cannot hold are left out.

    Args:
        record: how the result was made, for :func:`pipelines.pictures.record.read_record`.

    Returns:
        What had to be left out.

    Raises:
        OutputError: the file cannot be written; nothing of it is left.
    """
    kind = WRITTEN[path.suffix.lower()]
    values = _quantize(restored, picture.pixels, kind)
    if kind == "TIFF" and values.shape[-1] == 2 and values.dtype == np.uint16:  # which Pillow, and others with it, do not read
        values = values[..., [0, 0, 0, 1]]
    metadata, notes = _fitting(picture.metadata, kind, values.shape[-1], record)
    encoded = _encode(values, kind, quality, metadata)  # takes seconds, the file then a moment
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_bytes(encoded)
    except OSError as error:
        raise output_error(path, error) from error
    return notes


def output_error(path: Path, error: OSError) -> OutputError:
    """The system's error about ``path`` as one that ends a run."""
    if isinstance(error, OutputError):
        return error
    raised = OutputError(f"{path} cannot be written: {error.strerror or error}.")
    raised.errno = error.errno
    return raised


def _quantize(restored: torch.Tensor, pixels: Pixels, kind: str) -> np.ndarray:
    """(H, W, 1 to 4), uint8 or uint16: the file's channels."""
    dtype = np.uint16 if pixels.is_deep and kind in DEEP else np.uint8
    most = np.iinfo(dtype).max
    rgb = rearrange(restored[0].detach().float().cpu(), "c h w -> h w c").numpy()
    if pixels.is_gray:
        rgb = (rgb @ np.asarray(LUMA, rgb.dtype))[..., None]
        if pixels.values.shape[-1] == 3:
            rgb = rgb.repeat(3, -1)
    values = (rgb.clip(0, 1) * most).round().astype(dtype)
    if pixels.alpha is None:
        return values
    return np.concatenate([values, _enlarged(pixels.alpha, (values.shape[1], values.shape[0]), dtype)[..., None]], -1)


def _enlarged(alpha: np.ndarray, size: tuple[int, int], dtype: type) -> np.ndarray:
    if alpha.dtype == np.uint8:
        return np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.LANCZOS))
    resized = np.asarray(Image.fromarray(alpha.astype(np.float32)).resize(size, Image.Resampling.LANCZOS))
    return (resized.clip(0, 65535) / 65535 * np.iinfo(dtype).max).round().astype(dtype)


def _fitting(metadata: Metadata, kind: str, channels: int, record: str | None) -> tuple[Metadata, list[str]]:
    """What of the description the format holds, and what was left out. ``record`` comes first of all."""
    notes = []
    exif = {directory: dict(tags) for directory, tags in metadata.exif.items()}
    if record is not None:
        exif[0] = {**exif.get(0, {}), RECORD_TAG: record}
    if kind == "WEBP" and metadata.dpi:  # which has no place of its own for it
        exif[0] = {**exif.get(0, {}), X_RESOLUTION: metadata.dpi[0], Y_RESOLUTION: metadata.dpi[1], RESOLUTION_UNIT: 2}
    icc, xmp = metadata.icc_profile, metadata.xmp
    space = b"GRAY" if channels <= 2 and kind != "WEBP" else b"RGB "
    if icc and icc[16:20] != space:
        name = icc[16:20].decode("latin-1").strip()
        notes.append(f"its colour profile is of {name if name.isalnum() else 'no'} colours and is left out")
        icc = None
    if kind == "JPEG":
        if icc and len(icc) > _MAX_JPEG_PROFILE:
            notes.append(f"its colour profile of {len(icc)} bytes is too long for JPEG and is left out")
            icc = None
        if xmp and len(xmp) + len(_XMP_MARK) > _MAX_JPEG_SEGMENT:
            notes.append(f"its XMP of {len(xmp)} bytes is too long for JPEG and is left out")
            xmp = None
        notes += _shorten(exif)
    comment = metadata.comment[:_MAX_JPEG_SEGMENT] if metadata.comment else None
    return replace(metadata, icc_profile=icc, xmp=xmp, exif=exif, comment=comment), notes


def _shorten(exif: dict[int, dict]) -> list[str]:
    """Leave out the longest entries until what is left goes into a JPEG."""
    notes = []
    while len(exif_bytes(exif)) > _MAX_JPEG_SEGMENT:
        sizes = {(d, tag): len(exif_bytes({d: {tag: value}})) for d, tags in exif.items() for tag, value in tags.items() if tag != RECORD_TAG}
        (directory, tag), size = max(sizes.items(), key=lambda item: item[1])
        del exif[directory][tag]
        notes.append(f"its EXIF entry {tag:#06x} of about {size} bytes is too long for JPEG and is left out")
    return notes


def _encode(values: np.ndarray, kind: str, quality: int, metadata: Metadata) -> bytes:
    if kind == "TIFF":
        return encode_tiff(values, metadata)
    options: dict[str, Any] = {}
    if metadata.icc_profile:
        options["icc_profile"] = metadata.icc_profile
    if exif := exif_bytes(metadata.exif):
        options["exif"] = exif
    if kind == "PNG":
        options |= {"pnginfo": _png_text(metadata)} | ({"dpi": metadata.dpi} if metadata.dpi else {})
        if values.dtype == np.uint16 and values.shape[-1] > 1:
            return encode_png(values, options)
    elif kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0} | ({"dpi": metadata.dpi} if metadata.dpi else {})
        if metadata.xmp:
            body = _XMP_MARK + metadata.xmp
            options["extra"] = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
        if metadata.comment:
            options["comment"] = metadata.comment
    else:
        options |= {"quality": quality} | ({"xmp": metadata.xmp} if metadata.xmp else {})
    encoded = BytesIO()
    Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(encoded, kind, **options)
    return encoded.getvalue()


def _png_text(metadata: Metadata) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.text.items():
        info.add_text(key, value)
    if metadata.xmp:
        info.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode(errors="replace"))
    return info
