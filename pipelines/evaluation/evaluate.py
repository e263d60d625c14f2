"""``evaluate``: a benchmark's low-quality images by a method, or results that exist, against the originals."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fewstep_sr.files import require_room
from fewstep_sr.weights.strict import printable

from ..done import settings_to_record
from ..pictures import read_pixels
from ..ranges import require_device
from ..settings import Settings
from .journal import Journal, known, read_report
from .machine import machine, sha256, versions
from .metrics import METRICS, Meter
from .pairs import Pair, find_folders, images_in, listed, pair
from .published import BENCHMARKS, Published, expected, recognise
from .report import Report, Row, aligned, write_json, write_text

if TYPE_CHECKING:
    from .restore import Restored

REPORT = "evaluation.json"
"""The report beside the restored images."""


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` was asked for.

    Args:
        data, lq, hq: folders, as :func:`pipelines.evaluation.pairs.find_folders` takes them.
        results: a folder of results that exist; None where there is a method.
        restoration: the method and its settings, whose output is the folder of the results; None for results that exist and for bicubic enlargement.
        output: the folder of the restored images.
        expect: a method's key, whose published figures are shown.
        benchmark: a key of BENCHMARKS; None to go by the images' names.
        json, csv, markdown: files to write.
    """

    metrics: Sequence[str]
    data: Path | None = None
    lq: Path | None = None
    hq: Path | None = None
    results: Path | None = None
    restoration: Settings | None = None
    scale: float = 4.0
    output: Path | None = None
    expect: str | None = None
    benchmark: str | None = None
    json: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None
    device: str | None = None
    through_pyiqa: bool = False
    overwrite: bool = False


def default_output(method: str, demo: bool) -> Path:
    """The folder of the images that a method restores, where none is named."""
    return Path(f"results_{method}{'_demo' if demo else ''}")


def evaluate(wanted: Evaluation) -> int:
    """Measure, print the table and write the files. Returns 1 where images failed or have no counterpart, else 0.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: nothing could be measured, or a place to write to is taken.
    """
    if wanted.device:
        require_device(wanted.device)
    lq, hq = find_folders(wanted.data, wanted.lq, wanted.hq)
    first = wanted.results or lq
    if first is None:
        raise ValueError(
            f"--lq: found no folder of low-quality images in {wanted.data or hq}, expected one to restore. Name it with --lq, or give --results."
        )
    if not first.is_dir():
        raise FileNotFoundError(f"--results: there is no folder {first}. Give the folder that the results are in.")
    if hq is None and all(METRICS[name].needs_original for name in wanted.metrics):
        raise ValueError(
            f"--metrics: {', '.join(wanted.metrics)} compare with originals, and there are none. Give --hq, or metrics such as niqe and musiq."
        )
    images = images_in(first, "--results" if wanted.results else "--lq")
    pairs, unpaired = pair(images, images_in(hq, "--hq") if hq else None)
    published = _published(wanted, [one.name for one in pairs])
    for path in filter(None, (wanted.json, wanted.csv, wanted.markdown)):
        require_room(path)
    own_report = wanted.output / REPORT if wanted.output else None
    if wanted.json and wanted.json.exists():
        read_report(wanted.json)  # refuses what is none
    journal = Journal(own_report or wanted.json)
    if unpaired:
        verbs = "has no other half and is" if len(unpaired) == 1 else "have no other half and are"
        print(f"{len(unpaired)} {verbs} left out: {listed(unpaired, 20)}.", file=sys.stderr)
    restored, pairs = _restore(wanted, pairs, journal)
    if restored and not restored.mine:
        return 0
    meter = Meter(wanted.metrics, _device(wanted.device, restored), hq is not None, wanted.through_pyiqa)
    rows, failed = _measure(pairs, meter, journal)
    failed = {Path(name).stem: reason for name, reason in (restored.failures if restored else {}).items()} | failed
    if not rows:
        raise ValueError(f"no image could be measured: {_first(failed)}")
    done = [one for one in pairs if one.name in {row.name for row in rows}]
    of_folder = meter.of_folder([one.image for one in done], [one.original for one in done if one.original])
    rows = [Row(row.name, row.files, known(meter.names, row.figures), row.seconds) for row in rows]
    problems = {"failed": failed, "unpaired": [path.name for path in unpaired], "left_out": meter.left_out}
    report = Report(
        _title(wanted, first), rows, meter.by, of_folder, _context(wanted, restored, done, meter.device), problems, published, wanted.expect
    )
    _write(_with_earlier(report, journal), wanted, own_report)
    journal.close()
    _print(report, failed, meter)
    if wanted.output:
        print(f"\nThe restored images and {REPORT} are in {wanted.output}.")
    return 1 if failed or unpaired else 0


def _restore(wanted: Evaluation, pairs: list[Pair], journal: Journal) -> "tuple[Restored | None, list[Pair]]":
    """Pairs of results instead of low-quality images; of those that failed there is none."""
    if wanted.output is None:
        return None, pairs
    from .restore import enlarge, jobs_of, restore  # diffusers, which results that exist do not need

    jobs = jobs_of([one.image for one in pairs], wanted.output)
    restored = restore(wanted.restoration, jobs, journal) if wanted.restoration else enlarge(wanted.scale, jobs, journal, wanted.overwrite)
    made = [Pair(one.name, job.target, one.original) for one, job in zip(pairs, jobs, strict=True) if str(job.source) not in restored.failures]
    return restored, made


