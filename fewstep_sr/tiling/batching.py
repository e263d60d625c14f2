"""Work that goes through a network in groups that fit into memory: the one place that halves a group where memory runs out."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Items = TypeVar("Items", bound=Sequence)


class Runtime:
    """What the program around a network does at its calls, with memory, progress and a stop button of its own. By itself it does nothing."""

    def before_call(self) -> None:
        """Raises where the user wants to stop."""

    def is_out_of_memory(self, error: Exception) -> bool:
        return False

    def free_memory(self) -> None:
        """Give back what is cached, after memory ran out."""

    def has_room(self, size: int, device: torch.device) -> bool:
        """Whether a canvas of ``size`` bytes may lie on ``device`` beside a network at work; else it lies on the CPU."""
        return device.type == "cpu"

    def locks_memory(self, device: torch.device) -> bool:
        """Whether copies between the CPU and ``device`` may go through page-locked memory: see :class:`fewstep_sr.tiling.host.HostCopies`."""
        return False

    def progress(self, total: int) -> Callable[[int], object]:
        """A function that is told how many more of ``total`` are done."""
        return lambda done: None


def run_in_groups(items: Items, group: int, run: Callable[[Items], None], runtime: Runtime, update: Callable[[int], object] | None = None) -> int:
    """Give all ``items`` to ``run``, ``group`` at a time, and halve the group when memory runs out.

    ``run`` changes nothing until it has succeeded, since a group may be given again in two halves.

    Returns:
        The group's size in the end, for the next call. Raises what ``run`` raises, out of memory only where a single item does not fit.
    """
    done, group = 0, min(group, len(items))
    while done < len(items):
        runtime.before_call()
        part: Items = items[done : done + group]  # type: ignore[assignment]  # a slice of a list or range is one
        out_of_memory = False
        try:
            run(part)
        except Exception as error:
            if group == 1 or not runtime.is_out_of_memory(error):
                raise
            out_of_memory = True
        if out_of_memory:  # outside the except block, which keeps the tensors alive
            runtime.free_memory()
            group //= 2
            continue
        done += len(part)
        if update is not None:
            update(len(part))
    return group
