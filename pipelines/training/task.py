"""What the training loop asks of a training: its hooks, and what they do where a training says nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .optimizers import Muon
from .options import LoopOptions

Batch = dict[str, torch.Tensor]
"""``hq`` (B, 3, H, W) and, with a degradation, ``lq`` (B, 3, H / 4, W / 4), RGB in [0, 1]; ``number`` (B,) where samples come again."""


class Task(ABC):
    """What is trained: networks, the losses of a step's phases, pictures for people to look at, the result.

    The loop calls, in this order: :meth:`optimizer` and :meth:`prepared` once a phase; :meth:`begin_step` before a batch; :meth:`loss` once a
    phase; and now and then :meth:`sample` and :meth:`save`, with the averaged weights in place where the run keeps an average.

    A task must not read a tensor's value (``item``, ``float``, ``bool``, ``cpu``) in :meth:`loss`: the device would be waited for in each batch.
    """

    phases: dict[str, nn.Module]
    """The alternating updates of a step by name, each with the module that learns in it. The average is of the first one's."""

    frozen: Sequence[nn.Module] = ()
    """Networks that the loop moves to the device, in the training's precision."""

    measures: Sequence[nn.Module] = ()
    """Networks that it moves in float32, such as a perceptual distance."""

    step: int = 0
    """Steps made before this batch, as :meth:`begin_step` heard it."""

    def optimizer(self, phase: str, parameters: list[nn.Parameter], options: LoopOptions) -> torch.optim.Optimizer:
        """The optimizer of a phase's learning parameters: what the options name, unless the method has one of its own."""
        if options.optimizer == "muon":
            dtype = torch.bfloat16 if options.mixed_precision == "bf16" else None
            return Muon(parameters, options.lr, options.matrix_lr, betas=options.betas, weight_decay=options.weight_decay, dtype=dtype)
        return torch.optim.AdamW(parameters, options.lr, betas=options.betas, weight_decay=options.weight_decay)

    def prepared(self, phase: str, module: nn.Module) -> None:
        """Take ``module``, the phase's network as accelerate has wrapped it (precision, processes): :meth:`loss` calls this one."""
        self.phases[phase] = module

    def begin_step(self, step: int) -> None:
        """Hear the number of steps that were made before this batch. It is the same for all batches whose gradients are added up."""
        self.step = step

    def settings(self) -> dict[str, Any]:
        """What the task adds to the settings that a run has to keep when it goes on from a checkpoint, as JSON has it."""
        return {}

    @abstractmethod
    def loss(self, phase: str, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one phase, a scalar, and detached scalars to log. All random draws come from ``generator``, which is on the CPU."""

    @abstractmethod
    def sample(self, batch: Batch) -> torch.Tensor:
        """A picture for people to look at, (3, height, width) in [0, 1]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the result into ``folder``, over the last one."""
