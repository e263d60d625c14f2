"""Weight files put together by hand, and the check that the reader refuses one as it should."""

import struct
import warnings
import zipfile
from pathlib import Path

import limits
import torch

from fewstep_sr.weights.read import read_weights

MEMORY = 64 << 20
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}


def save(path: Path, content, legacy: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_pickle(path: Path, data: bytes, entries: dict[str, bytes] | None = None) -> Path:
    """A file of ``torch.save`` with these bytes for its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **(entries or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def save_header(path: Path, header: str | bytes, body: bytes = b"", stated: int | None = None) -> Path:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if stated is None else stated) + header + body)
    return path


def refused(path: Path, message: str) -> None:
    """A sentence within a few seconds and the file's size of memory."""
    text, grown = limits.outcome(lambda: read_weights(path))
    assert text.startswith(f"ValueError: {path.name}: ") and message in text, text[:500]
    assert len(text) < 700 and "\n" not in text
    assert grown < path.stat().st_size + MEMORY, f"{grown >> 20} MiB"
