"""What a fuzzed weight file is given to: every loader, and ``info``."""

import re
from functools import cache
from pathlib import Path

import fuzz_content
import tagger_toys
import torch

from fewstep_sr.methods import METHODS, load_weights
from fewstep_sr.weights.tagger import TaggerWeights, add_dape, load_tagger_weights
from pipelines.files import describe_file


def load(kind: str, path: Path):
    """What the kind's loader gives: dataclasses that hold tensors."""
    if kind == "adapter":
        return load_weights(METHODS["osediff"], path)
    if kind == "predictor":
        return load_weights(METHODS["invsr"], path)
    return add_dape(_tagger(path.parent), path) if kind == "dape" else load_tagger_weights(path)


@cache
def _tagger(folder: Path) -> TaggerWeights:
    path = folder / "a valid tagger.pth"
    torch.save(fuzz_content.valid("tagger"), path)
    return load_tagger_weights(path)


def prepare(folder: Path) -> None:
    """Everything that is loaded once, so that no file's time and memory counts it."""
    tagger_toys.write_vocabulary(folder, fuzz_content.TAGS, fuzz_content.THRESHOLDS)
    for kind in fuzz_content.KINDS:
        path = folder / f"valid-{kind}.pth"
        torch.save(fuzz_content.valid(kind), path)
        assert outcome(kind, path) == "loaded", kind
        path.unlink()


def outcome(kind: str, path: Path) -> str:
    """ "loaded" and "refused" are right; anything else says what is wrong."""
    loaded = _try(path, lambda: load(kind, path))
    described = _try(path, lambda: describe_file(path))
    for result in (loaded, described):
        if isinstance(result, str) and result.startswith("wrong"):
            return result
    if loaded == "refused":
        return loaded
    for name, tensor in _tensors(loaded):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not (tensor.is_quantized or tensor.is_nested)
        if not plain or not tensor.is_floating_point():
            return f"wrong: loads {name} as {tensor.dtype}, {tensor.layout}, {tensor.device}"
        if not torch.isfinite(tensor.float()).all():
            return f"wrong: loads {name} with values that are not finite"
    return "loaded"


def _try(path: Path, read):
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        named = path.name in message or "ram_tag_list" in message
        sentence = len(message) <= 1500 and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", message)
        return (
            "refused"
            if named and sentence and type(error) in (ValueError, FileNotFoundError)
            else f"wrong: {type(error).__name__}: {message[:200]!r}"
        )
    except Exception as error:
        return f"wrong: {type(error).__name__}: {str(error)[:200]!r}"


def _tensors(value, name: str = ""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _tensors(member, f"{name}.{key}")
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from _tensors(getattr(value, key), f"{name}.{key}")
