"""Opening image files: known formats alone, large scans, files whose descriptions are broken."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin

from fewstep_sr.image.formats import readers, unreadable

from .bare import without_descriptions
from .deep import is_deep
from .metadata import Metadata, read_metadata
from .pixels import Pixels, require_one_frame, to_pixels

MAX_PIXELS = 2**30
"""More than any scan has. A file that claims more is refused before memory is taken for it."""

_MAX_TEXT = 64 * 2**20
"""Bytes of a text or colour profile in a PNG, unpacked. Pillow's own limit, 1 MiB, costs images that hold a workflow or a printer's profile."""

_lock = threading.RLock()


class UnreadableError(ValueError):
    """No image, or a damaged one, or of a kind that would lose something."""


@dataclass(frozen=True)
class Picture:
    """An image as read: its pixels, and what goes into the result's file beside them."""

    pixels: Pixels
    metadata: Metadata = field(default_factory=Metadata)


def read_picture(path: Path) -> Picture:
    """Read an image and turn it upright, with its colour profile and description.

    The colours stay in the file's own RGB or grey profile, which the result gets, too; others (CMYK, Lab) are brought to sRGB.
    Descriptions that cannot be read are left out and named in the metadata's notes.

    Raises:
        UnreadableError: no picture, damaged, or of a kind that would lose something.
    """
    with _opened(path) as (image, notes):
        pixels = to_pixels(image, lambda: _again(path))
        metadata = read_metadata(image)
    if pixels.colors_converted:
        metadata = replace(metadata, icc_profile=None)
    return Picture(pixels, replace(metadata, notes=(*notes, *metadata.notes)))


def read_pixels(path: Path) -> Pixels:
    """The same without the description.

    Raises:
        UnreadableError: as :func:`read_picture`.
    """
    with _opened(path) as (image, _):
        return to_pixels(image, lambda: _again(path))


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header, as stored. Pixels are not looked at: a cut file may have a whole header.

    Raises:
        UnreadableError: no image, one of several frames, or one that claims to be larger than any.
    """
    with _opened(path) as (image, _):
        require_one_frame(image)
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, list[str]]]:
    """The image, not loaded, and what had to be left out; every error of reading becomes an UnreadableError."""
    if path.suffix.lower() in unreadable():
        raise UnreadableError(f"{path.suffix} files are not read here. Convert it to PNG, JPEG, WebP or TIFF first.")
    notes: list[str] = []
    with _pillow_for_files(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on descriptions
        try:
            with _open(path, notes) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableError(f"it claims {image.width} x {image.height} pixels, more than {MAX_PIXELS} in all.")
                _keep_pixels_at_any_cost(image, notes)
                yield image, notes
        except (MemoryError, UnreadableError):
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything over damaged files
            raise UnreadableError(_reason(path, error)) from error


def _open(path: Path, notes: list[str]) -> Image.Image:
    formats = readers(path.suffix)
    try:
        return Image.open(path, formats=formats)
    except OSError as error:
        if not isinstance(error, Image.UnidentifiedImageError):
            raise
        failed: Exception = error
    except Exception as error:
        failed = error
    bare = without_descriptions(path)
    if bare is None:
        raise failed
    try:
        image = Image.open(bare, formats=formats)
    except Exception:
        raise failed from None
    notes.append(f"its description cannot be read ({failed}) and is left out")
    return image


def _again(path: Path) -> Image.Image:
    return _open(path, [])


def from_pil(image: Image.Image) -> Pixels:
    """Pixels of an image that a user has opened or made, as :func:`read_picture` gives them; the image stays as it is.

    Raises:
        ValueError: the range of its values is unknown, or it has several frames.
    """
    file = getattr(image, "fp", None)
    if getattr(image, "tile", None) and file is None:
        raise ValueError("it was closed before its pixels were read. Call its load() before, or keep it open.")
    if file is not None and is_deep(image):  # not loaded yet: its 16 bits are still there to be read
        at = file.tell()
        file.seek(0)
        data = file.read()  # another file may have the name by now
        file.seek(at)

        def again() -> Image.Image:
            return Image.open(BytesIO(data), formats=[image.format or ""])

        with again() as fresh:
            return to_pixels(fresh, again)
    return to_pixels(image)


def _keep_pixels_at_any_cost(image: Image.Image, notes: list[str]) -> None:
    """Pillow reads what follows the pixels once it has decoded them; a mistake there must not cost them."""
    load_end = getattr(image, "load_end", None)
    if load_end is None:
        return

    def end() -> None:
        try:
            load_end()
        except Exception as error:
            notes.append(f"its description cannot be read ({error}) and is left out")

    image.load_end = end  # type: ignore[attr-defined]  # Pillow's file images have it


def _reason(path: Path, error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno:  # of the system, not of the file's contents
        return text
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty."
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image, or a damaged one: Pillow cannot identify it."
    if isinstance(error, ValueError) and text:
        return text
    return f"it is damaged or cut off ({text or type(error).__name__})."


@contextmanager
def _pillow_for_files() -> Iterator[None]:
    """Pillow's limits against attacks over the network give way to ours, for the time of a reading."""
    with _lock:
        limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = None, _MAX_TEXT, 2 * _MAX_TEXT
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits
