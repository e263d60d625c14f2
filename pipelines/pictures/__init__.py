"""Image files: read upright, with alpha, depth, profile and description apart; written whole or not at all."""

from .find import find_in_folder
from .pixels import Pixels
from .read import Picture, UnreadableError, from_pil, read_picture, read_pixels, read_size
from .write import OutputError, require_place, require_writable, write_picture

__all__ = [
    "OutputError",
    "Picture",
    "Pixels",
    "UnreadableError",
    "find_in_folder",
    "from_pil",
    "read_picture",
    "read_pixels",
    "read_size",
    "require_place",
    "require_writable",
    "write_picture",
]