def _measure(pairs: Sequence[Pair], meter: Meter, journal: Journal) -> tuple[list[Row], dict[str, str]]:
    """A row for each pair, and names and reasons of those that could not be compared."""
    rows, failed = [], {}
    for one in tqdm(pairs, unit="image", desc="measuring", dynamic_ncols=True, leave=False):
        try:
            files = {"image": sha256(one.image)} | ({"original": sha256(one.original)} if one.original else {})
            figures = journal.figures(one.name, files, {name: meter.by[name] for name in meter.of_images})
            if missing := [name for name in meter.of_images if name not in figures]:
                image = read_pixels(one.image).tensor()
                original = read_pixels(one.original).tensor() if one.original else None
                new = meter(image, original, missing)
                journal.note(one.name, files, figures=new, by={name: meter.by[name] for name in new})
                figures |= new
        except (OSError, ValueError) as error:
            failed[one.name] = str(error)
            tqdm.write(f"{printable(one.name)}: {error}", file=sys.stderr)
        else:
            rows.append(Row(one.name, files, figures, journal.seconds(one.name, files["image"])))
    return rows, failed


def _published(wanted: Evaluation, names: Sequence[str]) -> Published | None:
    if wanted.expect is None:
        return None
    benchmark = BENCHMARKS[wanted.benchmark] if wanted.benchmark else recognise(names)
    if benchmark is None:
        raise ValueError(f"--benchmark: these images' names do not tell which it is, expected one of {', '.join(BENCHMARKS)}. Name it.")
    if len(names) != benchmark.images:
        print(
            f"--expect: {benchmark.title} has {benchmark.images} images, and these are {len(names)}: the published means are of others.",
            file=sys.stderr,
        )
    return expected(wanted.expect, benchmark.key)


def _device(name: str | None, restored: "Restored | None") -> torch.device:
    if name:
        return torch.device(name)
    if restored and restored.device.type != "cpu":
        return restored.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _title(wanted: Evaluation, folder: Path) -> str:
    if wanted.results:
        return f"Results in {folder.name}"
    if wanted.restoration is None:
        return "Bicubic enlargement"
    demo = " (the miniature, --demo)" if wanted.restoration.demo else ""
    return f"{wanted.restoration.method.title}{demo}"


def _context(wanted: Evaluation, restored: "Restored | None", pairs: Sequence[Pair], device: torch.device) -> dict[str, Any]:
    if wanted.restoration:
        settings: Mapping[str, Any] = settings_to_record(wanted.restoration, Path("x.png"))
    else:
        settings = {"results": wanted.results.name} if wanted.results else {"method": "bicubic", "scale": wanted.scale}
    benchmark = BENCHMARKS[wanted.benchmark] if wanted.benchmark else recognise([one.name for one in pairs])
    found: dict[str, Any] = {"settings": settings, "versions": versions(), "machine": machine(device)}
    if restored:
        found |= {"weights": restored.weights, "peak_memory": restored.peak_memory}
    if benchmark:
        found["benchmark"] = {"name": benchmark.title, "published_at": benchmark.where}
    return found


def _with_earlier(report: Report, journal: Journal) -> Report:
    """The report with the figures of earlier runs that were asked for other metrics of the same files."""
    by = {name: source for name, source in journal.measured_by([(row.name, row.files) for row in report.rows]).items() if name not in report.metrics}
    rows = [replace(row, figures=known(METRICS, {**journal.figures(row.name, row.files, by), **row.figures})) for row in report.rows]
    return replace(report, rows=rows, metrics=known(METRICS, {**by, **report.metrics}))


def _write(report: Report, wanted: Evaluation, own_report: Path | None) -> None:
    content = report.to_json()
    if own_report and own_report.exists() and content.get("peak_memory") is None and (earlier := read_report(own_report).get("peak_memory")):
        content["peak_memory"] = earlier  # of the run that made the images
    for path in filter(None, (own_report, wanted.json)):
        write_json(path, content)
    if wanted.csv:
        write_text(wanted.csv, report.to_csv())
    if wanted.markdown:
        write_text(wanted.markdown, report.to_markdown())


def _print(report: Report, failed: Mapping[str, str], meter: Meter) -> None:
    count = len(report.rows)
    print(f"{report.title}, {count} {'image' if count == 1 else 'images'}\n\n{aligned(report.table())}\n\n{aligned(report.comparison())}")
    if report.published:
        print(f"\nPublished: {report.published.source}. {report.published.note}".rstrip())
    for name, reason in meter.left_out.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if failed:
        print(f"\n{len(failed)} failed:", *(f"  {printable(name)}: {reason}" for name, reason in failed.items()), sep="\n", file=sys.stderr)


def _first(failed: Mapping[str, str]) -> str:
    name, reason = next(iter(failed.items()), ("", "there are none."))
    return f"{name}: {reason}" if name else reason


def parse_metrics(names: Sequence[str]) -> list[str]:
    """Names of metrics; ``all`` stands for all of them.

    Raises:
        ValueError: there is no such metric.
    """
    wanted = [name for word in names for name in (METRICS if word == "all" else [word.lower()])]
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"--metrics: found {unknown[0]}, expected {', '.join(METRICS)}, or all.")
    return list(dict.fromkeys(wanted))
