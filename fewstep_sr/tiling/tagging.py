"""A tagger over a batch of images."""

from collections.abc import Callable

import torch

from ..networks.ram import TaggerConfig, prepare_picture
from .batching import Runtime, run_in_groups


def tag_logits(call: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor, config: TaggerConfig, runtime: Runtime) -> torch.Tensor:
    """Logits (B, tags) of images (B, 3, H, W) in [0, 1], float32 on the CPU. One image at a time, which bounds the memory.

    Args:
        call: what the tagger says of an image (1, 3, side, side), normalised as it is trained.
    """
    logits: list[torch.Tensor] = []

    def tag(indices: range) -> None:
        logits.extend(call(prepare_picture(pictures[i : i + 1], config.image_size)).float().cpu() for i in indices)

    run_in_groups(range(len(pictures)), 1, tag, runtime, runtime.progress(len(pictures)))
    return torch.stack([row.reshape(-1) for row in logits])
