"""Running something that may hang, die or take all memory, in a process of its own."""

import ctypes
import os
import select
import signal
from pathlib import Path

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/clear_refs").exists(), reason="needs fork and /proc")

ADDRESSES = 4 << 30  # beyond what the process has: a runaway ends by itself


def outcome(work, seconds: float = 20.0) -> tuple[str, int]:
    """What became of ``work()`` in a forked process, and by how many bytes its resident memory grew at most.

    Either ``"ExceptionType: message"``, ``"returned: repr"``, ``"hang"`` or ``"died"``.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _report(work, writing)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], seconds)
        answer = os.read(reading, 1 << 16).decode("utf-8", "replace") if ready else ""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        return ("died" if ready else "hang"), 0
    grown, _, text = answer.partition("\n")
    return text, int(grown)


def _report(work, pipe: int) -> None:
    import resource

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, resource.RLIM_INFINITY))
    ctypes.CDLL(None).malloc_trim(0)  # what this process has freed before would be used again, and nothing would grow
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    try:
        text = f"returned: {work()!r}"
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    os.write(pipe, f"{_status('VmHWM') - before}\n{text[:4000]}".encode("utf-8", "backslashreplace"))


def _status(what: str) -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1]) * 1024
