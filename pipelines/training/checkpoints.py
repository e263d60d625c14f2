"""What a training run keeps to go on from: learned weights, optimizers, averages, random states, progress."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

CHECKPOINT = "checkpoint"
"""Folder below the output in which a run keeps what it needs to go on."""


class Progress:
    """The number of steps that were made, and the figures since the last that was logged."""

    def __init__(self):
        self.step, self.sums = 0, {}

    def state_dict(self) -> dict:
        return {"step": self.step, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.sums.update(state.get("sums", {}))


def find_checkpoint(output: Path) -> Path | None:
    """The last checkpoint that is whole. There is only the one before for a moment in which a run may have been killed."""
    return next((path for path in (output / CHECKPOINT, output / f"{CHECKPOINT}.old") if path.exists()), None)


def save_checkpoint(accelerator: Accelerator, output: Path) -> None:
    """Write beside the last checkpoint, then take its place: a run that is killed meanwhile has one that is whole."""
    current, part, old = (output / name for name in (CHECKPOINT, f"{CHECKPOINT}.part", f"{CHECKPOINT}.old"))
    accelerator.save_state(part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        part.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def keep_what_learns(accelerator: Accelerator) -> None:
    """From now on the accelerator's checkpoints hold what learns, and not once more the frozen base around it."""
    accelerator.register_save_state_pre_hook(_keep)
    accelerator.register_load_state_pre_hook(_load)


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _learning_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _keep(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    for i, model in enumerate(models):
        network = extract_model_from_parallel(model)
        names = _learning_names(network)
        weights[i] = {name: tensor for name, tensor in network.state_dict().items() if name in names}


def _load(models: list[nn.Module], folder: str) -> None:
    for i, model in enumerate(models):
        network = extract_model_from_parallel(model)
        tensors = load_file(Path(folder) / (f"model_{i}.safetensors" if i else "model.safetensors"))
        if missing := sorted(_learning_names(network) - tensors.keys()):
            raise ValueError(f"checkpoint: {missing[0]} is missing ({len(missing)} such tensors); it is of a run with other networks or options.")
        network.load_state_dict(tensors, strict=False)
    models.clear()  # accelerate shall not load them again, whole


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
