"""Writing weight files whole or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors

from ..files import require_room, written_whole
from ..lazy import torch


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write ``path`` under a temporary name first, then rename it: a run that is cut leaves the old file or none. Folders are made.

    Raises:
        OSError: it cannot be written there; nothing of it is left.
        ValueError: a folder has the name, or it is too long.
    """
    from safetensors.torch import save_file  # which imports torch

    path = Path(path)
    require_room(path, sum(tensor.nbytes for tensor in tensors.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(path) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt", **metadata})
    except safetensors.SafetensorError as error:  # a full disk is no OSError there
        raise OSError(f"{path} cannot be written: {error}") from error
