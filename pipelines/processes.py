"""The processes that a launcher started (``accelerate launch``, ``torchrun``), for accelerate to join."""

import os

import torch


def launched() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def must_compute_on_cpu() -> bool:
    """Whether several processes have no accelerator, which accelerate wants to be told."""
    return launched() > 1 and not torch.accelerator.is_available()


def require_joined(joined: int, advice: str) -> None:
    """Raises RuntimeError where accelerate sees other processes than the launcher started, so that each would do all the work by itself."""
    if joined != launched():
        raise RuntimeError(f"processes: {launched()} were started, but accelerate joins {joined}. {advice}")
