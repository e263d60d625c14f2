"""What the commands of all trainings understand."""

import argparse
from typing import TYPE_CHECKING

from ..options import a_path
from .ranges import WEIGHT, real, whole

if TYPE_CHECKING:
    from .data import TrainingPictures
    from .degradation import Degradation
    from .options import LoopOptions
    from .settings import DataSettings

RAW = {"formatter_class": argparse.RawDescriptionHelpFormatter}


def add_common(command: argparse.ArgumentParser, lr: float, patch_multiple: int = 8) -> None:
    """What every training understands. ``patch_multiple`` is 1 where the training itself says which patches it takes."""
    run, data, optimization, machine = (command.add_argument_group(title) for title in ("run", "data", "optimization", "machine"))
    data.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE[=SHARE]",
        help="folder, text list or picture; SHARE is how often it is used (default: 1 for each picture)",
    )
    run.add_argument("-o", "--output", type=a_path, required=True, metavar="FOLDER", help="folder for the result, checkpoint, logs and samples")
    run.add_argument("--steps", type=whole(1), required=True)
    optimization.add_argument("--batch", type=whole(1, 65_536), default=4, help="samples per step and process (default: %(default)s)")
    data.add_argument(
        "--patch", type=whole(8, 16_384, multiple=patch_multiple), default=512, help="side length of the crops in pixels (default: %(default)s)"
    )
    data.add_argument("--crops", type=whole(1), help="reuse a fixed set of N crops and cache their latents (default: each crop is new)")
    optimization.add_argument("--lr", type=real(0, 10, above=True), default=lr, help="learning rate (default: %(default)g)")
    optimization.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for networks that start from random weights")
    optimization.add_argument(
        "--matrix-lr", type=real(0, 10, above=True), default=0.02, help="learning rate of Muon's matrices (default: %(default)g)"
    )
    optimization.add_argument("--warmup", type=whole(0), default=0, help="warm-up steps of the learning rate (default: %(default)s)")
    optimization.add_argument("--cosine", action="store_true", help="cosine decay of the learning rate to 0")
    optimization.add_argument("--weight-decay", type=WEIGHT, default=0.0, help="decoupled weight decay (default: %(default)g)")
    optimization.add_argument(
        "--max-grad-norm", type=real(0, above=True, infinite=True), default=1.0, help="clip gradients to this norm (default: %(default)g)"
    )
    optimization.add_argument(
        "--ema", type=real(0, 1, below=True), default=0.0, help="decay of the averaged weights, 0 for none (default: %(default)g)"
    )
    data.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="random seed of weights, data and noise (default: %(default)s)")
    optimization.add_argument(
        "--accumulate", type=whole(1, 65_536), default=1, help="batches whose gradients are accumulated for one step (default: %(default)s)"
    )
    machine.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="default: %(default)s")
    machine.add_argument("--workers", type=whole(0, 1024), default=0, help="processes that load and degrade pictures (default: %(default)s)")
    machine.add_argument("--threads", type=whole(1, 1024), help="CPU threads of the networks")
    run.add_argument("--save-every", type=whole(1), default=500, help="steps between checkpoints (default: %(default)s)")
    run.add_argument("--sample-every", type=whole(1), default=500, help="steps between sample grids (default: %(default)s)")
    run.add_argument(
        "--max-minutes", type=real(0, infinite=True), default=float("inf"), help="save and stop after this many minutes; --resume continues"
    )
    run.add_argument("--resume", action="store_true", help="continue from the output folder's checkpoint")
    command.set_defaults(stopped="With --resume the same command continues from the last checkpoint.")


def begin(settings: "DataSettings") -> None:
    """Seed what draws from torch's own generator, and take as many threads as asked for."""
    import torch
    from accelerate.utils import set_seed

    set_seed(settings.loop.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)


def report(loop: "LoopOptions", result: str) -> None:
    """Say what a training that has ended has written, and how far it is. One process says it for all."""
    from accelerate import PartialState

    from .checkpoints import find_checkpoints
    from .records import read_record

    record = read_record(find_checkpoints(loop.output)[0])
    if record and PartialState().is_main_process:
        step = record["step"]
        print(f"{loop.output / result}: after {step} of {loop.steps} steps" + (". --resume continues" if step < loop.steps else ""))


def training_pictures(settings: "DataSettings", degradation: "Degradation | None" = None) -> "TrainingPictures":
    """The data sets of ``--data``, as one."""
    from .data import TrainingPictures
    from .sources import find_training_set

    paths, weights = find_training_set(settings.data, settings.loop.output)
    return TrainingPictures(paths, settings.patch, 0, settings.loop.seed, degradation, weights, settings.crops)
