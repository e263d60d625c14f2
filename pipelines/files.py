"""Weight files on the command line: what they are, and their conversion to safetensors."""

from pathlib import Path

import torch

from fewstep_sr.methods import identify, load_weights, record_of, records
from fewstep_sr.weights.kinds import TAGGER
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.tagger import convert_tagger, load_tagger_weights


def convert(path: Path, output: Path | None, overwrite: bool = False, dape: Path | None = None) -> str:
    """Write ``path`` as safetensors and say what was done.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is not set.
        FileNotFoundError, ValueError: there is nothing to convert.
    """
    output = output or path.with_suffix(".safetensors")
    if output.suffix != ".safetensors":
        raise ValueError(f"-o: found {output.name}, expected a name that ends in .safetensors.")
    if output.resolve() == path.resolve():
        raise ValueError(f"{path}: it is a safetensors file already.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Give another name with -o, or --overwrite.")
    kind = identify(read_weights(path)[0])
    record = record_of(kind)
    if dape is not None and kind.id != TAGGER.id:
        raise ValueError(f"--dape: found {kind.phrase} in {path.name}, expected RAM's tagger, which DAPE is for.")
    if record is not None:
        record.save(load_weights(record, path), output)
    elif kind.id == TAGGER.id:
        convert_tagger(path, output, dape, overwrite=overwrite)
    else:
        known = ", ".join(other.kind.phrase for other in records())
        raise ValueError(f"{path.name}: found {kind.phrase}; expected {known} or {TAGGER.phrase}.")
    return f"{path} ({kind.phrase}, {_size(path)}) -> {output} ({_size(output)})"


def describe_file(path: Path) -> str:
    """A few lines on a weight file: kind, rank, size, and what it fits."""
    state, metadata = read_weights(path)
    kind = identify(state)
    lines = [f"{path}: {kind.phrase}", f"  size: {_size(path)}, {_tensors(state)}"]
    if record := record_of(kind):
        lines += [*record.summary(load_weights(record, path)), f"  licence as published: {record.weights.licence}"]
    elif kind.id == TAGGER.id:
        lines += _tagger(path)
    lines += [f"  {key}: {value}" for key, value in sorted(metadata.items()) if key != "format" and len(value) <= 200]
    return "\n".join(lines)


def _tagger(path: Path) -> list[str]:
    try:
        tagger = load_tagger_weights(path)
    except (ValueError, FileNotFoundError) as error:
        return [f"  note: {error}"]
    return [f"  tags: {len(tagger.vocabulary.names)}; DAPE: {tagger.dape or 'not merged'}", "  fits: OSEDiff's prompts (--tagger)"]


def _size(path: Path) -> str:
    return size_in_words(path.stat().st_size)


def size_in_words(size: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _tensors(state: dict) -> str:
    found, stack = [], [state]
    while stack:
        for value in stack.pop().values():
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, dict):
                stack.append(value)
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in found}))
    return f"{len(found)} tensors, {sum(t.numel() for t in found):,} numbers ({dtypes})"
