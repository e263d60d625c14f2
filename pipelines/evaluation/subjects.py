"""What ``verify`` looks at: a method on the miniature, or on the weights that were found, and one run of it."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from fewstep_sr.image.sizes import VAE_MULTIPLE, padded_side

from .. import pipeline_class
from ..done import settings_to_record
from ..settings import Settings
from ..upscale import Upscaler
from .machine import hash_weights
from .stages import Stages, recorded, synchronize


@dataclass(frozen=True)
class Subject:
    """A method with its settings, and where its files are; empty for the miniature."""

    settings: Settings
    device: torch.device
    base: str = ""
    weights: str = ""
    companions: Mapping[str, Path | None] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.settings.method.title} on {'the miniature' if self.settings.demo else Path(self.base).name}"

    @cached_property
    def hashes(self) -> dict[str, str]:
        return hash_weights(self.base, self.weights, *map(str, filter(None, self.companions.values())), demo=self.settings.demo)

    @cached_property
    def recorded(self) -> dict[str, Any]:
        return settings_to_record(self.settings, Path("x.png"))

    def key(self, picture: torch.Tensor) -> str:
        """What two runs must have in common for their stages to be comparable: method, weights and picture by content, and settings."""
        files = "".join(sorted(self.hashes.values()))
        kept = {name: value for name, value in self.recorded.items() if name not in ("base", "weights", "dtype")}
        digest = hashlib.sha256(f"{files}{sorted(kept.items())}".encode() + picture.contiguous().numpy().tobytes())
        return f"{self.settings.method.key} {digest.hexdigest()[:32]}"

    def request(self, run: "Run", checkpoint: Path | None) -> dict[str, Any] | str:
        """What the nodes need to do the same; in words why they cannot."""
        settings = self.settings
        base = "" if settings.demo else str(checkpoint or self.base)
        method, options = settings.method, settings.options
        if base and not Path(base).is_file():
            return "the base is no single file. Give the same base as one with --checkpoint"
        if options.get("tagger") or settings.decoder or settings.cfg != method.cfg:
            return "they are compared without --tagger, --decoder and --cfg. Leave these out"
        kind, (height, width) = pipeline_class(method), run.stages.tensors["latent"].shape[-2:]
        canvas = [height * VAE_MULTIPLE, width * VAE_MULTIPLE]
        padded = [padded_side(side) for side in run.stages.tensors["image"].shape[-2:]]
        prompt, negative = settings.prompt, settings.negative_prompt
        request = {
            "demo": settings.demo,
            "title": method.title,
            "base": str(Path(base).resolve()) if base else "",
            "prompt": method.prompt if prompt is None else prompt,
            "negative_prompt": method.negative_prompt if negative is None else negative,
            "scale": settings.scale,
            "upsampling": kind.upsampling,
            "canvas": canvas if canvas != padded else None,
            "seed": settings.seed,
            "cfg": settings.cfg,
            "steps": options.get("steps", 1),
            "timesteps": ", ".join(map(str, options.get("timesteps", ()))),
            "timestep": run.timestep,
            "controls": {name: options[name] for name in (method.one_step.controls if method.one_step else ())},
            "clamp": kind.clamps_decoded,
            "color_fix": settings.color_fix,
            "color_reference": kind.color_reference,
        }
        before = [] if settings.demo else [*kind.loader_nodes(str(Path(self.weights).resolve())), *kind.node_calls(options, self.companions)]
        return request | {"nodes_before": before, "nodes_after": kind.step_nodes(request)}


@dataclass(frozen=True)
class Run:
    """A picture's way through a pipeline: its stages, seconds of the whole and of loading, and the timestep of the one step, where there is one."""

    stages: Stages
    seconds: float
    load_seconds: float
    timestep: int | None


def half_of(device: torch.device) -> str:
    """The half precision of a device: float16, and bfloat16 on a CPU, where float16 is slow or missing."""
    return "bfloat16" if device.type == "cpu" else "float16"


def run_subject(subject: Subject, picture: torch.Tensor, dtype: str) -> Run:
    """A picture (1, 3, H, W) through every stage, whole, in a precision.

    Raises:
        RuntimeError: a network gives values that are not numbers, or the device cannot compute in that precision.
    """
    device = subject.device
    settings = replace(subject.settings, dtype=None if subject.settings.demo else dtype, tile=0, device=str(device))
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32 here
    try:
        began = time.perf_counter()
        state = PartialState(cpu=device.type == "cpu")
        upscaler = Upscaler(settings, subject.base, subject.weights, dict(subject.companions), state, lambda job: "")
        pipeline = upscaler.pipeline
        if settings.demo and dtype != "float32":
            pipeline.convert(getattr(torch, dtype))
        pipeline.set_progress_bar_config(disable=True)
        load_seconds = time.perf_counter() - began
        with recorded(pipeline, device) as stages:
            began = time.perf_counter()
            stages.tensors["image"] = upscaler.restore(picture)
            synchronize(device)
            seconds = time.perf_counter() - began
        stages.seconds["image"] = seconds
        return Run(stages, seconds, load_seconds, getattr(pipeline, "_timestep", None))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
