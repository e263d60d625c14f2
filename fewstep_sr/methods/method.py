"""What there is to say of a published method, in one record: everything that lists methods reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..lazy import torch
from ..weights.kinds import FileKind
from .schedule import Schedule


@dataclass(frozen=True)
class Paper:
    """Where a method is published."""

    authors: str
    title: str
    venue: str
    url: str
    code: str


@dataclass(frozen=True)
class Source:
    """A file or a base to load: the names that it has in ComfyUI's models folder, and where it is published under which licence.

    ``repository`` is a hub id; ``file`` a file in it (None: a whole diffusers repository); ``url`` is for what is on no hub;
    with ``by_hand`` it is a page from which a person downloads. ``size`` is in words.
    """

    what: str
    folder: str
    names: tuple[str, ...]
    licence: str
    size: str
    repository: str | None = None
    file: str | None = None
    url: str | None = None
    by_hand: bool = False

    @property
    def page(self) -> str:
        """Where a person downloads it."""
        return self.url or f"https://huggingface.co/{self.repository}"


@dataclass(frozen=True)
class Widget:
    """An option as a node shows it: a number's range, its tooltip, its step, and the range outside of which results usually have artefacts."""

    low: float
    high: float
    tooltip: str
    step: float | None = None
    usual: tuple[float, float] | None = None


@dataclass(frozen=True)
class Option:
    """A setting that a method has beside those that all have, as the command line offers it.

    ``parse`` reads one word of it and raises ValueError where it is wrong; ``many`` takes several words, each of which ``parse`` turns into a tuple.
    ``needed`` refuses the option beside another method, whose result would lack what was asked for; others are passed over with a word.
    ``widget`` is of those among ``OneStep.controls``.
    """

    name: str
    help: str
    parse: Callable[[str], Any]
    default: Any = None
    metavar: str | None = None
    many: bool = False
    needed: bool = False
    widget: Widget | None = None


def control(name: str, help: str, default: float, widget: Widget) -> Option:
    """An option for a number of the one step's, whole where ``default`` is, on the command line and on Few-Step SR One Step alike."""
    return Option(name, help, number(type(default), widget.low, widget.high), default=default, widget=widget)


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An option's ``parse`` for numbers in a range."""
    return partial(_parse_number, kind, low, high)


def _parse_number(kind: type[int] | type[float], low: float, high: float, text: str) -> float:
    try:
        value: float = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # NaN compares false
        raise ValueError(f"found {text}, expected a {'whole ' if kind is int else ''}number from {low:g} to {high:g}.")
    return value


def _one_call(**controls: Any) -> tuple[tuple[str, ...], ...]:
    return (("",),)


@dataclass(frozen=True)
class OneStep:
    """How a method restores latents in a single step, for a host that puts the adapter on and calls the network itself.

    Args:
        timestep: index of the noise schedule at which the network is called, unless the adapter was trained at another.
        equation: ``equation(z_lq, noise_preds, timestep, **controls)``: the restored latents (B, 4, h, w) from the low-quality ones, times the scaling
            factor, and from what the network predicts at them in each of ``calls``.
        calls: ``calls(**controls)``: for each call of the network the LoRA sets that act in it, by the names in ``Adapter.sets``.
        controls: the options of the method's that both take, each with a widget (:func:`control`).
        prompt: in a few words, what a user gives as the prompt.
        between: the node's display name that comes between the adapter's loader and the step, "" where none does.
    """

    timestep: int
    equation: Callable[..., torch.Tensor]
    calls: Callable[..., tuple[tuple[str, ...], ...]] = _one_call
    controls: tuple[str, ...] = ()
    prompt: str = ""
    between: str = ""


@dataclass(frozen=True)
class Companion:
    """A file that a method needs beside its weights, with a record of the same kind.

    Args:
        option: name of the method's option that gives its path.
        weights, kind, contents, source, parse, save, summary: as in :class:`Method`.
        replaced_by: options that, all given, make the file unnecessary.
    """

    option: str
    weights: Source
    kind: FileKind
    contents: str
    source: str
    parse: Callable[[Mapping[str, Any], Mapping[str, str], str], Any]
    save: Callable[[Any, str | Path], None]
    summary: Callable[[Any], list[str]]
    replaced_by: tuple[str, ...] = ()

    def is_needed(self, options: Mapping[str, Any]) -> bool:
        """Whether options leave something for the file to say."""
        return not self.replaced_by or any(options.get(name) is None for name in self.replaced_by)


@dataclass(frozen=True)
class Published:
    """A method's means over a benchmark (a key of ``pipelines.evaluation.published.BENCHMARKS``), as published."""

    benchmark: str
    figures: Mapping[str, float]
    source: str
    note: str = ""


CODSR = "the comparison of CODSR's paper (CVPR 2026), read in a summary of it"
"""Source of the figures of several methods."""


@dataclass(frozen=True)
class Demo:
    """How a method runs on the miniature: its file there, and what differs from the published settings."""

    file: str
    note: str
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A published method.

    Args:
        key: its name on the command line, of its module here, in ``nodes`` and in ``pipelines``, and of its folder below ComfyUI's models.
        title: its name as published.
        base, weights: the diffusion model, and what the method brings for it.
        kind: of the weights' file; ``contents`` says what such a file holds, and ``source`` where it is.
        parse: ``parse(state, metadata, name)`` turns a file's dictionary, which is of ``kind``, into typed weights; raises ValueError where it is damaged.
        save: ``save(weights, path)`` writes them as safetensors.
        summary: a few lines on them for ``info``.
        pipeline: name of the class in ``pipelines/<key>.py``.
        color_fix, prompt, negative_prompt, cfg: as published, where nothing else is said; a colour fix of None and a cfg of 1 where the method has none.
        guided: whether its pipeline takes a cfg of other than 1.
        schedule: for samplers; None for methods whose step no sampler takes.
        one_step: None for methods that are no adapter with a single step.
        options: of its own, beside those that all methods have.
        companions: files beside the weights.
        demo: None where the miniature has no weights for it.
        published: its figures on benchmarks.
    """

    key: str
    title: str
    paper: Paper
    base: Source
    weights: Source
    kind: FileKind
    contents: str
    source: str
    parse: Callable[[Mapping[str, Any], Mapping[str, str], str], Any]
    save: Callable[[Any, str | Path], None]
    summary: Callable[[Any], list[str]]
    pipeline: str
    color_fix: str | None
    prompt: str = ""
    negative_prompt: str = ""
    cfg: float = 1.0
    guided: bool = True
    schedule: Schedule | None = None
    one_step: OneStep | None = None
    options: tuple[Option, ...] = ()
    companions: tuple[Companion, ...] = ()
    demo: Demo | None = None
    published: tuple[Published, ...] = ()

    @property
    def published_name(self) -> str:
        """The weights' file as the authors name it."""
        return self.weights.names[-1]
