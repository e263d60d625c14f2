"""What a training run keeps to go on from: learned weights, optimizers, averages, random states, progress."""

import random
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .records import Settings, write_record
from .states import ADVICE, read_state, reason

CHECKPOINT = "checkpoint"
"""Folder below the output in which a run keeps what it needs to go on."""


def find_checkpoints(output: Path) -> list[Path]:
    """A run's checkpoints, the last one first. The one before is kept, for the case that the last is damaged."""
    return [path for path in (output / CHECKPOINT, output / f"{CHECKPOINT}.old") if path.exists()]


def save_checkpoint(accelerator: Accelerator, output: Path, settings: Mapping[str, Settings], step: int) -> None:
    """Write beside the last checkpoint, then take its place, and let it take the one's before: a run that is killed meanwhile has one that is whole."""
    current, part, old = (output / name for name in (CHECKPOINT, f"{CHECKPOINT}.part", f"{CHECKPOINT}.old"))
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed, perhaps with more processes
    accelerator.wait_for_everyone()
    accelerator.save_state(part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_record(part, settings, step)
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        part.rename(current)
    accelerator.wait_for_everyone()


def keep_what_learns(accelerator: Accelerator) -> None:
    """From now on the accelerator's checkpoints hold what learns, and not once more the frozen base around it."""
    accelerator.register_save_state_pre_hook(_keep)


def load_checkpoint(accelerator: Accelerator, modules: list[nn.Module], optimizers: list, others: list, folder: Path) -> None:
    """Go on from what :func:`save_checkpoint` wrote. No file in it can run code, whoever wrote it, which accelerate's own reader does not promise.

    Args:
        modules, optimizers: of the phases, in order, as accelerate prepared them.
        others: what is registered for checkpointing, in order.

    Raises:
        ValueError: a file is missing, damaged, refused, or of a run with other networks, options or processes; the message names it.
    """
    for i, module in enumerate(modules):
        _load(module, folder / _numbered("model", i, "safetensors"))
    for i, optimizer in enumerate(optimizers):
        _restore(optimizer, folder / _numbered("optimizer", i, "bin"))
    if accelerator.scaler is not None:
        _restore(accelerator.scaler, folder / "scaler.pt")
    for i, other in enumerate(others):
        _restore(other, folder / f"custom_checkpoint_{i}.pkl")
    _restore_random_states(accelerator, folder)


def _numbered(name: str, i: int, suffix: str) -> str:
    return f"{name}_{i}.{suffix}" if i else f"{name}.{suffix}"


def _restore(part, path: Path) -> None:
    state, expected = read_state(path), part.state_dict()
    if expected and state.keys().isdisjoint(expected):  # the average's and the schedules' would be passed over without a word
        found, wanted = (", ".join(map(str, list(names)[:5])) for names in (state, expected))
        raise ValueError(f"checkpoint: found {found or 'nothing'} in {path}, expected {wanted}; it is of a run with other options.")
    try:
        part.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} does not fit ({reason(error)}); it is of a run with other networks or options.") from error


def _restore_random_states(accelerator: Accelerator, folder: Path) -> None:
    found, expected = len(list(folder.glob("random_states_*.pkl"))), accelerator.num_processes
    if found != expected:
        raise ValueError(f"checkpoint: found random states of {found} processes in {folder}, expected {expected}. Start as many as the run had.")
    path = folder / f"random_states_{accelerator.process_index}.pkl"
    states = read_state(path)
    try:
        accelerator.step = states["step"]
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])
        for i, state in enumerate(states.get("torch_cuda_manual_seed", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} holds no random states ({reason(error)}). {ADVICE}") from error


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _learning_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _keep(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    for i, model in enumerate(models):
        network = extract_model_from_parallel(model)
        names = _learning_names(network)
        weights[i] = {name: tensor for name, tensor in network.state_dict().items() if name in names}


def _load(module: nn.Module, path: Path) -> None:
    network = extract_model_from_parallel(module)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint: {path} can't be read ({reason(error)}). {ADVICE}") from error
    if missing := sorted(_learning_names(network) - tensors.keys()):
        raise ValueError(f"checkpoint: {missing[0]} is missing ({len(missing)} such tensors); it is of a run with other networks or options.")
    try:
        network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit ({reason(error)}); it is of a run with other networks or options.") from error


@contextmanager
def averaged(ema: EMAModel | None, module: nn.Module):
    """Inside, the module has the averaged weights."""
    if ema:
        ema.store(learning(module))
        ema.copy_to(learning(module))
    try:
        yield
    finally:
        if ema:
            ema.restore(learning(module))
