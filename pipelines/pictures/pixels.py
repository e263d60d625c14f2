"""From Pillow's images of every mode to colours, alpha and depth: the one conversion for files, pipelines and training."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms

from fewstep_sr.image.alpha import fill_transparent

from .deep import PLANAR, is_deep, raw_mode, read_deep

_log = logging.getLogger(__name__)

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0112, 262, 0
_BITS, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2
_SIZE_MARKER = b"\xff\x4f\xff\x51"
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""What turns an image upright, by EXIF's number of its orientation."""


@dataclass(frozen=True)
class Pixels:
    """An upright image's values, of 8 or 16 bits as in the file (uint8 or uint16).

    Args:
        values: (H, W, 3) RGB or (H, W, 1) grey, not multiplied by alpha. What is under alpha 0 is filled from the visible pixels.
        alpha: (H, W), or None.
        colors_converted: the colours were brought to sRGB, so that the file's profile is no longer theirs.
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    colors_converted: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.values.shape[1], self.values.shape[0]

    @property
    def is_deep(self) -> bool:
        return self.values.dtype == np.uint16

    @property
    def is_gray(self) -> bool:
        """Whether every pixel is a grey, also one that is stored as colour."""
        return self.values.shape[-1] == 1 or all(np.array_equal(self.values[..., 0], self.values[..., i]) for i in (1, 2))

    def tensor(self) -> torch.Tensor:
        """RGB (1, 3, H, W) in [0, 1], float32."""
        values = torch.from_numpy(self.values.astype(np.float32))
        return rearrange(values, "h w c -> 1 c h w").expand(1, 3, -1, -1) / np.iinfo(self.values.dtype).max


def to_pixels(image: Image.Image, open_again: Callable[[], AbstractContextManager[Image.Image]] | None = None) -> Pixels:
    """Convert an image of any mode.

    Args:
        open_again: opens the image's file once more, for 16 bits a channel of an image that is not loaded yet.

    Raises:
        ValueError: the range of its values is unknown, or it has several frames.
    """
    require_one_frame(image)
    _require_values_that_pillow_reads(image)
    if open_again is not None and is_deep(image):
        values, converted = read_deep(open_again, image), False
    else:
        step = _gray_step(raw_mode(image))
        image.load()
        values, converted = _values(image, step)
    key = image.info.get("transparency")
    if values.dtype == np.uint16 and values.shape[-1] in (1, 3) and key is not None and not isinstance(key, bytes):
        visible = (values != np.asarray(key, np.uint16)).any(-1, keepdims=True)  # one colour of 16 bits that is transparent
        values = np.concatenate([values, np.where(visible, 65535, 0).astype(np.uint16)], -1)
    values = _UPRIGHT.get(_orientation(image), lambda a: a)(values)
    if values.shape[-1] in (2, 4):
        return Pixels(_filled(values[..., :-1], values[..., -1]), np.ascontiguousarray(values[..., -1]), converted)
    return Pixels(np.ascontiguousarray(values), None, converted)


def require_one_frame(image: Image.Image) -> None:
    """Refuse animations and documents of several pages. (A camera's MPO is a JPEG with previews, and one image.)

    Raises:
        ValueError: there are several frames.
    """
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames or pages, expected one. Take it apart first (Pillow: image.seek(n), then image.copy()).")


def _require_values_that_pillow_reads(image: Image.Image) -> None:
    """Refuse files whose numbers Pillow takes for others: TIFF's planes of 16 bits for planes of 8, its signed numbers for unsigned ones, and
    JPEG 2000's colours of more than 8 bits, whose white is rounded up to 256 and comes out black.

    Raises:
        ValueError: it is one of them.
    """
    if image.format == "JPEG2000" and len(image.getbands()) > 1 and (depth := _depth_of_jpeg_2000(image)) > 8:
        raise ValueError(f"it has {depth} bits a channel, of which Pillow makes black where it is white. Convert it to PNG or TIFF first.")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (1,))
    if tags.get(PLANAR, 1) != 1 and len(bits) > 1 and max(bits) > 8:
        raise ValueError(f"it has {max(bits)} bits a channel, each channel in a plane of its own. Save it again with interleaved channels.")
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) and max(bits) < 32:
        raise ValueError(f"it has signed numbers of {max(bits)} bits, expected 8 or 16 bits without sign. Convert it first.")


def _depth_of_jpeg_2000(image: Image.Image) -> int:
    """The most bits of a channel, by the codestream's SIZ segment (ISO/IEC 15444-1, A.5.1); 0 after loading."""
    file = getattr(image, "fp", None)
    if file is None:
        return 0
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    segment = data[data.find(_SIZE_MARKER) + 4 :]
    channels = int.from_bytes(segment[36:38], "big")
    return 1 + max((depth & 0x7F for depth in segment[38 : 38 + 3 * channels : 3]), default=-1)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever is wrong with its description, the image is there
        return 1


def _gray_step(raw: str) -> int:
    """What one step of a PNG's grey of 2 or 4 bits is in 8 bits: its transparent grey is counted in such steps."""
    return {"L;2": 85, "L;4": 17}.get(raw, 1)


def _values(image: Image.Image, gray_step: int) -> tuple[np.ndarray, bool]:
    """(H, W, 1 to 4): grey, grey and alpha, RGB, or RGB and alpha; and whether the colours were brought to sRGB."""
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _sixteen_bit(image)[..., None], False
    if image.mode in ("1", "L"):
        gray = np.asarray(image.convert("L"))
        if isinstance(key, int):
            step = 255 if image.mode == "1" and key <= 1 else gray_step  # Pillow counts black and white either way
            return np.stack([gray, np.where(gray == key * step, 0, 255).astype(np.uint8)], -1), False
        return gray[..., None], False
    if image.mode in ("LA", "La"):
        return np.asarray(image.convert("LA")), False
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # loaded with 8 of its 16 bits
        rgb = np.asarray(image)
        visible = (rgb != np.asarray([value >> 8 for value in key], np.uint8)).any(-1, keepdims=True)
        return np.concatenate([rgb, np.where(visible, 255, 0).astype(np.uint8)], -1), False
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        return np.asarray(_to_srgb(image)), image.mode in ("CMYK", "LAB")
    return np.asarray(image.convert("RGBA" if image.mode in _ALPHA_MODES or key is not None else "RGB")), False


def _sixteen_bit(image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, integers or floats as (H, W) in 16 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is neither
            raise ValueError(f"it has floating-point pixels from {low:.4g} to {high:.4g}, expected [0, 1]. Scale them first, or save 8 or 16 bits.")
        values = (values.astype(np.float64).clip(0, 1) * 65535).round()
    elif image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"it has values from {low} to {high}, expected 8 or 16 bits without sign.")
        if 0 < high <= 0xFF and image.format not in ("PNG", "PPM"):
            raise ValueError(f"it has 32-bit pixels from {low} to {high}, which may be of 8 or of 16 bits. Convert it to L or I;16 first.")
    tags = getattr(image, "tag_v2", {})
    values = values.astype(np.uint16)
    if tags.get(_BITS) == (12,):  # which Pillow leaves as they are
        values = (values * (65535 / 4095)).round().astype(np.uint16)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
        values = 65535 - values
    return values


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError) as error:
            _log.warning("its CMYK profile cannot be used (%s); the colours are converted without it.", error)
    return image.convert("RGB")


def _filled(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    if alpha.all() or not alpha.any():
        return np.ascontiguousarray(values)
    most = np.iinfo(values.dtype).max
    rgb = rearrange(torch.from_numpy(values.astype(np.float32)), "h w c -> 1 c h w") / most
    filled = fill_transparent(rgb, torch.from_numpy(alpha.astype(np.float32))[None, None] / most)
    return rearrange((filled * most).round().numpy(), "1 c h w -> h w c").astype(values.dtype)
