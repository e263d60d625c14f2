"""What is done, by settings, source and target, without a look at a million results."""

import hashlib
import json
import time
import uuid
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from ..done import settings_to_record
from ..settings import Settings
from .files import open_address, put
from .listing import Item

_FLUSH = 10.0
"""Seconds after which what is done is written down."""


class Manifest:
    """Files below ``.fewstepsr`` in the output folder: eight bytes a picture, and as many in memory.

    A picture is known by its address and the settings: one that has changed since counts as done.
    """

    def __init__(self, output: str, settings: Settings):
        self._filesystem, root = open_address(output)
        self._folder = f"{root.rstrip('/')}/.fewstepsr"
        found = [np.zeros(0, "<u8")]
        if self._filesystem.isdir(self._folder):
            paths = self._filesystem.ls(self._folder, detail=False)
            contents = [self._filesystem.cat_file(path) for path in paths if path.endswith(".manifest")]
            found += [np.frombuffer(data[: len(data) // 8 * 8], "<u8") for data in contents]  # one that was cut holds what is whole
        self._known = np.unique(np.concatenate(found))
        self._new: list[int] = []
        self._flushed = time.monotonic()
        self._settings = lru_cache(lambda suffix: settings_to_record(settings, Path(f"x{suffix}")))  # which looks at files of weights

    def _key(self, item: Item) -> int:
        settings = self._settings(PurePosixPath(item.target).suffix.lower())
        text = json.dumps([settings, item.source, item.target], sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def __contains__(self, item: Item) -> bool:
        """Whether an earlier run has done it."""
        key = np.uint64(self._key(item))
        at = np.searchsorted(self._known, key)
        return bool(at < len(self._known) and self._known[at] == key)

    def add(self, item: Item) -> None:
        self._new.append(self._key(item))
        if time.monotonic() - self._flushed > _FLUSH:
            self.flush()

    def flush(self) -> None:
        if self._new:
            put(self._filesystem, np.array(self._new, "<u8").tobytes(), f"{self._folder}/{uuid.uuid4().hex}.manifest")
            self._new = []
        self._flushed = time.monotonic()
