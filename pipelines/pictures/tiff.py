"""TIFF of 8 and 16 bits a channel. Pillow writes no colours of 16 bits; its directory of tags, around strips of our own."""

import zlib
from io import BytesIO
from itertools import accumulate

import numpy as np
from PIL import TiffImagePlugin, TiffTags

from .metadata import RESOLUTION_UNIT, X_RESOLUTION, Y_RESOLUTION, Metadata

_STRIP = 2**20
"""Bytes of a strip before compression, about."""

_DEFLATE, _DIFFERENCES = 8, 2  # compression and predictor
_UNASSOCIATED = 2  # alpha that the colours are not multiplied by
_XMP, _ICC = 700, 34675


def encode_tiff(values: np.ndarray, metadata: Metadata) -> bytes:
    """A TIFF file of (H, W, 1 to 4), uint8 or uint16: grey or RGB, with or without alpha."""
    height, width, channels = values.shape
    bits, gray = 8 * values.dtype.itemsize, channels <= 2
    rows = max(1, _STRIP // (width * channels * values.dtype.itemsize))
    strips = [zlib.compress(_differences(values[first : first + rows]).tobytes(), 6) for first in range(0, height, rows)]
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in metadata.exif.get(0, {}).items():
        ifd[tag] = value
    for directory, tags in metadata.exif.items():
        if directory and tags:
            ifd[directory] = dict(tags)
            ifd.tagtype[directory] = TiffTags.LONG
    if metadata.icc_profile:
        ifd.tagtype[_ICC] = TiffTags.UNDEFINED
        ifd[_ICC] = metadata.icc_profile
    if metadata.xmp:
        ifd.tagtype[_XMP] = TiffTags.BYTE
        ifd[_XMP] = metadata.xmp
    if metadata.dpi:
        ifd[X_RESOLUTION], ifd[Y_RESOLUTION], ifd[RESOLUTION_UNIT] = *metadata.dpi, 2
    ifd[TiffImagePlugin.IMAGEWIDTH], ifd[TiffImagePlugin.IMAGELENGTH] = width, height
    ifd[TiffImagePlugin.BITSPERSAMPLE] = (bits,) * channels
    ifd[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    ifd[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if gray else 2
    ifd[TiffImagePlugin.COMPRESSION], ifd[TiffImagePlugin.PREDICTOR] = _DEFLATE, _DIFFERENCES
    ifd[TiffImagePlugin.PLANAR_CONFIGURATION] = 1
    ifd[TiffImagePlugin.ROWSPERSTRIP] = rows
    if channels in (2, 4):
        ifd[TiffImagePlugin.EXTRASAMPLES] = _UNASSOCIATED
    sizes = [len(strip) for strip in strips]
    for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS):
        ifd.tagtype[tag] = TiffTags.LONG
    ifd[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(sizes)
    ifd[TiffImagePlugin.STRIPOFFSETS] = tuple([0, *accumulate(sizes[:-1])])  # from the end of the tags on
    file = BytesIO()
    ifd.save(file)
    return b"".join([file.getvalue(), *strips])


def _differences(rows: np.ndarray) -> np.ndarray:
    """Each pixel less the one left of it, little-endian."""
    rows = rows.astype(rows.dtype.newbyteorder("<"))
    rows[:, 1:] -= rows[:, :-1].copy()
    return rows
