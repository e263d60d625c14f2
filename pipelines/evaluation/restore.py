"""A folder of low-quality images restored, with the seconds of each: the work of ``upscale`` under a stopwatch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState

from ..batch import Written, join, run, share
from ..done import Results
from ..jobs import Job
from ..pictures import read_picture, write_picture
from ..pictures.record import make_record, read_record, same_result
from ..ranges import scaled
from ..settings import Settings
from ..upscale import Upscaler, find_files
from .journal import Journal
from .machine import forget_peak, hash_weights, peak_memory, sha256

BICUBIC = "bicubic"
"""What every method is measured against, beside those of METHODS."""


@dataclass(frozen=True)
class Restored:
    """What became of a folder. ``mine``: this process is the one that measures."""

    failures: dict[str, str]
    device: torch.device
    weights: dict[str, str]
    peak_memory: dict | None
    mine: bool = True


def jobs_of(images: Sequence[Path], folder: Path) -> list[Job]:
    """Each image's result: a PNG of its name."""
    return [Job(image, folder / f"{image.stem}.png") for image in images]


def restore(settings: Settings, jobs: Sequence[Job], journal: Journal) -> Restored:
    """Restore what is not done with these settings yet, this process its share.

    Raises:
        FileExistsError: a file has a result's name, but was not made by this program.
        FileNotFoundError: weights are nowhere.
    """
    state, peers = join(settings.device)
    try:
        results = Results(settings, jobs)

        def is_done(job: Job) -> bool:
            done = results(job)
            _refuse(results.unknown)
            return done

        with peers.waiting(lambda: "Nothing was begun."):
            mine, done = share(jobs, state, is_done)
        if state.is_main_process:
            results.report(done)
        with peers.waiting(lambda: "Nothing was begun."):
            base, weights, companions = find_files(settings, state)
        device = torch.device(settings.device) if settings.device else state.device
        forget_peak(device)
        work = _timed(Upscaler(settings, base, weights, companions, state, results.record).work, journal) if mine else None
        outcome = run(mine, work, state, peers)
        with peers.waiting(lambda: "All images are restored."):
            state.wait_for_everyone()
        failures = dict(outcome.failures)
        if outcome.not_begun:
            raise RuntimeError(f"{outcome.not_begun} images were not started: {next(reversed(failures.values()))} The same command continues.")
        hashes = hash_weights(base, weights, *map(str, filter(None, companions.values())), demo=settings.demo) if state.is_main_process else {}
        return Restored(failures, device, hashes, peak_memory(device) if outcome.written else None, state.is_main_process)
    finally:
        peers.leave()


def _timed(work: Callable[[Job], Written], journal: Journal) -> Callable[[Job], Written]:
    """``work``, whose seconds from file to file go into the journal."""

    def timed(job: Job) -> Written:
        began = time.perf_counter()
        written = work(job)
        seconds = time.perf_counter() - began
        journal.note(job.source.stem, {"image": sha256(job.target)}, seconds=round(seconds, 3))
        return written

    return timed


def enlarge(scale: float, jobs: Sequence[Job], journal: Journal, overwrite: bool = False) -> Restored:
    """The same by bicubic enlargement alone, as the methods' first stage does it."""

    def record(job: Job) -> str:
        return make_record({"method": BICUBIC, "scale": scale}, job.source)

    def is_done(job: Job) -> bool:
        if overwrite or not job.target.is_file():
            return False
        found = read_record(job.target)
        if found is None:
            _refuse([job.target])
        return same_result(found or "", record(job))

    def work(job: Job) -> Written:
        picture = read_picture(job.source)
        width, height = scaled(picture.pixels.size, scale)
        enlarged = F.interpolate(picture.pixels.tensor(), size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        plain = replace(picture, pixels=replace(picture.pixels, alpha=None))
        notes = write_picture(enlarged, plain, job.target, 95, record(job))
        return Written(job.target, (width, height), job.target.stat().st_size, tuple(notes))

    state, peers = join("cpu")
    try:
        mine, _ = share(jobs, state, is_done)
        outcome = run(mine, _timed(work, journal), state, peers)
        return Restored(dict(outcome.failures), torch.device("cpu"), {}, None, _is_main(state))
    finally:
        peers.leave()


def _is_main(state: PartialState) -> bool:
    state.wait_for_everyone()
    return state.is_main_process


def _refuse(unknown: Sequence[Path]) -> None:
    if unknown:
        raise FileExistsError(
            f"-o: found {unknown[0].name} in {unknown[0].parent}, which this program has not written. Give another folder, --overwrite, "
            "or measure those files with --results."
        )
