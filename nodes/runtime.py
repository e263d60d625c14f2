"""ComfyUI's part in work that goes through a network in groups: its memory, its stop button, its progress bar.

ComfyUI's own layers look at the stop button, too, so that an interrupt comes within one layer; a compiled network finishes its call.
"""

from collections.abc import Callable

import comfy.model_management
import comfy.utils

from ..fewstep_sr.tiling.batching import Runtime


class ComfyUI(Runtime):
    def before_call(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def is_out_of_memory(self, error: Exception) -> bool:
        return comfy.model_management.is_oom(error)

    def free_memory(self) -> None:
        comfy.model_management.soft_empty_cache()

    def progress(self, total: int) -> Callable[[int], object]:
        return comfy.utils.ProgressBar(total).update
