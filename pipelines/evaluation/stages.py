"""A picture's way through a pipeline, stage by stage, under a stopwatch; and how stages of several ways are compared."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..base import FewStepSRPipeline
from .machine import forget_peak, peak_memory

SAMPLES = 32
"""Values of a stage that its fingerprint keeps."""


@dataclass
class Stages:
    """What each stage gave, float32 on the CPU, with its seconds and the peak memory of the device. Latents are multiplied by the VAE's scaling factor."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def recorded(pipeline: FewStepSRPipeline, device: torch.device) -> Iterator[Stages]:
    """Inside the block the pipeline's stages are kept: its own, latent, noise prediction of each call, restored latent, decoded."""
    found = Stages()
    calls = {"predict_noise": 0}

    def watch(name: str, keep: Callable[[tuple, Any], Mapping[str, torch.Tensor]]) -> None:
        method = getattr(pipeline, name)

        def stage(*args, **kwargs):
            forget_peak(device)
            began = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize(device)
            seconds = time.perf_counter() - began
            for label, tensor in keep(args, result).items():
                found.tensors[label] = tensor.detach().float().cpu().clone()  # the colour fix writes into what the decoder gave
                if label != "restored latent":  # which the stage was given
                    found.seconds[label], found.memory[label] = seconds, peak_memory(device)
            return result

        setattr(pipeline, name, stage)
        watched.append(name)

    def of_prediction(args: tuple, result: torch.Tensor) -> dict[str, torch.Tensor]:
        calls["predict_noise"] += 1
        return {f"noise prediction {calls['predict_noise']}": result}

    def of_own(labels: tuple[str, ...], args: tuple, result: Any) -> dict[str, torch.Tensor]:
        return dict(zip(labels, result if isinstance(result, tuple) else (result,), strict=True))

    watched: list[str] = []
    for name, labels in pipeline.own_stages.items():
        watch(name, partial(of_own, labels))
    watch("encode", lambda args, result: {"latent": result})
    watch("predict_noise", of_prediction)
    watch("decode", lambda args, result: {"restored latent": args[0], "decoded": result})
    try:
        yield found
    finally:
        for name in watched:
            delattr(pipeline, name)


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """||found - expected|| / ||expected||; None where the shapes differ or a value is not finite."""
    if found.shape != expected.shape or not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return None
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def relative_errors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
    """Of each stage that both have."""
    return {name: relative_error(found[name], expected[name]) for name in expected if name in found}


def fingerprint(tensor: torch.Tensor) -> dict[str, Any]:
    """A stage in a few numbers: shape, norm, and values at evenly spaced places."""
    flat = tensor.flatten()
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel())).round().long()
    return {
        "shape": list(tensor.shape),
        "norm": _digits(tensor.double().norm().item()),
        "values": [_digits(value) for value in flat[places].tolist()],
    }


def _digits(value: float) -> float | None:
    return float(f"{value:.7g}") if abs(value) < float("inf") else None  # NaN compares false


def error_of_fingerprint(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float | None:
    """:func:`relative_error` over the values that two fingerprints keep."""
    if found["shape"] != expected["shape"] or None in found["values"] or None in expected["values"]:
        return None
    values = [torch.tensor(each["values"], dtype=torch.float64) for each in (found, expected)]
    norms = abs(found["norm"] - expected["norm"]) / max(abs(expected["norm"]), 1e-12)
    return max(relative_error(*values) or 0.0, norms)
