"""Image files below a folder, without those that systems put there for themselves."""

import os
from collections.abc import Collection
from pathlib import Path

_OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own: thumbnails, trash, the halves that macOS writes beside files (``._cat.jpg``)."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def find_in_folder(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of ``suffixes`` (lower case) in ``folder`` and below, sorted; links to folders are not followed.

    Raises:
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        paths = (Path(parent, name) for name in files if not is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes)
        found += [path for path in paths if path.is_file()]
    return sorted(found)
