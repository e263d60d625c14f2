"""Writing weight files whole or not at all."""

import os
from pathlib import Path

import safetensors.torch
import torch


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write ``path`` under another name first, then rename it: a run that is cut leaves the old file or none.

    The file gets the permissions that the user's other files get, not the private ones that safetensors gives.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.part")
    try:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt", **metadata})
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
