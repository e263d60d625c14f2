"""``upscale --watch``: folders whose pictures are restored as they come, until the run is told to stop."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .batch import join, run
from .done import Results
from .jobs import Job, list_jobs
from .processes import launched
from .settings import Settings
from .upscale import Upscaler, find_files

PAUSE = 2.0
"""Seconds between two looks. A file is whole when two looks find the same size and time of change."""

State = tuple[int, int]
"""Bytes of a file, and when it was last changed."""


class Inbox:
    """What comes into the watched folders."""

    def __init__(self, settings: Settings):
        assert settings.output is not None
        self.settings, self.output = settings, settings.output
        self._waiting: dict[Path, State] = {}
        self._over: dict[Path, State] = {}
        """What was done, or failed: again only when it has changed."""

    def look(self) -> list[Job]:
        """Jobs of pictures that are whole and not done."""
        try:
            jobs = list_jobs(self.settings.inputs, self.output, self.settings.suffix)
        except FileNotFoundError:  # none yet
            jobs = []
        states = {job.source: state for job in jobs if (state := _state(job.source))}
        whole = [job for job in jobs if states.get(job.source) == self._waiting.get(job.source, ()) != self._over.get(job.source)]
        self._waiting = states
        results = Results(self.settings, whole)
        todo = [job for job in whole if not results(job)]
        results.report(len(whole) - len(todo))
        self._over |= {job.source: states[job.source] for job in whole}
        return todo


def _state(path: Path) -> State | None:
    try:
        status = path.stat()
    except OSError:  # gone again
        return None
    return status.st_size, status.st_mtime_ns


def watch(settings: Settings) -> int:
    """Restore what lies in the folders and what comes, until SIGINT or SIGTERM. Returns 1 where pictures failed, else 0.

    Raises:
        ValueError: there is no output folder, an input is no folder, or several processes were started.
    """
    _require_folders(settings)
    state, peers = join(settings.device)
    written, failures, ended = 0, 0, False
    try:
        with _stopped_by(signal.SIGTERM):
            upscaler = Upscaler(settings, *find_files(settings, state), state, lambda job: Results(settings, [job]).record(job), by_speed=True)
            inbox = Inbox(settings)
            print(f"Watching {', '.join(settings.inputs)}; results go to {settings.output}. Ctrl+C stops.", file=sys.stderr, flush=True)
            while not ended:
                for job in inbox.look():  # one at a time: each is counted when it is whole
                    outcome = run([job], upscaler.work, state, peers)
                    written += len(outcome.written)
                    failures += len(outcome.failures)
                    if ended := outcome.ended:
                        break
                else:
                    time.sleep(PAUSE)
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
    finally:
        peers.leave()
    print(f"{written} {'image' if written == 1 else 'images'} written to {settings.output}, {failures} failed.")
    return 1 if failures else 0


def _require_folders(settings: Settings) -> None:
    if launched() > 1:
        raise ValueError(f"--watch: {launched()} processes were started, expected 1. Start it without a launcher, once for each GPU and folder.")
    if settings.output is None:
        raise ValueError("--watch: found no -o, expected a folder for the results.")
    for text in settings.inputs:
        if not Path(text).expanduser().is_dir():
            raise ValueError(f"--watch: {text} is no folder that exists. Give folders, or make it first.")
    if settings.overwrite:
        raise ValueError("--watch: found --overwrite, with which each start would do all again. Leave it out, or run once without --watch.")


@contextmanager
def _stopped_by(number: int) -> Iterator[None]:
    """A signal ends the block as Ctrl+C does: results are whole or not there."""

    def stop(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)
