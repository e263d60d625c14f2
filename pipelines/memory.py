"""Memory that runs out, on whichever device accelerate knows."""

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from sr.streaming import Host


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left: CUDA, ROCm and XPU have an error of their own, the others words in a RuntimeError."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or should_reduce_batch_size(error)


class Device(Host):
    def is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def free_memory(self) -> None:
        clear_device_cache()
