"""The published methods: their equations, schedules and files, a module each. :data:`METHODS` is the only list of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..weights.kinds import LOOKALIKES, OTHERS, FileKind, unknown, unwrap, with_base, without_wrappers
from ..weights.lora import Adapter
from ..weights.read import read_weights
from ..weights.strict import printable
from .hypir import HYPIR
from .invsr import INVSR
from .method import Method
from .osediff import OSEDIFF
from .pisasr import PISASR

METHODS: dict[str, Method] = {method.key: method for method in (OSEDIFF, INVSR, PISASR, HYPIR)}
"""Every method by its key, the default first."""


def identify(state: Mapping) -> FileKind:
    """What a weight file's dictionary is: a method's weights, or one of the kinds that people take for them."""
    for kind in (*LOOKALIKES, *(method.kind for method in METHODS.values())):
        if kind.matches(state):
            return kind
    if (inner := unwrap(state)) is not None:
        return identify(inner)
    return next((with_base(kind, state) for kind in OTHERS if kind.matches(state)), None) or unknown(state)


def method_of(kind: FileKind) -> Method | None:
    """The method whose weights a file of this kind holds."""
    return next((method for method in METHODS.values() if method.kind.id == kind.id), None)


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
        raise ValueError(f"{name}: found {kind.phrase}; expected an adapter of one of these methods: {families}. Choose another file.")
    return method, method.parse(without_wrappers(state, name), metadata, name)


def load_weights(method: Method, path: str | Path) -> Any:
    """Read a method's weights: ``OSEDiffAdapter``, ``NoisePredictorWeights`` and so on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused or something else; the message says what it is.
    """
    state, metadata = read_weights(path)
    kind, name = identify(state), printable(Path(path).name)
    if kind.id != method.kind.id:
        contents = f" ({method.contents})" if method.contents else ""
        raise ValueError(f"{name}: found {kind.phrase}; expected {method.kind.phrase}{contents}. Choose another file: {method.source}")
    return method.parse(without_wrappers(state, name), metadata, name)
