"""Reading weights in a process that was forked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..lazy import torch

_IMPORTED_IN = os.getpid()


@contextmanager
def safe_after_fork() -> Iterator[None]:
    """In a forked process, compute on one thread inside. If its parent had used several, OpenMP would wait for them here forever, where they do not exist."""
    if os.getpid() == _IMPORTED_IN:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
