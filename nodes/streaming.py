"""Work that goes through the model in groups that fit into memory."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.utils


def run_in_groups(items: Sequence, group: int, run: Callable[[Sequence], None], progress: comfy.utils.ProgressBar | None = None) -> int:
    """Give all ``items`` to ``run``, ``group`` at a time, and halve the group when memory runs out.

    ``run`` changes nothing until it has succeeded, since a group may be given again in two halves.

    Returns:
        The group's size in the end, for the next call. Raises what ``run`` raises, out of memory only where a single item does not fit.
    """
    done, group = 0, min(group, len(items))
    while done < len(items):
        comfy.model_management.throw_exception_if_processing_interrupted()
        out_of_memory = False
        try:
            run(items[done : done + group])
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
            if group == 1:
                raise
            out_of_memory = True
        if out_of_memory:  # outside the except block, which keeps the tensors alive
            comfy.model_management.soft_empty_cache()
            group //= 2
            continue
        step = len(items[done : done + group])
        done += step
        if progress is not None:
            progress.update(step)
    return group
