"""ComfyUI's part in work that goes through a network in groups: its memory, its stop button, its progress bar.

ComfyUI's own layers look at the stop button, too, so that an interrupt comes within one layer; a compiled network finishes its call.
"""

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch

from ..fewstep_sr.tiling.batching import Runtime

MAX_CANVAS = 0.2
"""Share of a device's free memory that one canvas may take."""


class ComfyUI(Runtime):
    def before_call(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def is_out_of_memory(self, error: Exception) -> bool:
        return comfy.model_management.is_oom(error)

    def free_memory(self) -> None:
        comfy.model_management.soft_empty_cache()

    def has_room(self, size: int, device: torch.device) -> bool:
        return size <= MAX_CANVAS * comfy.model_management.get_free_memory(device)

    def locks_memory(self, device: torch.device) -> bool:
        """Not with ``--disable-pinned-memory``, nor where ComfyUI knows that copies must not be queued."""
        known = comfy.model_management
        return device.type == "cuda" and known.MAX_PINNED_MEMORY > 0 and known.device_supports_non_blocking(device)

    def progress(self, total: int) -> Callable[[int], object]:
        return comfy.utils.ProgressBar(total).update
