"""The training loop that all trainings share: accelerate, EMA, schedules, checkpoints, TensorBoard, sample grids.

Nothing in a batch waits for the device. It is waited for when figures are logged, a checkpoint or a sample is written, and nowhere else,
but for the scaler of fp16, which has to know whether the gradients overflowed before each update.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import InitProcessGroupKwargs, broadcast, is_tensorboard_available, send_to_device
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..processes import NO_LIMIT, join, must_compute_on_cpu, require_joined
from .checkpoints import averaged, find_checkpoints, keep_what_learns, learning, load_checkpoint, save_checkpoint
from .data import TrainingPictures, load_batches
from .options import LoopOptions
from .progress import Progress
from .records import go_on, settings_of
from .states import reason
from .task import Batch, Task

_log = logging.getLogger(__name__)

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def train(task: Task, pictures: TrainingPictures, options: LoopOptions) -> list[dict[str, float]]:
    """Train and save. Returns what was logged, one entry every ``log_every`` steps.

    Raises:
        ValueError: the output holds another run's checkpoint and ``resume`` was not asked for, or a checkpoint that can't be gone on from.
        RuntimeError: a loss is not a finite number, or a launcher's processes did not find each other.
    """
    checkpoints = _checkpoints(options)
    run = _Run(task, pictures, options)
    try:
        with run.peers.waiting(lambda: "The last checkpoint is complete: --resume continues from it."):
            return _train(run, checkpoints)
    except BaseException:
        run.save_before_the_end()
        raise
    finally:
        run.peers.leave()


def _train(run: "_Run", checkpoints: list[Path]) -> list[dict[str, float]]:
    pictures, options = run.pictures, run.options
    if checkpoints:
        run.resume(checkpoints)
    elif options.resume and run.accelerator.is_main_process:
        _log.warning("%s: found no checkpoint to continue from; the run begins with step 1.", options.output)
    example = torch.utils.data.default_collate([pictures[i] for i in range(min(4, options.batch))])
    for number, batch in run.batches():
        run.learn(number, batch)
        if not run.accelerator.sync_gradients:
            continue
        run.end_step()
        if run.due(options.log_every):
            run.log()
        if last := run.is_last():
            run.finished = True
        if last or run.due(options.save_every):
            run.save()
        if last or run.due(options.sample_every):
            run.sample(example)
        if last:
            break
    if not run.finished:  # all steps were made before; the run may have been killed before its result was written
        advice = "what is written anew is the result. More --steps go on"
        _log.warning("%s: nothing to train, found all of %d steps made; %s.", options.output, run.progress.step, advice)
        run.save_result()
        run.sample(example)
    run.close()
    return run.history


def draw_seed(seed: int, number: int, process: int) -> int:
    """The seed of a batch's draws: of 63 bits, and the same on every machine and in every version of Python."""
    return int(np.random.SeedSequence([seed, number, process]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _checkpoints(options: LoopOptions) -> list[Path]:
    checkpoints = find_checkpoints(options.output)
    if checkpoints and not options.resume:
        raise ValueError(
            f"output: found a run's checkpoint in {options.output}, expected an empty folder. Pass --resume to continue it, or another --output."
        )
    return checkpoints


class _Run:
    """A training under way: what accelerate made of the task's networks, and what is done with them in each step."""

    def __init__(self, task: Task, pictures: TrainingPictures, options: LoopOptions):
        self.task, self.pictures, self.options = task, pictures, options
        self.peers = join()
        self.progress, self.finished = Progress(), False
        self.saved: int | None = None  # no step is made
        self.updating = False
        self.history: list[dict[str, float]] = []
        self.accelerator = self._join()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []
        self._prepare()
        first = next(iter(task.phases.values()))
        self.first, self.ema = first, EMAModel(learning(first), decay=options.ema) if options.ema else None
        self.accelerator.register_for_checkpointing(*self._kept)
        keep_what_learns(self.accelerator)
        self.settings = settings_of(task, pictures, options, self.accelerator.num_processes)
        self.began = time.monotonic()

    def _join(self) -> Accelerator:
        accelerator = Accelerator(
            cpu=must_compute_on_cpu(),
            gradient_accumulation_steps=self.options.accumulate,
            mixed_precision=self.options.mixed_precision,
            log_with="tensorboard" if is_tensorboard_available() else None,
            project_dir=self.options.output,
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=NO_LIMIT)],
        )
        require_joined(accelerator.num_processes, "Start them with 'accelerate launch --multi_gpu'.")
        self.options.output.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("logs")
        return accelerator

    def _prepare(self) -> None:
        """Give each phase its optimizer, its schedule and its place on the device, and the frozen networks theirs."""
        task, accelerator = self.task, self.accelerator
        for phase, module in task.phases.items():
            optimizer = task.optimizer(phase, learning(module), self.options)
            self.schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, self.options)))
            wrapped, self.optimizers[phase] = accelerator.prepare(module, optimizer)
            task.prepared(phase, wrapped)
        for network in task.frozen:
            network.to(accelerator.device, _HALF.get(accelerator.mixed_precision))
        for network in task.measures:
            network.to(accelerator.device)

    @property
    def _kept(self) -> list:
        """What a checkpoint holds besides networks, optimizers and random states; the order is the files'."""
        return [self.progress, *self.schedulers, *([self.ema] if self.ema else [])]

    def resume(self, checkpoints: list[Path]) -> None:
        """Go on from the last checkpoint that is whole, with the present learning rates and weight decays."""
        modules, optimizers = list(self.task.phases.values()), list(self.optimizers.values())
        groups = [[(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups] for optimizer in optimizers]
        go_on(checkpoints, self.settings, lambda folder: load_checkpoint(self.accelerator, modules, optimizers, self._kept, folder))
        for optimizer, scheduler, present in zip(optimizers, self.schedulers, groups, strict=True):
            scheduler.base_lrs = [lr for lr, _ in present]
            for group, (lr, decay) in zip(optimizer.param_groups, present, strict=True):
                group |= {"initial_lr": lr, "lr": lr * rate(self.progress.step, self.options), "weight_decay": decay}
        if self.ema:
            self.ema.to(self.accelerator.device)
        _log.info("going on from step %d", self.progress.step)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """The batches that are left, with their numbers in the whole run; the bar shows the steps."""
        options, pictures, step, accelerator = self.options, self.pictures, self.progress.step, self.accelerator
        samples = options.batch * accelerator.num_processes * options.accumulate
        pictures.length = options.steps * samples
        self.bar = tqdm(total=options.steps, initial=step, disable=not accelerator.is_main_process, desc=options.output.name)
        self.saved = step
        if step >= options.steps:
            return iter(())  # accelerate 1.0 gives a None where there is no batch
        loader = accelerator.prepare(load_batches(pictures, options.batch, step * samples, options.workers))
        return enumerate(loader, step * options.accumulate)

    def learn(self, number: int, batch: Batch) -> None:
        """One batch through all phases; where it is the step's last, the weights are updated. Does not wait for the device."""
        task, accelerator, progress = self.task, self.accelerator, self.progress
        generator = torch.Generator().manual_seed(draw_seed(self.options.seed, number, accelerator.process_index))
        task.begin_step(progress.step)
        share = 1 / self.options.log_every
        with accelerator.accumulate(*task.phases.values()):
            for phase in task.phases:
                loss, figures = task.loss(phase, batch, generator)
                progress.watch(phase, loss.detach())
                accelerator.backward(loss)
                norm = self._update(phase)
                for name, value in {phase: loss.detach(), **{f"{phase}/{name}": value for name, value in figures.items()}}.items():
                    progress.add(name, value, share / self.options.accumulate)
                if norm is not None:
                    progress.add(f"{phase}/gradient", norm, share)

    def _update(self, phase: str) -> torch.Tensor | None:
        """Clip and step, where the gradients are whole. Returns their norm then."""
        norm, optimizer = None, self.optimizers[phase]
        if self.accelerator.sync_gradients:
            self.accelerator.unscale_gradients(optimizer)  # not the other phase's, which may not be whole yet
            self.updating = True
            norm = nn.utils.clip_grad_norm_(learning(self.task.phases[phase]), self.options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def end_step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()
        if self.ema:
            self.ema.step(learning(self.first))
        self.progress.step += 1
        self.updating = False
        self.bar.update()

    def due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def is_last(self) -> bool:
        """Whether all steps are made, or the time is up.

        Processes have to agree on the time, which waits for the device: on an accelerator they do so when figures are logged or a checkpoint is written.
        """
        late, device = time.monotonic() - self.began > 60 * self.options.max_minutes, self.accelerator.device
        if self.accelerator.num_processes > 1 and math.isfinite(self.options.max_minutes):
            waits = device.type == "cpu" or self.due(self.options.log_every) or self.due(self.options.save_every)
            late = waits and bool(broadcast(torch.tensor(int(late), device=device)))
        return late or self.progress.step == self.options.steps

    def log(self) -> None:
        self.progress.require_finite(self.accelerator)
        figures = self.progress.take()
        self.history.append({"step": self.progress.step, **figures})
        self.accelerator.log({**figures, "lr": self.schedulers[0].get_last_lr()[0]}, step=self.progress.step)
        self.bar.set_postfix({phase: f"{figures[phase]:.4f}" for phase in self.task.phases})

    def save(self) -> None:
        """A checkpoint, and the result beside it."""
        self.progress.require_finite(self.accelerator)
        save_checkpoint(self.accelerator, self.options.output, self.settings, self.progress.step)
        self.saved = self.progress.step
        self.save_result()

    def save_before_the_end(self) -> None:
        """Save the steps since the last checkpoint when an error, or Ctrl+C, ends the run: not in the middle of an update, nor where others would be waited for."""
        if self.saved is None or self.progress.step == self.saved or self.updating or self.accelerator.num_processes > 1:
            return
        try:
            self.save()
            _log.warning("the run ends after step %d, which is saved: --resume continues from it.", self.progress.step)
        except Exception as error:  # which must not hide the first one
            _log.warning("the steps after the last checkpoint, of step %d, could not be saved (%s).", self.saved, reason(error))

    def save_result(self) -> None:
        if self.accelerator.is_main_process:
            with averaged(self.ema, self.first):
                self.task.save(self.options.output)

    def sample(self, example: Batch) -> None:
        if self.accelerator.is_main_process:
            with averaged(self.ema, self.first), torch.no_grad():
                picture = self.task.sample(send_to_device(example, self.accelerator.device))
            _save_picture(picture, self.options.output / "samples" / f"{self.progress.step:07d}.png")

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def rate(step: int, options: LoopOptions) -> float:
    """The learning rate at a step, relative to ``lr``: a linear rise, then constant or half a cosine down to zero."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if not options.cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup)))


def _save_picture(picture: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()).save(path)
