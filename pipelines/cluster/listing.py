"""Which pictures there are, one after another, and blocks of them: no list of all is ever held."""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep_sr.image.formats import WRITTEN, readable, readers, unreadable

from ..pictures import read_size
from ..pictures.find import is_hidden
from ..settings import Settings
from .files import full_address, is_remote, open_address

BLOCK_PIXELS, BLOCK_PICTURES = 8 * 2**20, 16
"""Of results in a block, which is what a lost worker loses: seconds of a GPU's work, beside which a remote call's milliseconds vanish."""

_HEADERS = 1024
"""Pictures whose headers are read together."""


@dataclass(frozen=True)
class Item:
    """A picture on the way: addresses of source and result."""

    source: str
    target: str


def list_items(inputs: Iterable[str], output: str, suffix: str | None) -> Iterator[Item]:
    """Pictures of folders, lists (``.txt``, an address a line) and single addresses, one after another.

    A result has its picture's place below the input folder, or the whole path of a line. The suffix of another format is put after the picture's own
    (``cat.bmp.png``), so that ``cat.jpg`` and ``cat.png`` beside each other never become one file: nothing is held that would tell.

    Args:
        output: address of the folder for the results, which is passed over where it lies in an input.

    Raises:
        FileNotFoundError: an input is nowhere.
        ValueError: an input is the output folder.
    """
    place = full_address(*_opened(output))
    for text in inputs:
        filesystem, given, path = _opened(text)
        if path.lower().endswith(".txt"):
            folder = full_address(filesystem, given, path.rpartition("/")[0])
            with filesystem.open(path, "r", encoding="utf-8") as file:
                for line in file:
                    if line := line.strip():
                        source = line if is_remote(line) or Path(line).is_absolute() else f"{folder}/{line}"
                        yield _item(source, _relative(line), output, suffix)
        elif filesystem.isdir(path):
            if full_address(filesystem, given, path.rstrip("/")) == place.rstrip("/"):
                raise ValueError(f"{text}: it is the output folder, too. Give another folder with -o.")
            for found in _walk(filesystem, given, path, place):
                yield _item(full_address(filesystem, given, found), PurePosixPath(found).relative_to(path), output, suffix)
        elif filesystem.exists(path):
            yield _item(full_address(filesystem, given, path), PurePosixPath(PurePosixPath(path).name), output, suffix)
        else:
            raise FileNotFoundError(f"{text}: there is no such folder, list or picture. (With --ray there are no globs: give the folder, or a list.)")


def _opened(address: str) -> tuple[Any, str, str]:
    filesystem, path = open_address(address)
    return filesystem, address, path


def _walk(filesystem: Any, given: str, path: str, place: str) -> Iterator[str]:
    """Pictures in a folder and below, a folder's names held at a time. (fsspec's own walk passes over folders that cannot be listed.)"""
    suffixes = readable() | unreadable()
    folders, files = _names(filesystem, path) if is_remote(given) else _local_names(path)
    for name in sorted(files):
        if not is_hidden(name) and PurePosixPath(name).suffix.lower() in suffixes:
            yield f"{path.rstrip('/')}/{name}"
    for name in sorted(folders):
        below = f"{path.rstrip('/')}/{name}"
        if not is_hidden(name) and full_address(filesystem, given, below) != place.rstrip("/"):
            yield from _walk(filesystem, given, below, place)


def _names(filesystem: Any, path: str) -> tuple[list[str], list[str]]:
    found = filesystem.ls(path, detail=True)
    filesystem.invalidate_cache()  # which would hold them for ever
    names: dict[bool, list[str]] = {True: [], False: []}
    for entry in found:
        if (whole := entry["name"].rstrip("/")) != path.rstrip("/"):  # some stores list a folder in itself
            names[entry["type"] == "directory"].append(whole.rpartition("/")[2])
    return names[True], names[False]


def _local_names(path: str) -> tuple[list[str], list[str]]:
    """Links to folders are not followed."""
    names: dict[bool, list[str]] = {True: [], False: []}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file() or entry.is_dir(follow_symlinks=False):
                names[entry.is_dir()].append(entry.name)
    return names[True], names[False]


def _relative(line: str) -> PurePosixPath:
    path = PurePosixPath(line.split("://", 1)[-1])
    parts = [part for part in (path.relative_to(path.anchor) if path.anchor else path).parts if part != ".."]
    return PurePosixPath(*parts)


def _item(source: str, relative: PurePosixPath, output: str, suffix: str | None) -> Item:
    own = relative.suffix.lower()
    wanted = suffix or (own if own in WRITTEN else ".png")
    if WRITTEN.get(own) != WRITTEN[wanted]:
        relative = relative.with_name(relative.name + wanted)
    return Item(source, f"{output.rstrip('/')}/{relative}")


def pack(items: Iterable[Item], settings: Settings) -> Iterator[list[Item]]:
    """Blocks of about :data:`BLOCK_PIXELS` in their results. Sizes come from the files' headers, many at a time; what cannot be read counts as small."""
    with ThreadPoolExecutor(32) as pool:
        block: list[Item] = []
        total = 0.0
        items = iter(items)
        while group := list(itertools.islice(items, _HEADERS)):
            for item, size in zip(group, pool.map(picture_size, group), strict=True):
                enlarged = size[0] * size[1] * settings.scale_of(size) ** 2 if size else 0
                if block and (total + enlarged > BLOCK_PIXELS or len(block) == BLOCK_PICTURES):
                    yield block
                    block, total = [], 0.0
                block.append(item)
                total += enlarged
        if block:
            yield block


def picture_size(item: Item) -> tuple[int, int] | None:
    """(width, height) of a source by its header; None where it cannot be read, of which the worker says why."""
    try:
        if not is_remote(item.source):
            return read_size(Path(item.source))
        from PIL import Image

        filesystem, path = open_address(item.source)
        with filesystem.open(path, "rb", block_size=2**16) as file, Image.open(file, formats=readers(Path(path).suffix)) as image:
            return image.size
    except Exception:
        return None
