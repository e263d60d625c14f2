"""The processes that a launcher started (``accelerate launch``, ``torchrun``): joining them, and noticing when one is gone.

Shares of work may differ by days, so that waiting for the others has no time limit of its own. Instead each process gives a sign of life every few
seconds, and one that waits for others ends with a report when one of them has given none for :func:`patience`.
"""

import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
from torch import distributed

_JOINED, _ALIVE, _ENDED = "joined", "alive", "ended"
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = re.compile(r"gloo|nccl|xccl|Connection (closed|reset)|TCPStore", re.IGNORECASE)
"""What torch's own errors about lost connections hold."""

NO_LIMIT = timedelta(days=30)
"""Of collective operations, which the signs of life guard instead."""


def launched() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def patience() -> float:
    """Seconds that a process may take to join, or be silent: five minutes, unless FEWSTEP_SR_PATIENCE says otherwise."""
    text = os.environ.get("FEWSTEP_SR_PATIENCE", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= NO_LIMIT.total_seconds():
        raise ValueError(f"FEWSTEP_SR_PATIENCE: found {text!r}, expected seconds, 1 or more.")
    return seconds


def must_compute_on_cpu() -> bool:
    """Whether several processes have no accelerator, which accelerate wants to be told."""
    return launched() > 1 and not torch.accelerator.is_available()


def require_joined(joined: int, advice: str) -> None:
    """Raises RuntimeError where accelerate sees other processes than the launcher started, so that each would do all the work by itself."""
    if joined != launched():
        raise RuntimeError(f"processes: the launcher started {launched()}, but accelerate sees {joined}. {advice}")


class Peers:
    """The processes of one run, this one among them; without a launcher it is alone and nothing here does anything.

    Args:
        store: where they leave each other notes; None for a process alone.
    """

    def __init__(self, store: "distributed.Store | None", rank: int, count: int):
        self._store, self.rank, self.count = store, rank, count
        self._report: Callable[[], str] | None = None
        self._seen = {other: ("", time.monotonic()) for other in range(count) if other != rank}
        self._ended: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler = None
        if store is not None:
            self._wake, waker = socket.socketpair()
            waker.setblocking(False)
            self._waker = waker
            if threading.current_thread() is threading.main_thread():
                # Python writes the signal's number to the waker at once, even while the main thread waits in C++, where no handler would run.
                self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
                signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="signs of life", daemon=True)
            self._thread.start()

    @contextmanager
    def waiting(self, report: Callable[[], str]) -> Iterator[None]:
        """Inside, where this process may have to wait for others, it ends with status 1 when one of them is gone.

        Args:
            report: what this process did until now, and how to go on, for the message.

        Raises:
            RuntimeError: a collective operation itself noticed that another process is gone.
        """
        now = time.monotonic()
        self._seen = {other: (sign, now) for other, (sign, _) in self._seen.items()}
        before, self._report = self._report, report
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _LOST.search(str(error)):
                raise
            reason = str(error).splitlines()[0][:200]
            raise RuntimeError(f"process {self.rank} of {self.count} has lost another, which ended ({reason}). {report()}") from error
        finally:
            self._report = before

    def leave(self) -> None:
        """Tell the others that this process has ended, as they have to know where they wait for it."""
        if self._thread is None:
            return
        self._stop.set()
        self._waker.send(b"\0")
        self._thread.join(timeout=5)
        if self._handler is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._handler)
        assert self._store is not None  # whose thread runs
        with suppress(RuntimeError):  # whoever kept the notes may have ended before
            self._store.set(f"{_ENDED}/{self.rank}", "1")

    def _watch(self) -> None:
        assert self._store is not None
        pause = min(5.0, patience() / 10)
        for number in range(sys.maxsize):
            begin = time.monotonic()
            ready, _, _ = select.select([self._wake], [], [], pause)
            held_up = max(0.0, time.monotonic() - begin - pause)  # stopped, or asleep with the machine, as the others may have been
            self._seen = {other: (sign, since + held_up) for other, (sign, since) in self._seen.items()}
            if self._stop.is_set():
                return
            if ready and signal.SIGTERM in self._wake.recv(64):
                self._end("was told to end, as launchers do when another process has failed", 128 + signal.SIGTERM)
            try:
                self._store.set(f"{_ALIVE}/{self.rank}", str(number))
                gone = self._gone()
            except RuntimeError:
                gone = self._twice(0, "process 0, which keeps the connection, has ended")
            if gone and self._report:
                self._end("waited for others, but " + "; ".join(gone.values()), 1)

    def _gone(self) -> dict[int, str]:
        """What became of the processes that have ended or are silent, by number."""
        assert self._store is not None
        gone: dict[int, str] = {}
        now = time.monotonic()
        for other, (last, since) in self._seen.items():
            if self._store.check([f"{_ENDED}/{other}"]):
                gone |= self._twice(other, f"process {other} has ended")
                continue
            sign = self._store.get(f"{_ALIVE}/{other}").decode() if self._store.check([f"{_ALIVE}/{other}"]) else ""
            if sign != last:
                self._seen[other] = (sign, now)
            elif now - since > patience():
                gone[other] = f"process {other} has given no sign of life for {patience():.0f} seconds"
        return gone

    def _twice(self, other: int, what: str) -> dict[int, str]:
        """A process that has ended is missed from the second look on: at the end of a run one may pass the last barrier a moment before this one."""
        if other in self._ended:
            return {other: what}
        self._ended.add(other)
        return {}

    def _end(self, what: str, status: int) -> NoReturn:
        """Say what happened and end, from whatever the main thread is waiting in: no collective operation can be called off."""
        done = f" {self._report()}" if self._report else ""
        print(f"error: process {self.rank} of {self.count} {what}.{done}", file=sys.stderr, flush=True)
        os._exit(status)


def join() -> Peers:
    """Meet the other processes that the launcher started. At once without a launcher.

    Raises:
        RuntimeError: not all have come within :func:`patience`; says which.
    """
    if launched() == 1 or not all(name in os.environ for name in _RENDEZVOUS):
        return Peers(None, 0, 1)
    rank, count, limit = int(os.environ["RANK"]), launched(), timedelta(seconds=patience())
    missing = list(range(count))
    try:
        # The same notes as those that the process group will use: where the first process keeps them, both use one server.
        store, _, _ = next(distributed.rendezvous("env://", rank, count, timeout=limit))
        store = distributed.PrefixStore("fewstep_sr", store)
        store.set(f"{_JOINED}/{rank}", "1")
        end = time.monotonic() + limit.total_seconds()
        while missing := [other for other in missing if not store.check([f"{_JOINED}/{other}"])]:
            if time.monotonic() > end:
                raise RuntimeError(f"no sign of {', '.join(map(str, missing))}")
            time.sleep(0.1)
    except RuntimeError as error:  # torch.distributed's own errors are such
        raise RuntimeError(
            f"processes: {count} were started, but not all have joined within {patience():.0f} seconds ({str(error).splitlines()[0][:200]}). "
            "See what the others say, and start them all again; FEWSTEP_SR_PATIENCE, in seconds, lets them take longer."
        ) from error
    return Peers(store, rank, count)
