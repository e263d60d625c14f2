"""What a checkpoint remembers of its run besides weights and states: settings, the number of steps, and its files' checksums. JSON."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .states import ADVICE, reason

if TYPE_CHECKING:
    from .data import TrainingPictures
    from .options import LoopOptions
    from .task import Task

_log = logging.getLogger(__name__)

RECORD = "run.json"

Settings = dict[str, Any]


def settings_of(task: "Task", pictures: "TrainingPictures", options: "LoopOptions", processes: int) -> dict[str, Settings]:
    """Settings that a run keeps to its end, ``fixed``, and those that may change when it goes on, which is said then, ``free``."""
    fixed = {name: getattr(options, name) for name in ("batch", "accumulate", "seed", "ema", "optimizer")}
    fixed |= {"processes": processes, "patch": pictures.patch, "crops": pictures.crops}
    if pictures.degradation and pictures.degradation.mild_chance:
        fixed["mild_degradation"] = pictures.degradation.mild_chance
    names = ["lr", "matrix_lr", "warmup", "cosine", "weight_decay", "max_grad_norm", "mixed_precision", *(["steps"] if options.cosine else [])]
    free = {name: getattr(options, name) for name in names}
    shares = None if pictures.chances is None else [float(chance) for chance in pictures.chances]
    free["data"] = _digest(json.dumps([[path.name for path in pictures.paths], shares]).encode())
    return json.loads(json.dumps({"fixed": {**task.settings(), **fixed}, "free": free}))


def fingerprint(*networks: nn.Module) -> str:
    """Of networks whose weights do not change: names, shapes and the first numbers of each tensor. Another base of the same shape has another."""
    found = hashlib.sha256()
    for network in networks:
        for name, parameter in network.named_parameters():
            found.update(f"{name} {tuple(parameter.shape)} ".encode())
            found.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def write_record(folder: Path, settings: Mapping[str, Settings], step: int) -> None:
    """Describe a checkpoint whose other files are written."""
    files = {path.name: _file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    record = {"step": step, "settings": settings, "files": files}
    (folder / RECORD).write_text(json.dumps({**record, "checksum": _checksum(record)}, indent=1), encoding="utf-8")


def _checksum(record: Mapping[str, Any]) -> str:
    return _digest(json.dumps(record, sort_keys=True).encode())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_record` wrote; None in a checkpoint of an earlier version, which has none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        shapes = ((record["settings"]["fixed"], dict), (record["settings"]["free"], dict), (record["files"], dict), (record["step"], int))
        if record.pop("checksum") != _checksum(record) or not all(isinstance(value, kind) for value, kind in shapes):
            raise TypeError("its checksum differs")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} can't be read ({reason(error)}). {ADVICE}") from error
    return record


def require_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError where a file of the checkpoint has changed since it was written; names it."""
    for name, digest in record["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or _file_digest(path) != digest:
            raise ValueError(f"checkpoint: {path} is not as the run wrote it: its checksum differs. {ADVICE}")


def differences(recorded: Settings, found: Settings) -> str:
    """Settings that differ, in words; empty where none does."""
    names = [name for name in {**recorded, **found} if recorded.get(name) != found.get(name)]
    return ", ".join(f"{name.replace('_', '-')} {_short(recorded.get(name))} (now {_short(found.get(name))})" for name in names)


def _short(value: Any) -> str:
    text = "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class OtherSettingsError(ValueError):
    """A run's checkpoint and the present command do not belong together."""


def go_on(checkpoints: Sequence[Path], settings: Mapping[str, Settings], load: Callable[[Path], None]) -> None:
    """Load the last checkpoint that is whole, and say what is not, and which settings have changed.

    Args:
        checkpoints: the last one first.
        settings: the present ones, of :func:`settings_of`.
        load: reads a checkpoint's other files; raises ValueError where one is damaged.

    Raises:
        OtherSettingsError: a setting differs that a run has to keep.
        ValueError: no checkpoint is whole; says what is wrong with the last.
    """
    problems: list[ValueError] = []
    for checkpoint in checkpoints:
        try:
            record = read_record(checkpoint)
            if record:
                _compare(record, settings, checkpoint)
            load(checkpoint)
            if record:
                require_files(checkpoint, record)
            else:
                _log.warning(
                    "%s is of an earlier version, without a record of the run's settings: whether they are the same was not checked.", checkpoint
                )
        except OtherSettingsError:
            raise
        except ValueError as error:
            problems.append(error)
            continue
        if problems:
            _log.warning("%s The run continues from the previous checkpoint, %s.", problems[0], checkpoint)
        return
    raise problems[0]


def _compare(record: Mapping[str, Any], settings: Mapping[str, Settings], checkpoint: Path) -> None:
    recorded = record["settings"]
    if other := differences(recorded["fixed"], settings["fixed"]):
        raise OtherSettingsError(
            f"--resume: the run in {checkpoint.parent} was begun with {other}. Give the settings that it was begun with, or another --output for another run."
        )
    if other := differences(recorded["free"], settings["free"]):
        _log.warning("the run continues with other settings than before: %s.", other)
