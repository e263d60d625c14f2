"""What ``torch.save`` wrote, read with ``torch.load(weights_only=True)`` after a look at it that costs next to nothing.

The look is for what PyTorch's reader does not mind: entries that unpack to more than the file, pickles that build large objects out of a few
bytes, storages of another size than what is kept for them, and kinds of tensors that are no weights.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..lazy import torch
from .opcodes import python_objects, require_weights_alone
from .strict import Refused

ZIP, PICKLE = b"PK\x03\x04", b"\x80"

# A tensor takes some 300 bytes of a pickle, and 100 of an archive's directory: room for tens of thousands of tensors.
MAX_PICKLE = MAX_DIRECTORY = 16 << 20


MAX_PASSED_OVER = 100
"""Kinds of Python objects in one file."""

_OF_PYTORCH = re.compile(
    r"torch\.\w+|torch\.(_utils\._rebuild\w+|storage\.\w+|serialization\.\w+|nn\.parameter\.Parameter)"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|complex)"
)


def read_pickled(path: Path, zipped: bool, pass_over: bool = False) -> tuple[dict, list[str]]:
    """The dictionary in a file of ``torch.save``, its tensors on the CPU, memory-mapped where it is a zip archive.

    Args:
        pass_over: whether Python objects, such as those that a training framework leaves in its checkpoints, are passed over instead of refused:
            none is imported or run, and a plain dictionary stands in the place of each.

    Returns:
        The dictionary, and the names of the classes that were passed over.

    Raises:
        Refused: the file is damaged, holds something else than tensors, numbers and text, or claims more than it stores.
        Exception: anything else, out of PyTorch's reader.
    """
    with path.open("rb") as file:
        storages = _ZipStorages(file) if zipped else _LegacyStorages(file)
    foreign = sorted(name for name in storages.names if not _OF_PYTORCH.fullmatch(name)) if pass_over else []
    try:
        with torch.serialization.safe_globals(_stand_ins(foreign)):
            content = torch.load(path, map_location=storages.place, weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if culprit := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise python_objects(culprit.group(1)) from None
        raise
    storages.require_all()
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise Refused(f"found a single {type(content).__name__}, expected a dictionary of tensors.")
    return dict(content), foreign


class _PassedOver:
    """What stands for a class or function that is not to be imported: whatever it is called with, it makes an empty dictionary.

    PyTorch's reader puts into it what the file says of the object, so that a class of a framework's own for dictionaries is one here too.
    """

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _stand_ins(names: Collection[str]) -> list[Any]:
    """A class by each of the names, by which PyTorch's reader looks for what it may call."""
    if len(names) > MAX_PASSED_OVER:
        raise Refused(f"its pickle holds {len(names):,} kinds of Python objects, expected at most {MAX_PASSED_OVER:,}; the file is damaged.")
    parts = [name.rpartition(".") for name in names]
    return [type(name or "_", (_PassedOver,), {"__module__": module, "__qualname__": name}) for module, _, name in parts]


class _ZipStorages:
    """Each of the pickle's storages must have the size of an entry of the archive of its own."""

    def __init__(self, file: BinaryIO):
        with zipfile.ZipFile(_Bounded(file, MAX_DIRECTORY)) as archive:
            entries = archive.infolist()
            names = Counter(entry.filename.lower() for entry in entries)  # as PyTorch's reader looks for them
            if any(name.endswith("/constants.pkl") for name in names):
                raise Refused("this is a TorchScript archive, a program and its weights; expected a dictionary of tensors. Choose another file.")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
                raise Refused("its entries are compressed, which torch.save never does; expected a file of torch.save, or safetensors.")
            if sum(entry.file_size for entry in entries) > _size(file) or max(names.values(), default=0) > 1:
                raise Refused("the archive's entries overlap or have the same name; the file is damaged. Download it again.")
            self.names: set[str] = set()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            for entry in pickles[:1]:  # without one, PyTorch's reader says what is missing
                if entry.file_size > MAX_PICKLE:
                    raise Refused(_too_long(entry.file_size))
                _, self.names = require_weights_alone(io.BytesIO(archive.read(entry)))
        self.left = Counter(entry.file_size for entry in entries if "/data/" in entry.filename)

    def place(self, storage, location: str):
        """``map_location``: called once for each storage, which stays on the CPU."""
        size = storage.nbytes()
        if size and not self.left[size]:
            raise Refused(f"a tensor claims {size:,} bytes, for which the archive has no entry of that size. Download it again.")
        self.left[size] -= 1
        return storage

    def require_all(self) -> None:
        """Nothing is left to compare: each storage was when it was placed."""


class _LegacyStorages:
    """In a file from before PyTorch 1.6, five pickles, the last of which names the storages whose numbers follow it."""

    def __init__(self, file: BinaryIO):
        reader = cast(BinaryIO, _Bounded(file, MAX_PICKLE))
        found = [require_weights_alone(reader, magic=torch.serialization.MAGIC_NUMBER if i == 0 else None) for i in range(5)]
        self.names = set().union(*(names for _, names in found))
        self.named, self.stored = len(found[4][0]), _size(file) - file.tell()
        self.placed = self.claimed = 0

    def place(self, storage, location: str):
        """``map_location``: called once for each storage, which stays on the CPU."""
        self.placed += 1
        self.claimed += storage.nbytes()
        if self.claimed > self.stored:
            raise Refused(
                f"the file is cut off, or damaged: its tensors claim {self.claimed:,} bytes, but {self.stored:,} are stored. Download it again."
            )
        return storage

    def require_all(self) -> None:
        """Storages that are not named are never filled."""
        if self.placed != self.named:
            raise Refused(f"it names {self.named} storages, but its tensors have {self.placed}; the file is damaged. Download it again.")


class _Bounded(io.RawIOBase):
    """A file of which no more is read at once, nor line by line, than a limit: lengths in a damaged file are not to be believed."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.limit, self.end = file, limit, _size(file)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        left = self.end - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self.limit:
            raise Refused(_too_long(wanted))
        return self.file.read(wanted)

    def readline(self, size: int | None = -1) -> bytes:
        return self.file.readline(self.limit)


def _too_long(size: int) -> str:
    return f"a part that is not numbers claims {size:,} bytes, expected at most {MAX_PICKLE:,}; the file is damaged. Download it again."


def _size(file: BinaryIO) -> int:
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end
