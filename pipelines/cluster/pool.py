"""Actors on all machines of a cluster, and an account of what was given to them.

Ray starts the actors, tells of machines that come and go, and carries blocks and rows. The account is kept here, and not by Ray Data: blocks that were at work on a
killed machine ended there in ActorUnavailableError, whatever ``max_task_retries`` said (Ray 2.60, three runs of three), and its actors live for one data set, which has an end
before the next is begun.
"""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..batch import reason
from ..pictures import OutputError
from .listing import Item
from .worker import Row

T = TypeVar("T")

LOOK = 2.0
"""Seconds between two looks at which machines there are."""

_SOON = 0.05
"""Seconds after which an idle worker asks again for a block, where the listing is slower than the workers."""

_DEATHS = 2
"""Workers that may die of one picture, alone with it, before it is given up."""

_STRIKES = 3
"""Workers that a machine may lose one after another, without a block done between, before it gets no more."""


class Ahead(Generic[T]):
    """What an iterator gives, a bounded number ahead, taken out of it by a thread."""

    def __init__(self, items: Iterable[T], number: int):
        self._queue: queue.Queue = queue.Queue(number)
        self._closed = threading.Event()
        self.ended = False
        """Whether all was taken."""
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._put((item, None))
                if self._closed.is_set():
                    return
            self._put((None, None))
        except Exception as error:
            self._put((None, error))

    def _put(self, entry: tuple) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(entry, timeout=1)
            except queue.Full:
                continue

    def take(self) -> T | None:
        """The next, or None where there is none, or none yet. Raises what the iterator raised, a store's own errors as RuntimeError."""
        try:
            item, error = (None, None) if self.ended else self._queue.get_nowait()
        except queue.Empty:
            return None
        self.ended = item is None
        if isinstance(error, OSError | ValueError | RuntimeError):
            raise error
        if error is not None:
            raise RuntimeError(f"the listing ended ({type(error).__name__}: {error}).") from error
        return item

    def close(self) -> None:
        self._closed.set()


@dataclass(eq=False)
class _Seat:
    """An actor and the machine that it is on."""

    actor: Any
    node: str


class Pool:
    """A worker for each GPU, or CPU, of each machine.

    Args:
        ray: the module.
        worker: a class with ``start()``, and ``work(items)`` that gives a row for each.
        resource: "GPU" or "CPU".
        arguments: of the workers.
    """

    def __init__(self, ray: Any, worker: type, resource: str, *arguments: Any):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._resource, self._arguments = ray, resource, arguments
        needs = {"num_cpus": 0, "num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
        remote = ray.remote(**needs)(worker)
        self._on = lambda node: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        self._seats: set[_Seat] = set()
        self._idle: list[_Seat] = []
        self._running: dict[Any, tuple[_Seat, Sequence[Item]]] = {}
        """By the call's reference; no items while a worker starts."""
        self._again: deque[Sequence[Item]] = deque()
        self._deaths: Counter[Item] = Counter()
        self._strikes: Counter[str] = Counter()
        self._unfit: dict[str, str] = {}
        self.notes: deque[str] = deque()
        """What happened to workers and machines, for people."""

    def run(self, blocks: Ahead[list[Item]]) -> Iterator[Row]:
        """What became of each picture, as it is done: each has one row, whichever workers die.

        Raises:
            RuntimeError: there are machines, and none of them can work.
        """
        looked = -LOOK
        while True:
            if time.monotonic() - looked >= LOOK:
                self._look()
                looked = time.monotonic()
            while self._idle and (block := self._again.popleft() if self._again else blocks.take()):
                seat = self._idle.pop()
                self._running[seat.actor.work.remote(list(block))] = seat, block
            if blocks.ended and not self._again and not any(block for _, block in self._running.values()):
                return
            pause = _SOON if self._idle and not blocks.ended else LOOK
            if self._running:
                for reference in self._ray.wait(list(self._running), timeout=pause)[0]:
                    yield from self._collect(reference)
            else:
                time.sleep(pause)

    def close(self) -> None:
        """End the workers."""
        for seat in list(self._seats):
            self._leave(seat)

    def _look(self) -> None:
        """Begin workers on machines that have come."""
        alive = {node["NodeID"]: int(node["Resources"].get(self._resource, 0)) for node in self._ray.nodes() if node["Alive"]}
        for seat in [seat for seat in self._idle if seat.node not in alive]:
            self._leave(seat)
        have = Counter(seat.node for seat in self._seats)
        for node, wanted in alive.items():
            for _ in range(0 if node in self._unfit else wanted - have[node]):
                seat = _Seat(self._on(node).remote(*self._arguments), node)
                self._seats.add(seat)
                self._running[seat.actor.start.remote()] = seat, ()
        if not self._seats and (left := [self._unfit[node] for node, wanted in alive.items() if wanted and node in self._unfit]):
            raise RuntimeError(f"no machine of the cluster can work. {left[-1]}")

    def _collect(self, reference: Any) -> Iterator[Row]:
        seat, block = self._running.pop(reference)
        try:
            rows = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # it has said why
            yield from self._lose(seat, block, error.cause or error)
        except self._ray.exceptions.RayError as error:  # it, or its machine, is gone
            yield from self._lose(seat, block, error)
        else:
            self._idle.append(seat)
            if block:
                self._strikes[seat.node] = 0
                yield from rows

    def _lose(self, seat: _Seat, block: Sequence[Item], error: Exception) -> Iterator[Row]:
        """Hand a block to others, in single pictures, so that one that kills its workers is known."""
        self._leave(seat)
        self._strikes[seat.node] += 1
        own = isinstance(error, OutputError) or (not block and not isinstance(error, self._ray.exceptions.RayError))
        if own or self._strikes[seat.node] >= _STRIKES:
            if seat.node not in self._unfit:
                self._unfit[seat.node] = reason(error)
                self.notes.append(f"machine {self._name(seat.node)} gets no more pictures: {reason(error)}")
        elif block:
            self.notes.append(f"a worker on {self._name(seat.node)} was lost; what it had ({len(block)}) goes to others")
        if own or len(block) != 1:
            self._again.extend([item] for item in block)
            return
        (item,) = block
        self._deaths[item] += 1
        if self._deaths[item] < _DEATHS:
            self._again.append(block)
        else:
            yield Row(item, error=f"its worker died {_DEATHS} times while it had this picture alone ({_first_line(error)}).")

    def _leave(self, seat: _Seat) -> None:
        self._seats.discard(seat)
        if seat in self._idle:
            self._idle.remove(seat)
        self._ray.kill(seat.actor)

    def _name(self, node: str) -> str:
        return next((found["NodeManagerHostname"] for found in self._ray.nodes() if found["NodeID"] == node), node)


def _first_line(error: Exception) -> str:
    return (reason(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
