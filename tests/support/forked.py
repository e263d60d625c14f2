"""Processes that begin with what this one has imported: a start takes no seconds, and they can be killed at any place."""

import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(rank: int, number: int, port: int) -> dict[str, str]:
    """What a launcher tells the process of this rank, of CPU processes on one machine."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}


class Forked:
    """``work`` in a process of its own, with ``environment`` added; what it prints goes to ``log``."""

    def __init__(self, work: Callable[[], int | None], log: Path, environment: dict[str, str] | None = None):
        self.log = log
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(work, environment or {}), daemon=True)
        self.process.start()

    def _run(self, work, environment) -> None:
        output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(output, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (to the end)
        os.environ.update(environment)
        if accelerate := sys.modules.get("accelerate.state"):  # which remembers a run of this process as the only one there is
            accelerate.AcceleratorState._reset_state(reset_partial_state=True)
            accelerate.GradientState._reset_state()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # OpenMP's other threads stayed behind, and would be waited for
        if tqdm := sys.modules.get("tqdm"):  # whose lock is all processes': one that is killed with it would stop every bar of the others
            tqdm.tqdm.set_lock(threading.RLock())
        status = 1
        try:
            status = work() or 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)

    def wait(self, timeout: float = 600) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} seconds: {self.text}"
        return self.process.exitcode

    @classmethod
    def together(cls, work: Callable[[], int | None], number: int, folder: Path) -> list["Forked"]:
        """So many processes that find each other, as a launcher starts them; their logs are ``log 0`` and so on in ``folder``."""
        port = free_port()
        return [cls(work, folder / f"log {rank}", environment_of(rank, number, port)) for rank in range(number)]

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()
