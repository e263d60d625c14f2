"""The published methods: their equations, schedules and files, a module each. :data:`METHODS` is the only list of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..weights.forked import safe_after_fork
from ..weights.kinds import LOOKALIKES, OTHERS, FileKind, unknown, unwrap, with_base, without_wrappers
from ..weights.known import NOT_RUN
from ..weights.lora import Adapter
from ..weights.read import read_weights
from ..weights.strict import printable
from .hypir import HYPIR
from .invsr import INVSR
from .method import Companion, Method
from .osediff import OSEDIFF
from .pisasr import PISASR
from .s3diff import S3DIFF

METHODS: dict[str, Method] = {method.key: method for method in (OSEDIFF, INVSR, PISASR, HYPIR, S3DIFF)}
"""Every method by its key, the default first."""


def records() -> tuple[Method | Companion, ...]:
    """Of every kind of file that a method brings: the weights of each, and what they need beside them."""
    companions = tuple(companion for method in METHODS.values() for companion in method.companions)
    return (*METHODS.values(), *companions)


def identify(state: Mapping) -> FileKind:
    """What a weight file's dictionary is: a file of a method, or one of the kinds that people take for them."""
    for kind in (*LOOKALIKES, *NOT_RUN, *(record.kind for record in records())):
        if kind.matches(state):
            return kind
    if (inner := unwrap(state)) is not None:
        return identify(inner)
    return next((with_base(kind, state) for kind in OTHERS if kind.matches(state)), None) or unknown(state)


def method_of(kind: FileKind) -> Method | None:
    """The method whose weights a file of this kind holds."""
    return next((method for method in METHODS.values() if method.kind.id == kind.id), None)


def record_of(kind: FileKind) -> Method | Companion | None:
    """The record that a file of this kind belongs to."""
    return next((record for record in records() if record.kind.id == kind.id), None)


@safe_after_fork()
def load_adapter(path: str | Path) -> tuple[Method, Adapter]:
    """Read the adapter of a method with a single step, whichever it is: the file's contents tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused or something else; the message says what it is.
    """
    state, metadata = read_weights(path)
    kind, name = identify(state), printable(Path(path).name)
    method = method_of(kind)
    if method is None or method.one_step is None:
        families = ", ".join(method.title for method in METHODS.values() if method.one_step)
        raise ValueError(f"{name}: found {kind.found}; expected an adapter of one of these methods: {families}. Choose another file.")
    return method, method.parse(without_wrappers(state, name), metadata, name)


@safe_after_fork()
def load_weights(record: Method | Companion, path: str | Path) -> Any:
    """Read a method's weights, or a file beside them: ``OSEDiffAdapter``, ``NoisePredictorWeights`` and so on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused or something else; the message says what it is.
    """
    state, metadata = read_weights(path)
    kind, name = identify(state), printable(Path(path).name)
    if kind.id != record.kind.id:
        contents = f" ({record.contents})" if record.contents else ""
        raise ValueError(f"{name}: found {kind.found}; expected {record.kind.phrase}{contents}. Choose another file: {record.source}")
    return record.parse(without_wrappers(state, name), metadata, name)
