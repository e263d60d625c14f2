"""The table of a run: on the terminal, as CSV, Markdown and JSON."""

import csv
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fewstep_sr.files import written_whole
from fewstep_sr.methods.method import Published
from fewstep_sr.weights.strict import printable

from .journal import NAME
from .metrics import METRICS

_WIDEST = 60
"""Characters of a name in a terminal's table."""


@dataclass(frozen=True)
class Row:
    """An image: the SHA-256 of its files by their part in it, its figures, and the seconds that its restoration took, where they are known."""

    name: str
    files: Mapping[str, str]
    figures: Mapping[str, float]
    seconds: float | None = None


@dataclass
class Report:
    """A run's result.

    Args:
        title: what was measured, in words.
        of_folder: figures of all images together.
        metrics: what each metric was computed by.
        context: settings, versions, machine, hashes of weights and the like, for the JSON.
        problems: left_out, failed and unpaired, by name with the reason.
        published, published_of: what is published of the method of this key.
    """

    title: str
    rows: Sequence[Row]
    metrics: Mapping[str, str]
    of_folder: Mapping[str, float] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    problems: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None
    published_of: str | None = None

    @property
    def mean(self) -> dict[str, float]:
        """Of each metric over all images, in the table's order."""
        of_images = {name: fmean(row.figures[name] for row in self.rows) for name in self.metrics if self.rows and name in self.rows[0].figures}
        return {name: value for name in METRICS if (value := {**of_images, **self.of_folder}.get(name)) is not None}

    @property
    def seconds(self) -> list[float]:
        return [row.seconds for row in self.rows if row.seconds is not None]

    def to_json(self) -> dict[str, Any]:
        """``mean`` and ``pictures`` first: what is looked for."""
        found: dict[str, Any] = {"report": NAME, "title": self.title, "mean": self.mean, "pictures": [_picture(row) for row in self.rows]}
        if self.seconds:
            found["seconds"] = {"mean": fmean(self.seconds), "median": median(self.seconds), "images": len(self.seconds)}
        if self.published:
            found["expected"] = {
                "method": self.published_of,
                "benchmark": self.published.benchmark,
                "source": self.published.source,
                "figures": self.published.figures,
                "difference": {name: value - self.published.figures[name] for name, value in self.mean.items() if name in self.published.figures},
            }
        return found | {"metrics": dict(self.metrics), **self.problems, **self.context}

    def table(self) -> list[list[str]]:
        """Head, a line for each image, and the mean."""
        names = [name for name in self.mean if name not in self.of_folder]
        timed = bool(self.seconds)
        head = ["picture", *names, *(["seconds"] if timed else [])]
        lines = [[row.name, *(_number(name, row.figures[name]) for name in names), *([_seconds(row.seconds)] if timed else [])] for row in self.rows]
        last = ["mean", *(_number(name, self.mean[name]) for name in names), *([_seconds(fmean(self.seconds))] if timed else [])]
        return [head, *lines, last]

    def comparison(self) -> list[list[str]]:
        """The means beside the published ones; without those the means alone."""
        if self.published is None:
            return [["metric", "mean"], *([name, _number(name, value)] for name, value in self.mean.items())]
        lines = [["metric", "here", "published", "difference"]]
        for name in METRICS:
            here, there = self.mean.get(name), self.published.figures.get(name)
            if here is not None or there is not None:
                difference = f"{round(here - there, 4) + 0.0:+.4f}" if here is not None and there is not None else "-"
                lines.append([name, _number(name, here), f"{there:g}" if there is not None else "-", difference])
        return lines

    def to_csv(self) -> str:
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.table())
        return text.getvalue()

    def to_markdown(self) -> str:
        return f"# {self.title}\n\n{_markdown(self.comparison())}\n{_markdown(self.table())}"


def _picture(row: Row) -> dict[str, Any]:
    return {"name": row.name, **row.figures, **({"seconds": row.seconds} if row.seconds is not None else {}), "files": dict(row.files)}


def _number(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.{METRICS[name].digits}f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(html.escape(printable(cell), quote=False).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def aligned(lines: list[list[str]]) -> str:
    """A table for the terminal: names to the left, numbers to the right. A name's line breaks and other controls are escaped, and a long one is cut."""
    lines = [[_narrow(printable(cell)) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _narrow(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, with its folder. Names that are no text (bytes of another encoding) are escaped, as JSON reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n")
