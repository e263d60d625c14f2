"""Processes that begin with what this one has imported: a start takes no seconds, and they can be killed at any place."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


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
        status = 1
        try:
            status = work() or 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)

    def wait(self, timeout: float = 240) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} seconds: {self.text}"
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()
