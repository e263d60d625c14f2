"""What figures depend on beside the settings: versions, files, and the memory that was needed."""

import hashlib
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fewstep_sr.miniature import FOLDER

from .metrics import own_version

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "pyiqa")


def versions() -> dict[str, str]:
    """Of this package, of Python and of the libraries that compute; those that are not installed are left out."""
    found = {"fewstep_sr": own_version(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Operating system, processor and the device that computes."""
    found: dict[str, Any] = {"system": platform.platform(), "device": str(device), "threads": torch.get_num_threads(), "memory": _memory()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return {name: value for name, value in found.items() if value is not None}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _by_blocks(file)


def _by_blocks(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Of a file, read once while it stays as it is."""
    path = path.resolve()
    return _digest(path, path.stat().st_size, path.stat().st_mtime_ns)


def hash_weights(*names: str, demo: bool = False) -> dict[str, str]:
    """SHA-256 of weight files by name: of a file, of a folder's weights, or of a hub id's in the cache; what is none of these is left out."""
    if demo:
        return {path.relative_to(FOLDER).as_posix(): sha256(path) for path in sorted(FOLDER.rglob("*.safetensors"))}
    found = {}
    for name in filter(None, names):
        path = Path(name)
        if path.is_file():
            found[path.name] = sha256(path)
        elif folder := path if path.is_dir() else _cached(name):
            files = sorted(file for suffix in ("safetensors", "bin") for file in folder.rglob(f"*.{suffix}"))
            found |= {f"{path.name}/{file.relative_to(folder).as_posix()}": sha256(file) for file in files}
    return found


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def forget_peak(device: torch.device) -> None:
    """Begin a new peak where the device counts one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Bytes that were in use at most: of the GPU's tensors since :func:`forget_peak`; on a CPU of this process since it began."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "tensors on the GPU"}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "this process"}
    except ImportError:  # Windows, which is not asked for it
        return {}
