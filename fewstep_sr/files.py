"""Files that are written whole or not at all."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _SUFFIX = ".fewstepsr-", ".part"
_STALE = 3600.0
"""Seconds after which a temporary file that nobody writes to is left over from a run that was killed."""


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other writer has, short whatever the length of the file's own name."""
    return path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; rename it to ``path`` once the block has ended without an error.

    A run that is cut leaves the old file or none. Two runs that write one file never share a temporary one: the last to end wins, whole.
    The file gets the permissions that the user's other files get.

    Raises:
        OSError: the folder is missing, full or not writable. (Whatever the block raises leaves no file, either.)
    """
    path = Path(path)
    partial = temporary_name(path)
    try:
        yield partial
        _flush(partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Onto the disk before the renaming, so that a power cut leaves no empty file under the final name."""
    with open(path, "r+b") as file, suppress(OSError):  # some network file systems cannot
        os.fsync(file.fileno())


def remove_stale(folder: Path) -> None:
    """Remove temporary files of :func:`written_whole` in ``folder`` that a killed run has left."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def require_room_to_write(path: Path) -> None:
    """Make the folder of ``path`` and try to write there, before work is done whose result would be lost.

    Raises:
        OSError: the folder cannot be made or written to, its disk is full, or the name is too long for it.
        IsADirectoryError: a folder has the file's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder has this name. Move it away, or give another name.")
    longest = _longest_name(path.parent)
    length = len(os.fsencode(path.name))
    if length > longest:
        raise OSError(f"{path.name[:40]}…: the name is {length} bytes long, but {path.parent} takes {longest}. Give a shorter one.")
    probe = temporary_name(path)
    try:
        probe.write_bytes(bytes(4096))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no pathconf
        return 255
