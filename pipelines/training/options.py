"""How long, how fast and how often a training goes."""

import math
from dataclasses import dataclass
from pathlib import Path

from .optimizers import MUON_LR


@dataclass(frozen=True)
class LoopOptions:
    """What all trainings share. ``batch`` is of one process; ``max_minutes`` ends a run early, as if it had been cut, but saved."""

    output: Path
    steps: int
    batch: int = 4
    lr: float = 5e-5
    warmup: int = 0
    cosine: bool = False
    seed: int = 0
    ema: float = 0.0
    accumulate: int = 1
    mixed_precision: str = "no"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    matrix_lr: float = MUON_LR
    betas: tuple[float, float] = (0.9, 0.999)
    workers: int = 0
    save_every: int = 500
    sample_every: int = 500
    log_every: int = 10
    max_minutes: float = math.inf
    resume: bool = False
