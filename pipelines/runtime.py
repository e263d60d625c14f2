"""A pipeline's part in work that goes through a network in groups: memory that runs out, on whichever device accelerate knows, and progress."""

from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm

from fewstep_sr.tiling.batching import Runtime


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left: CUDA, ROCm and XPU have an error of their own, the others words in a RuntimeError."""
    in_words = isinstance(error, RuntimeError) and "out of memory" in str(error)  # which accelerate 1.0 knows of CUDA alone
    return isinstance(error, torch.cuda.OutOfMemoryError) or in_words or should_reduce_batch_size(error)


MAX_CANVAS = 0.2
"""Share of a device's free memory that one canvas may take."""


def has_room(size: int, device: torch.device) -> bool:
    """Whether a canvas of ``size`` bytes may lie on ``device``: on those whose free memory PyTorch knows, and where memory is the CPU's own."""
    if device.type in ("cpu", "mps"):
        return True
    if device.type in ("cuda", "xpu"):
        free, _ = getattr(torch, device.type).mem_get_info(device)
        return size <= MAX_CANVAS * free
    return False


class PipelineRuntime(Runtime):
    """``progress_bar(total=n)`` makes the bar for n tiles, which is gone when they are done; a single one has none."""

    def __init__(self, progress_bar: Callable[..., tqdm] | None = None):
        self.progress_bar = progress_bar

    def is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def free_memory(self) -> None:
        clear_device_cache()

    def has_room(self, size: int, device: torch.device) -> bool:
        return has_room(size, device)

    def locks_memory(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def progress(self, total: int) -> Callable[[int], object]:
        if self.progress_bar is None or total == 1:
            return super().progress(total)
        bar = self.progress_bar(total=total)
        bar.leave = False
        bar.set_description("tiles")
        return bar.update
