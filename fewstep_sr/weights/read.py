"""Reading weight files without running them.

Pickled files (.pkl, .pt, .pth, .ckpt) go through ``torch.load(weights_only=True)`` and nothing else: a file cannot run code here.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_weights(path: str | Path) -> tuple[dict, dict[str, str]]:
    """Read a weight file on the CPU, by what it holds and not by its extension.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote (zip or the older format).

    Returns:
        The file's dictionary (tensors memory-mapped where the format allows) and its metadata (safetensors only, else empty).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, no weight file at all, or refused because it holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        head = file.read(1024)
    if problem := _not_weights(head):
        raise ValueError(f"{path.name}: {problem}")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _read_pickled(path, zipped=head.startswith(_ZIP)), {}
    raise ValueError(f"{path.name}: not a weight file (it starts with {head[:8]!r}); expected safetensors or a file written by torch.save.")


def _not_weights(head: bytes) -> str | None:
    text = head.lstrip().lower()
    if not head:
        return "the file is empty; the download failed. Download it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page saved under a weight file's name. Use the page's download link for the file itself."
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights. Run 'git lfs pull', or download the file from its page."
    if text.startswith((b"{", b"[")):
        return "this is a JSON text, not weights. Download the weight file itself."
    return None


def _read_safetensors(path: Path) -> tuple[dict, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: the safetensors file is damaged or cut off ({error}). Download it again.") from None


def _read_pickled(path: Path, zipped: bool) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise ValueError(f"{path.name}: the file is cut off. Download it again.") from None
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({culprit.group(1)})" if culprit else ""
        raise ValueError(
            f"{path.name}: refused, because the pickle holds Python objects{found} that could run code; "
            "expected tensors, numbers and text alone. Use a safetensors file from a source you trust."
        ) from None
    except (RuntimeError, EOFError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path.name}: the file is damaged or cut off ({reason}). Download it again.") from None
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise ValueError(f"{path.name}: found a single {type(content).__name__}, expected a dictionary of tensors.")
    return dict(content)
