"""Writing weight files whole or not at all."""

from pathlib import Path

import safetensors.torch
import torch

from ..files import written_whole


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write ``path`` under a temporary name first, then rename it: a run that is cut leaves the old file or none."""
    with written_whole(path) as partial:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt", **metadata})
