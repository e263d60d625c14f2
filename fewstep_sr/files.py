"""Files that are written whole or not at all."""

import errno
import os
import secrets
import shutil
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


def require_room(path: Path, size: int = 4096) -> None:
    """Try to write where ``path`` shall be, before work is done whose result would be lost. Makes no folders.

    Args:
        size: bytes that are needed at least.

    Raises:
        OSError: the place is no folder, is not writable, or its disk is full.
        ValueError: a folder has the file's name, or the name is too long for its folder.
    """
    folder = path.parent.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder is needed", str(folder))
    longest = _longest_name(folder)
    for name in (path.name, path.parent.name):
        if len(os.fsencode(name)) > longest:
            raise ValueError(f"the name {name[:40]}… is {len(os.fsencode(name))} bytes long, but its folder takes {longest}. Give a shorter one.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file or nothing there. Move it away, or give another name.")
    probe = temporary_name(folder / path.name)
    try:
        try:
            probe.write_bytes(bytes(4096))
        except OSError as error:  # which names the file where it is opened, not where it is written
            raise OSError(error.errno, error.strerror, str(folder)) from error
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no pathconf
        return 255
