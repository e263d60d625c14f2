"""What a run has measured already, so that one that was cut goes on: a line of JSON for each thing, beside the report that it becomes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

NAME = "ComfyUI-FewStepSR evaluation"
"""By which a report is known as one."""


class Journal:
    """Seconds and figures of images, by name and by the hashes of the files that they are of.

    They are read from an earlier report and from the journal of a run that was cut; lines that are not whole are passed over.

    Args:
        report: the JSON report that the run will write; None keeps nothing.

    Raises:
        FileExistsError: the report's name is taken by something else.
    """

    def __init__(self, report: Path | None):
        self.path = report.with_name(report.name + "l") if report else None
        self._files: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, tuple[str, float]] = {}
        self._figures: dict[tuple[str, str], tuple[dict[str, str], str, float]] = {}
        if report and report.exists():
            self._read_report(read_report(report))
        if self.path and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    self._take(**json.loads(line))

    def _read_report(self, report: Mapping[str, Any]) -> None:
        by = report.get("metrics", {})
        with suppress(KeyError, TypeError, AttributeError):  # a report that somebody has edited is measured again
            for row in report["pictures"]:
                figures = {name: row[name] for name in by if row.get(name) is not None}
                self._take(row["name"], row["files"], row.get("seconds"), figures, by)

    def _take(self, name: str, files: Mapping[str, str], seconds: float | None = None, figures: Mapping[str, float] = {}, by: Mapping[str, str] = {}):
        if seconds is not None:
            self._seconds[name] = files["image"], float(seconds)
        for metric, value in figures.items():
            self._figures[name, metric] = dict(files), by[metric], float(value)

    def seconds(self, name: str, image: str) -> float | None:
        """What it took to make an image of this hash."""
        of, seconds = self._seconds.get(name, ("", None))
        return seconds if of == image else None

    def figures(self, name: str, files: Mapping[str, str], by: Mapping[str, str]) -> dict[str, float]:
        """Known figures of these files (role to hash), out of the metrics and versions in ``by``."""
        found = {}
        for metric, source in by.items():
            of, measured_by, value = self._figures.get((name, metric), ({}, "", 0.0))
            if measured_by == source and all(of.get(role) == digest for role, digest in files.items()):
                found[metric] = value
        return found

    def measured_by(self, images: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
        """What each metric was computed by whose figures are known of all these images (name, files)."""
        found = {}
        for metric in {metric for _, metric in self._figures}:
            [source, *others] = {self._figures.get((name, metric), ({}, "", 0.0))[1] for name, _ in images} or {""}
            if source and not others and all(self.figures(name, files, {metric: source}) for name, files in images):
                found[metric] = source
        return found

    def note(self, name: str, files: Mapping[str, str], **what: Any) -> None:
        """Keep seconds, or figures and what they are measured by."""
        self._take(name, files, **what)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "files": dict(files), **what}) + "\n")

    def close(self) -> None:
        """The report holds everything now."""
        if self.path:
            self.path.unlink(missing_ok=True)


def read_report(path: Path, name: str = NAME) -> dict[str, Any]:
    """A report that ``evaluate``, or the command of another ``name``, has written.

    Raises:
        FileExistsError: the file is something else.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        report = None
    if not isinstance(report, dict) or report.get("report") != name:
        raise FileExistsError(
            f"{path}: it exists and is no report of {name.split()[-1] if name != NAME else 'evaluate'}. Give another name, or move it away."
        )
    return report


def known(names: Iterable[str], values: Mapping[str, Value]) -> dict[str, Value]:
    """Values in the order of names, of those that there are."""
    return {name: values[name] for name in names if name in values}
