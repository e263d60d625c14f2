"""What a weight file may hold: plain tensors under text keys, none larger than what is stored, and in use none that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..lazy import torch

MAX_DEPTH = 32
MAX_ENTRIES = 500_000
MAX_KEY = 512

_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


class Refused(ValueError):
    """A reason to refuse a file, as the end of a sentence that begins with the file's name."""


def require_plain(state: Mapping) -> None:
    """Refuse a dictionary that is no plain tree of tensors, numbers and text.

    Every tensor must be dense, on the CPU and no larger than its storage, and its key printable text; so must the keys at the top. The tree is
    walked without recursion, and no further than :data:`MAX_DEPTH` levels and :data:`MAX_ENTRIES` entries: dictionaries that hold themselves,
    or each other many times over, end there.

    Raises:
        Refused: with the key.
    """
    entries = 0
    stack: list[tuple[tuple, object]] = [((), state)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, torch.Tensor):
            _require_plain_tensor(_name(place), value)
            continue
        if not isinstance(value, (Mapping, list, tuple, set)):
            continue
        entries += len(value)
        if len(place) > MAX_DEPTH or entries > MAX_ENTRIES:
            raise Refused(
                f"it goes on for more than {MAX_DEPTH} levels or {MAX_ENTRIES:,} entries (a dictionary that holds itself does); "
                "expected tensors under text keys. The file is damaged."
            )
        if isinstance(value, Mapping):
            if not place or any(isinstance(member, torch.Tensor) for member in value.values()):
                _require_text_keys(place, value)
            stack += [((*place, key), member) for key, member in value.items()]
        else:
            stack += [((*place, i), member) for i, member in enumerate(value)]


def _require_text_keys(place: tuple, mapping: Mapping) -> None:
    for key in mapping:
        if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_KEY:
            where = f" under {_name(place)}" if place else ""
            found = f"the key {_shortened(key)}" if isinstance(key, (str, int, float)) else f"a {type(key).__name__} for a key"
            raise Refused(f"found {found}{where}; expected text of at most {MAX_KEY} printable characters. The file is damaged.")


def _require_plain_tensor(name: str, tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, "sparse": tensor.layout != torch.strided}
        kind = next((kind for kind, found in kinds.items() if found), type(tensor).__name__)
        raise Refused(f"{name} is a {kind} tensor; expected a dense one of floating-point numbers. Choose another file.")
    if tensor.device.type != "cpu":
        raise Refused(f"{name} is on the device {tensor.device.type!r}, without any numbers in the file. Choose another file.")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        shape = _shape(tensor)
        raise Refused(
            f"{name} claims the shape {shape}, {tensor.numel() * tensor.element_size():,} bytes, but {stored:,} are stored. Download it again."
        )


def own_copies(weights: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Copies of the tensors that a network will use: the file may be a read-only map, of which only these pages are read.

    Compare the shapes before: only the copies cost memory.

    Args:
        weights: by key.
        what: the file, or the file and its part, for messages.

    Raises:
        ValueError: a tensor is not of floating-point numbers, holds none or one that is not finite, or together they are more than is stored.
    """
    for name, tensor in weights.items():
        require_weights(tensor, f"{what}: {printable(name)}")
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if claimed > sum(stored.values()):
        raise ValueError(f"{what}: the tensors claim {claimed:,} bytes, but share {sum(stored.values()):,} stored ones. Download it again.")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}


def require_weights(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor that cannot be a network's weight: not of floating-point numbers, empty, or with values that are not finite.

    Raises:
        ValueError: with ``what`` in front, what was found and what was expected.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{what} is {_shortened(tensor)}, expected a tensor; the file is damaged.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _FLOATS:
        raise ValueError(f"{what} is of {dtype}, expected floating-point numbers. Choose another file.")
    if not tensor.numel():
        raise ValueError(f"{what} has the shape {_shape(tensor)}, which holds no numbers; the file is damaged.")
    if not all(_finite(part) for part in _parts(tensor.detach())):
        raise ValueError(f"{what} holds values that are not finite (NaN or infinity); the file is damaged. Download it again.")


def _finite(tensor: torch.Tensor) -> bool:
    """By the extremes, which unlike ``isfinite`` take no memory of the tensor's size. The 8-bit types have none and go through float32."""
    comparable = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(comparable.amin()) and torch.isfinite(comparable.amax()))


def _parts(tensor: torch.Tensor, limit: int = 1 << 24) -> Iterator[torch.Tensor]:
    """The tensor in parts along its first axis, so that the 8-bit types do not take four times their size at once."""
    return iter(tensor.chunk(min(tensor.shape[0], -(-tensor.numel() // limit)))) if tensor.ndim else iter((tensor,))


def _shape(tensor: torch.Tensor) -> str:
    return _shortened(tuple(tensor.shape))


def _name(place: tuple) -> str:
    return ".".join(_shortened(part) if not isinstance(part, str) else printable(part) for part in place)[-200:] or "the file"


def _shortened(value) -> str:
    """A value in a message: of bounded length, and without what a terminal could take for a command."""
    if isinstance(value, (str, bytes)):
        return repr(value[:60]) if len(value) <= 60 else f"{value[:60]!r}..."
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, tuple) and len(value) <= 12 and all(isinstance(n, int) for n in value):
        return str(value)
    return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Text for a message: what cannot be printed is escaped, and no more than 200 characters are left."""
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
