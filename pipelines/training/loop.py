"""The training loop that all trainings share: accelerate, EMA, schedules, checkpoints, TensorBoard, sample grids."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, is_tensorboard_available, send_to_device
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..processes import must_compute_on_cpu, require_joined
from .checkpoints import Progress, averaged, find_checkpoint, keep_what_learns, learning, save_checkpoint
from .data import TrainingPictures, load_batches
from .optimizers import MUON_LR, Muon

_log = logging.getLogger(__name__)

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoopOptions:
    """How long, how fast, how often. ``batch`` is of one process; ``max_minutes`` ends a run early, as if it had been cut, but saved."""

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


class Task(Protocol):
    """What is trained.

    ``phases`` names the alternating updates of a step, and what learns in each. ``loss`` gives the loss of one phase, and figures to log; random
    draws come from ``generator``, on the CPU. The EMA is of the first phase's module. ``sample`` gives a picture for people to look at, (3, H, W) in [0, 1]. ``save`` writes the result, beside each checkpoint.

    A task may also have ``frozen`` networks, which the loop moves to the device, in the training's precision; ``measures``, moved in float32;
    ``optimizers`` of phases that want another than AdamW, as functions of parameters and options; and ``step``, the number of steps made, told by the loop.
    """

    phases: dict[str, nn.Module]
    """Replaced by the loop with what accelerate makes of the modules: call these."""

    def loss(self, phase: str, batch: dict[str, torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]: ...

    def sample(self, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def save(self, folder: Path) -> None: ...


def train(task: Task, pictures: TrainingPictures, options: LoopOptions) -> list[dict[str, float]]:
    """Train and save. Returns what was logged, one entry every ``log_every`` steps.

    Raises:
        ValueError: the output holds another run's checkpoint and ``resume`` was not asked for.
        RuntimeError: a loss is not a finite number, or a launcher's processes did not find each other.
    """
    checkpoint = find_checkpoint(options.output)
    if checkpoint and not options.resume:
        raise ValueError(
            f"output: found a run's checkpoint in {options.output}, expected an empty folder. Pass --resume to go on with it, or another --output."
        )
    accelerator = Accelerator(
        cpu=must_compute_on_cpu(),
        gradient_accumulation_steps=options.accumulate,
        mixed_precision=options.mixed_precision,
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=options.output,
    )
    require_joined(accelerator.num_processes, "Start them with 'accelerate launch --multi_gpu'.")
    options.output.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("logs")
    state, schedulers, optimizers = Progress(), [], {}
    for phase, module in task.phases.items():
        optimizer = getattr(task, "optimizers", {}).get(phase, _optimizer)(learning(module), options)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options)))
        task.phases[phase], optimizers[phase] = accelerator.prepare(module, optimizer)
    for network in getattr(task, "frozen", ()):
        network.to(accelerator.device)
        if accelerator.mixed_precision in _HALF:
            network.to(_HALF[accelerator.mixed_precision])
    for network in getattr(task, "measures", ()):
        network.to(accelerator.device)
    keep_what_learns(accelerator)
    first = next(iter(task.phases.values()))
    ema = EMAModel(learning(first), decay=options.ema) if options.ema else None
    accelerator.register_for_checkpointing(state, *schedulers, *([ema] if ema else []))
    if checkpoint:
        accelerator.load_state(checkpoint)
        if ema:
            ema.to(accelerator.device)
        _log.info("going on from step %d", state.step)

    samples = options.batch * accelerator.num_processes * options.accumulate
    pictures.length = options.steps * samples
    loader = accelerator.prepare(load_batches(pictures, options.batch, state.step * samples, options.workers))
    example = torch.utils.data.default_collate([pictures[i] for i in range(min(4, options.batch))])
    began, history = time.monotonic(), []
    sums = state.sums
    bar = tqdm(total=options.steps, initial=state.step, disable=not accelerator.is_main_process, desc=options.output.name)
    for number, batch in enumerate(loader, state.step * options.accumulate):
        task.step = state.step
        generator = torch.Generator().manual_seed(hash((options.seed, number, accelerator.process_index)) % 2**63)
        with accelerator.accumulate(*task.phases.values()):
            for phase, module in task.phases.items():
                loss, figures = task.loss(phase, batch, generator)
                if not torch.isfinite(loss):
                    raise RuntimeError(
                        f"{phase}: the loss is {loss.item()} at step {state.step}. Lower lr or train in float32; the last checkpoint is whole."
                    )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizers[phase])  # not the other phase's, which may not be whole yet
                    figures["gradient"] = nn.utils.clip_grad_norm_(learning(module), options.max_grad_norm)
                optimizers[phase].step()
                optimizers[phase].zero_grad()
                for name, value in {phase: loss.detach(), **{f"{phase}/{name}": value for name, value in figures.items()}}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / options.log_every / (1 if name.endswith("/gradient") else options.accumulate)
        if not accelerator.sync_gradients:
            continue
        for scheduler in schedulers:
            scheduler.step()
        if ema:
            ema.step(learning(first))
        state.step += 1
        bar.update()
        if state.step % options.log_every == 0:
            history.append({"step": state.step, **sums})
            accelerator.log({**sums, "lr": schedulers[0].get_last_lr()[0]}, step=state.step)
            bar.set_postfix({phase: f"{sums[phase]:.4f}" for phase in task.phases})
            sums.clear()
        late = bool(broadcast(torch.tensor(int(time.monotonic() - began > 60 * options.max_minutes), device=accelerator.device)))
        last = late or state.step == options.steps
        if last or state.step % options.save_every == 0:
            save_checkpoint(accelerator, options.output)
            if accelerator.is_main_process:
                with averaged(ema, first):
                    task.save(options.output)
        if accelerator.is_main_process and (last or state.step % options.sample_every == 0):
            with averaged(ema, first), torch.no_grad():
                _save_picture(task.sample(send_to_device(example, accelerator.device)), options.output / "samples" / f"{state.step:07d}.png")
        if last:
            break
    bar.close()
    accelerator.end_training()
    return history


def _optimizer(parameters: list[nn.Parameter], options: LoopOptions) -> torch.optim.Optimizer:
    if options.optimizer == "muon":
        return Muon(parameters, options.lr, options.matrix_lr, betas=options.betas, weight_decay=options.weight_decay)
    return torch.optim.AdamW(parameters, options.lr, betas=options.betas, weight_decay=options.weight_decay)


def _rate(step: int, options: LoopOptions) -> float:
    """The learning rate at a step, relative to ``lr``: a linear rise, then constant or half a cosine down to zero."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if not options.cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup)))


def _save_picture(picture: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()).save(path)
