"""Many pictures: which there are, where they go, who does which, and what became of them."""

import glob
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from .pictures import FORMATS
from .processes import launched, must_compute_on_cpu, require_joined
from .runtime import is_out_of_memory


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def list_jobs(inputs: list[str], output: Path, suffix: str | None) -> list[Job]:
    """One job for each picture in files, folders (with their subfolders, whose structure is kept) and globs.

    Args:
        output: a folder, or a file where there is one picture and the name ends like one.
        suffix: of the results, ``".png"`` and so on; None keeps each picture's own.

    Raises:
        FileNotFoundError: an input is nowhere, or there is no picture in any.
        ValueError: a result would replace its own source, or two results would have one name.
    """
    sources: dict[Path, Path] = {}
    for text in inputs:
        for source, relative in _sources(text, output):
            sources.setdefault(source.resolve(), relative)
    if not sources:
        raise FileNotFoundError(f"no pictures found in {', '.join(inputs)}; expected {', '.join(FORMATS)}.")
    if output.suffix.lower() in FORMATS and not output.is_dir():
        if len(sources) > 1:
            raise ValueError(f"-o: found the file {output} for {len(sources)} pictures, expected a folder.")
        jobs = [Job(source, output) for source in sources]
    else:
        jobs = [Job(source, output / _named(relative, suffix)) for source, relative in sources.items()]
    taken: dict[Path, Path] = {}
    for job in jobs:
        target = job.target.resolve()
        if target == job.source:
            raise ValueError(f"{job.source}: the result would replace the picture itself. Give another folder with -o.")
        if target in taken:
            raise ValueError(f"{taken[target]} and {job.source} would both become {job.target}. Give them different folders, or leave out --format.")
        taken[target] = job.source
    return jobs


def _sources(text: str, output: Path) -> Iterable[tuple[Path, Path]]:
    """Pictures that an input names, each with its path below the output folder."""
    path = Path(text).expanduser()
    if path.is_dir():
        if path.resolve() == output.resolve():
            raise ValueError(f"{text}: it is the output folder, too. Give another folder with -o.")
        inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in FORMATS and p.is_file() and not p.name.startswith(".")]
        return [(p, p.relative_to(path)) for p in inside if output.resolve() not in p.resolve().parents]
    if path.is_file():
        return [(path, Path(path.name))]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise FileNotFoundError(f"{text}: there is no such file or folder, and nothing matches it.")
    return [(p, Path(p.name)) for p in matches if p.is_file() and p.suffix.lower() in FORMATS]


def _named(relative: Path, suffix: str | None) -> Path:
    if suffix is None and relative.suffix.lower() not in FORMATS:
        return relative.with_suffix(".png")
    return relative.with_suffix(suffix) if suffix else relative


def join(device: str | None) -> PartialState:
    """This process's place among those that a launcher started (``accelerate launch``, ``torchrun``); alone without one.

    Raises:
        RuntimeError: accelerate sees no others where the launcher started some, so that each process would do every picture.
    """
    cpu = device == "cpu" or must_compute_on_cpu()
    state = PartialState(cpu=cpu) if launched() == 1 else PartialState(cpu=cpu, timeout=timedelta(days=30))  # shares may differ by days
    require_joined(state.num_processes, "Leave out --device, or say cpu.")
    return state


def share(jobs: list[Job], state: PartialState, overwrite: bool) -> tuple[list[Job], int]:
    """This process's jobs out of those that are still to do, and how many are done already.

    The first process looks at what is done, for all: while one looks, another may have begun to write.
    """
    todo = [job for job in jobs if overwrite or not job.target.exists()]
    message = [todo]
    if state.num_processes > 1:
        broadcast_object_list(message)
    (todo,) = message
    # Older versions of accelerate give the last element to every process for which none is left: let that be an empty one.
    padded = [*todo, *[None] * (state.num_processes - len(todo))]
    with state.split_between_processes(padded) as mine:
        return [job for job in mine if job is not None], len(jobs) - len(todo)


def run(jobs: list[Job], work: Callable[[Job], None] | None, state: PartialState) -> list[tuple[str, str]]:
    """Do this process's jobs with a progress bar. A picture that fails is noted and the next one done.

    Args:
        work: may be None where there are no jobs.

    Returns:
        Names and reasons of all failures, those of the other processes, too.
    """
    failures = []
    with tqdm(jobs, unit="picture", position=state.local_process_index, dynamic_ncols=True) as bar:
        for job in bar:
            bar.set_description(job.source.name)
            try:
                work(job)
            except Exception as error:  # whatever is wrong with one picture, the others are done
                logging.getLogger(__name__).debug("%s", job.source, exc_info=True)
                failures.append((str(job.source), _reason(error)))
                tqdm.write(f"{job.source}: {failures[-1][1]}", file=sys.stderr)
    return gather_object(failures) if state.num_processes > 1 else failures


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "the device's memory is too small for it. Try a smaller --tile, or --offload."
    return str(error).strip() or type(error).__name__
