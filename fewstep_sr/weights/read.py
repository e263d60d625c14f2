"""Reading weight files without running them: the one place through which every weight file goes.

Pickled files (.pkl, .pt, .pth, .ckpt) go through ``torch.load(weights_only=True)`` and nothing else: a file cannot run code here. Nor can it
take more time or memory than its size allows, whatever it claims.
"""

import errno
import os
import stat
from pathlib import Path

import safetensors

from .pickled import PICKLE, ZIP, read_pickled
from .strict import Refused, printable, require_plain

MAX_HEADER = 16 << 20
"""Bytes of a safetensors header: its tensors' names, and the longest descriptions that trainers leave there."""

MAX_TENSORS = 20_000
"""A checkpoint of Stable Diffusion XL has 2,500; each takes a tenth of a millisecond, whatever its size."""


def read_weights(path: str | Path, pass_over: bool = False) -> tuple[dict, dict[str, str]]:
    """Read a weight file on the CPU, by what it holds and not by its extension.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote (zip or the older format).
        pass_over: whether Python objects in a pickle are passed over, unrun, instead of refused: for training checkpoints, which hold such things
            beside the weights. Their names are in the metadata then, under "passed over".

    Returns:
        The file's dictionary (tensors memory-mapped where the format allows) and its metadata (safetensors only, else empty). Every tensor is
        dense, on the CPU, no larger than what is stored, and has a text key; whether its numbers are finite is for the caller to see
        (:func:`fewstep_sr.weights.strict.own_copies`), who uses but a part of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is empty, cut off, no weight file at all, or refused because of what it holds or claims.
    """
    path = Path(path)
    size = _regular_file_size(path)
    name = printable(path.name)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
        if problem := _not_weights(head):
            raise Refused(problem)
        if head[8:9] == b"{":
            state, metadata = _read_safetensors(path, int.from_bytes(head[:8], "little"), size)
        elif head.startswith((ZIP, PICKLE)):
            state, foreign = read_pickled(path, head.startswith(ZIP), pass_over)
            metadata = {"passed over": f"{', '.join(foreign)[:150]} (Python objects, not run)"} if foreign else {}
        else:
            raise Refused(f"not a weight file (it starts with {head[:8]!r}); expected safetensors or a file written by torch.save.")
        require_plain(state)
        return state, metadata
    except Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except OSError as error:
        raise ValueError(f"{name}: it cannot be read ({_os_reason(error)}).") from None
    except Exception as error:  # whatever the readers of damaged files come upon: their own list has no end
        raise ValueError(f"{name}: {_in_words(error)}") from None


def _regular_file_size(path: Path) -> int:
    """Asked without opening the path: a pipe would wait for its other end."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{printable(str(path))}: there is no such file.") from None
    except OSError as error:
        raise ValueError(f"{printable(str(path))}: it cannot be read ({_os_reason(error)}).") from None
    except ValueError as error:  # a zero byte in the name, or half a surrogate pair
        raise ValueError(f"{printable(str(path))}: no file can have this name ({error}).") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{printable(path.name)}: this is a folder, expected a weight file. Choose a file in it.")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{printable(path.name)}: this is a pipe, a socket or a device, expected a weight file.")
    return found.st_size


def _os_reason(error: OSError) -> str:
    reasons = {errno.EACCES: "no permission", errno.EPERM: "no permission", errno.ELOOP: "a symbolic link that leads back to itself"}
    return reasons.get(error.errno or 0, error.strerror or type(error).__name__)


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


def _read_safetensors(path: Path, header: int, size: int) -> tuple[dict, dict[str, str]]:
    if min(header, size) > MAX_HEADER:
        raise Refused(f"the safetensors header claims {header:,} bytes, expected at most {MAX_HEADER:,}; the file is damaged. Download it again.")
    with path.open("rb") as file:  # counted before safetensors parses it: it takes a kilobyte of memory for each entry
        tensors = file.read(8 + min(header, size)).count(b'"data_offsets"')
    if tensors > MAX_TENSORS:
        raise Refused(f"found {tensors:,} tensors, expected at most {MAX_TENSORS:,}; it is no file of weights for these methods.")
    with safetensors.safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in list(opened.keys())}, opened.metadata() or {}


def _in_words(error: Exception) -> str:
    reason = _reason(error)
    if isinstance(error, MemoryError) or "allocate memory" in reason:
        return "it takes more memory than there is, or is damaged. Close other programs, or download it again."
    kind = "safetensors file" if isinstance(error, safetensors.SafetensorError) else "file"
    return f"the {kind} is damaged or cut off ({reason}). Download it again."


def _reason(error: Exception) -> str:
    """The first line of what an exception says, bounded and printable."""
    try:
        text = str(error)
    except Exception:  # a key that cannot be shown: too deep, for one
        text = ""
    if "storage that is not resizable" in text:
        return "a tensor claims more numbers than are stored"
    first = text.strip().partition("\n")[0]
    return printable(first[:120]) if first else type(error).__name__
