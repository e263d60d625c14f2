"""Files by their addresses: local paths, and what fsspec knows (``s3://bucket/photos``)."""

import os
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

_ATOMIC = ("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oss")
"""Object stores: what is put there appears whole. Elsewhere a temporary name is renamed."""


def is_remote(address: str) -> bool:
    """Whether an address names its file system."""
    return "://" in address


def open_address(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there.

    Raises:
        ValueError: no file system has that protocol.
        ImportError: its package is missing.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(address if is_remote(address) else str(Path(address).expanduser().resolve()))


def full_address(filesystem: Any, given: str, path: str) -> str:
    """The address of ``path`` in the file system of the address ``given``."""
    return filesystem.unstrip_protocol(path) if is_remote(given) else path


def fetch(address: str, folder: Path) -> Path:
    """A local path of the file: itself, or a copy in ``folder``."""
    if not is_remote(address):
        return Path(address)
    filesystem, path = open_address(address)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / PurePosixPath(path).name
    filesystem.get_file(path, str(copy))
    return copy


def put(filesystem: Any, data: bytes, path: str) -> None:
    """Write a file whole or not at all, and the folders that it is in. A bucket is not made: its name may be a mistake."""
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    if protocol in _ATOMIC:
        filesystem.pipe_file(path, data)
        return
    folder = path.rpartition("/")[0]
    filesystem.makedirs(folder, exist_ok=True)
    partial = f"{folder}/.fewstepsr-{uuid.uuid4().hex}.part"
    try:
        filesystem.pipe_file(partial, data)
        if protocol in ("file", "local"):
            os.replace(partial, path)
        else:
            filesystem.mv(partial, path)
    finally:
        if filesystem.exists(partial):
            filesystem.rm_file(partial)
