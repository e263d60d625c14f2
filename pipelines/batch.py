"""Many images: who does which, and what became of them."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from fewstep_sr.files import remove_stale

from .jobs import Job, list_jobs
from .pictures import OutputError
from .processes import NO_LIMIT, Peers, launched, must_compute_on_cpu, require_joined
from .processes import join as join_peers
from .runtime import is_out_of_memory

__all__ = ["Job", "Outcome", "Written", "join", "list_jobs", "run", "share"]


@dataclass(frozen=True)
class Written:
    """A result: its file, (width, height), bytes, and what could not be kept of the original's description."""

    path: Path
    size: tuple[int, int]
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of all processes' jobs: results, names and reasons of failures, and how many were not begun."""

    written: list[Written] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    not_begun: int = 0
    ended: bool = False
    """Whether a process met an error that will meet each image."""


def join(device: str | None) -> tuple[PartialState, Peers]:
    """This process's place among those that a launcher started (``accelerate launch``, ``torchrun``), and the others; alone without one.

    Raises:
        RuntimeError: others did not come, or accelerate sees none of them, so that each process would do every picture.
    """
    peers = join_peers()
    cpu = device == "cpu" or must_compute_on_cpu()
    state = PartialState(cpu=cpu) if launched() == 1 else PartialState(cpu=cpu, timeout=NO_LIMIT)
    require_joined(state.num_processes, "Leave out --device, or say cpu.")
    return state, peers


def share(jobs: Sequence[Job], state: PartialState, is_done: Callable[[Job], bool]) -> tuple[list[Job], int]:
    """This process's jobs out of those that are still to do, and how many are done already.

    The first process looks at what is done, for all: while one looks, another may have begun to write. What it raises, all raise.
    """
    message: list = [None]
    if state.is_main_process:
        try:
            message = [[job for job in jobs if not is_done(job)]]
            for folder in {job.target.parent for job in jobs}:
                remove_stale(folder)
        except (OSError, ValueError) as error:
            message = [error]
    if state.num_processes > 1:
        broadcast_object_list(message)
    (todo,) = message
    if isinstance(todo, Exception):
        raise todo
    # Older versions of accelerate give the last element to every process for which none is left: let that be an empty one.
    padded = [*todo, *[None] * (state.num_processes - len(todo))]
    with state.split_between_processes(padded) as mine:
        return [job for job in mine if job is not None], len(jobs) - len(todo)


def run(jobs: list[Job], work: Callable[[Job], Written] | None, state: PartialState, peers: Peers) -> Outcome:
    """Do this process's jobs with a progress bar. An image that fails is noted and the next one done; an error that will meet each ends the run.

    Args:
        work: may be None where there are no jobs.

    Returns:
        What became of all processes' jobs.
    """
    found: list[Written | tuple[str, str] | int] = []
    with tqdm(jobs, unit="picture", position=state.local_process_index, dynamic_ncols=True, disable=not jobs) as bar:
        for number, job in enumerate(bar, 1):
            bar.set_description(job.source.name)
            try:
                assert work is not None  # there is a job
                written = work(job)
            except Exception as error:  # whatever is wrong with one image, the others are done
                logging.getLogger(__name__).debug("%s", job.source, exc_info=True)
                found.append((str(job.source), reason(error)))
                tqdm.write(f"{job.source}: {reason(error)}", file=sys.stderr)
                if meets_all(error):
                    found.append(len(jobs) - number)
                    break
            else:
                found.append(written)
                for note in written.notes:
                    tqdm.write(f"{job.source}: note: {note}.", file=sys.stderr)
    if state.num_processes > 1:
        with peers.waiting(lambda: _done(found, len(jobs))):
            found = gather_object(found)
    return Outcome(
        written=[item for item in found if isinstance(item, Written)],
        failures=[item for item in found if isinstance(item, tuple)],
        not_begun=sum(item for item in found if isinstance(item, int)),
        ended=any(isinstance(item, int) for item in found),
    )


def _done(found: list, jobs: int) -> str:
    """What this process did, where nobody is left to tell it to."""
    written = sum(isinstance(item, Written) for item in found)
    failed = "".join(f"\n  {item[0]}: {item[1]}" for item in found if isinstance(item, tuple))
    return f"It has written {written} of its {jobs} images. The same command continues with the rest.{failed}"


def meets_all(error: Exception) -> bool:
    """A disk that is full or not writable, and a GPU that has failed."""
    return isinstance(error, OutputError) or (not is_out_of_memory(error) and isinstance(error, RuntimeError) and "CUDA error" in str(error))


def reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "the device's memory is too small for it. Try a smaller --tile, or --offload."
    return str(error).strip() or type(error).__name__
