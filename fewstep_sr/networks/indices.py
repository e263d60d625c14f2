"""How many layers a network has, read off its weights' keys: numbers in a file are not to be believed before they are counted."""

import re
from collections.abc import Iterable, Mapping

import torch

MAX_LAYERS = 64
"""Far above any published network's, so that a key cannot ask for a billion layers."""


def layer_counts(keys: Iterable[str], pattern: str, what: str) -> tuple[int, ...]:
    """How many layers each block has.

    Args:
        keys: of a state dict.
        pattern: matches one key of every layer; its two groups are the block's and the layer's number.
        what: names the network in messages.

    Raises:
        ValueError: there is none, the numbers are not 0 to n - 1, or there are more than :data:`MAX_LAYERS` layers.
    """
    found: dict[str, set[str]] = {}
    for key in keys:
        if match := re.fullmatch(pattern, key):
            found.setdefault(match.group(1), set()).add(match.group(2))
    _require_counted(found, f"{what}: its blocks")
    counts = []
    for i in range(len(found)):
        _require_counted(found[str(i)], f"{what}: the layers of block {i}")
        counts.append(len(found[str(i)]))
    if sum(counts) > MAX_LAYERS:
        raise ValueError(f"{what} has {sum(counts)} layers, expected at most {MAX_LAYERS}.")
    return tuple(counts)


def layer_count(keys: Iterable[str], pattern: str, what: str) -> int:
    """As :func:`layer_counts`, of a network with one block: ``pattern`` has one group."""
    numbers = {match.group(1) for key in keys if (match := re.fullmatch(pattern, key))}
    _require_counted(numbers, f"{what}: its layers")
    return len(numbers)


def _require_counted(found: Iterable[str], what: str) -> None:
    numbers = sorted(found, key=lambda number: (len(number), number))
    if not 0 < len(numbers) <= MAX_LAYERS or numbers != [str(i) for i in range(len(numbers))]:
        shown = ", ".join(number[:20] for number in numbers[:8]) or "not at all"
        raise ValueError(f"{what} are numbered {shown}{', ...' if len(numbers) > 8 else ''}; expected 0 to n - 1, with n at most {MAX_LAYERS}.")


def dimension(state_dict: Mapping[str, torch.Tensor], key: str, axis: int, ndim: int) -> int:
    """Size of one axis of a tensor that must have ``ndim`` of them.

    Raises:
        ValueError: the tensor is missing, or of another rank, or one of its axes has no length.
    """
    tensor = state_dict.get(key)
    if tensor is None:
        raise ValueError(f"the tensor {key!r} is missing; the file is incomplete or of another network.")
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise ValueError(f"{key} has shape {tuple(tensor.shape[:8])}, expected {ndim} axes without an empty one; the file is of another network.")
    return tensor.shape[axis]
