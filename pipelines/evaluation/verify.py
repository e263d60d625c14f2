"""``verify``: does this machine, with these files, compute what was computed elsewhere? Every stage, in float32 and half, by pipelines and nodes."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewstep_sr.files import require_room
from fewstep_sr.miniature import PHOTO
from fewstep_sr.miniature import find as find_miniature

from ..pictures import read_pixels
from .by_nodes import ByNodes, run_nodes
from .evaluate import REPORT, Evaluation, default_output, evaluate
from .journal import read_report
from .machine import machine, sha256, versions
from .pairs import LOW_QUALITY, ORIGINALS, find_folders, images_in
from .published import recognise
from .report import aligned, write_json
from .stages import error_of_fingerprint, fingerprint, relative_errors
from .subjects import Run, Subject, half_of, run_subject

NAME = "ComfyUI-FewStepSR verify"
REFERENCE = Path(__file__).with_name("reference.json")
"""Fingerprints of stages that were computed elsewhere, by :meth:`pipelines.evaluation.subjects.Subject.key`."""

GOLDEN_TESTS = ("tests/pipelines/test_*_golden.py", "tests/pipelines/test_light_decoders.py")
"""Of a checkout, as globs: the pipelines against the outputs of the authors' own code."""

TOLERANCE = 1e-3
"""Relative error in float32, between two ways of computing one stage: other kernels sum in another order."""
HALF_TOLERANCE = {"float16": 0.05, "bfloat16": 0.2}
"""The same in half, against float32. Eight bits of mantissa (bfloat16) leave an error of a hundredth in each layer."""


@dataclass(frozen=True)
class Verification:
    """What ``verify`` was asked for.

    Args:
        subjects: methods with their settings, the miniature's among them.
        missing: what was not found, in words.
        checkpoint: the base as one file, for the nodes, where the pipelines' is a folder.
        reference: another report of verify to compare with.
        half: the name of the half precision; None for what the device can do.
        data: a benchmark to evaluate the methods on, the miniature's only where no others are asked for; images and reports go into
            ``results_METHOD``, of the miniature into ``results_METHOD_demo``.
    """

    subjects: Sequence[Subject]
    missing: Sequence[str] = ()
    picture: Path | None = None
    comfyui: Path | None = None
    checkpoint: Path | None = None
    reference: Path | None = None
    half: str | None = None
    golden: bool = True
    data: Path | None = None
    json: Path | None = None


@dataclass
class Checked:
    """A subject's runs by name, relative errors by what is compared with what, and what was found in words."""

    subject: Subject
    key: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)
    benchmark: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def verify(wanted: Verification) -> int:
    """Check everything, print it, and write the report. Returns 1 where something is wrong, else 0."""
    if wanted.json:
        require_room(wanted.json)
        if wanted.json.exists():
            read_report(wanted.json, NAME)
    images = _images_of(wanted.data) if wanted.data else []
    reference = _read_reference(wanted.reference)
    picture = read_pixels(wanted.picture or find_miniature(PHOTO)).tensor()
    device = wanted.subjects[0].device
    half = wanted.half or half_of(device)
    checks = [_check(subject, picture, half, reference, wanted) for subject in wanted.subjects]
    missing = list(wanted.missing)
    if wanted.data:
        measured = [check for check in checks if not check.subject.settings.demo] or ([] if missing else checks)
        for check in measured:
            _benchmark(check, wanted.data, images)
        if not measured:
            missing.append(f"the methods on {wanted.data.name}: no weights were found. --demo measures the miniature on it.")
    golden = _golden() if wanted.golden else {"note": "not asked for"}
    faults = [f"{check.subject.title}: {fault}" for check in checks for fault in check.faults] + list(golden.get("faults", ()))
    content = {
        "report": NAME,
        "ok": not faults,
        "faults": faults,
        "missing": missing,
        "versions": versions(),
        "machine": machine(device),
        "half": half,
        "picture": {"size": [picture.shape[-1], picture.shape[-2]], "sha256": sha256(wanted.picture or find_miniature(PHOTO))},
        "golden": golden,
        "checks": [_to_json(check) for check in checks],
    }
    _print(checks, golden, missing, faults)
    if wanted.json:
        write_json(wanted.json, content)
        print(f"\nThe whole report is in {wanted.json}.")
    return 1 if faults else 0


def _check(subject: Subject, picture: torch.Tensor, half: str, reference: Mapping[str, Any], wanted: Verification) -> Checked:
    check = Checked(subject, subject.key(picture))
    print(f"{subject.title}: pipeline in float32 ...", file=sys.stderr)
    try:
        exact = run_subject(subject, picture, "float32")
    except (RuntimeError, ValueError, OSError) as error:  # weights that do not fit, memory, values that are not numbers
        check.faults.append(f"the pipeline fails in float32: {_line(error)}")
        return check
    check.runs["pipeline float32"] = _summary(exact)
    check.fingerprints = {name: fingerprint(tensor) for name, tensor in exact.stages.tensors.items()}
    _require_finite(check, "pipeline float32", exact.stages.tensors)
    if known := reference.get(check.key):
        found = {name: error_of_fingerprint(check.fingerprints[name], known[name]) for name in known if name in check.fingerprints}
        _compare(check, "pipeline float32 against reference figures", found, TOLERANCE)
    else:
        check.notes.append("there are no reference figures of these weights with this picture; those of this run are in the report")
    print(f"{subject.title}: pipeline in {half} ...", file=sys.stderr)
    try:
        rough = run_subject(subject, picture, half)
    except RuntimeError as error:  # half precision that overflows, or a device that cannot
        check.faults.append(f"the pipeline fails in {half}: {_line(error)}")
    else:
        check.runs[f"pipeline {half}"] = _summary(rough)
        _require_finite(check, f"pipeline {half}", rough.stages.tensors)
        found = relative_errors(rough.stages.tensors, exact.stages.tensors)
        _compare(check, f"pipeline {half} against pipeline float32", found, HALF_TOLERANCE[half])
    _check_nodes(check, picture, half, exact, wanted)
    return check


def _check_nodes(check: Checked, picture: torch.Tensor, half: str, exact: Run, wanted: Verification) -> None:
    subject = check.subject
    if wanted.comfyui is None:
        check.notes.append("nodes were not run: no ComfyUI was named (--comfyui or COMFYUI_PATH)")
        return
    request = subject.request(exact, wanted.checkpoint)
    if isinstance(request, str):
        check.notes.append(f"nodes were not run: {request}")
        return
    for dtype, tolerance in (("float32", TOLERANCE), (half, HALF_TOLERANCE[half])):
        print(f"{subject.title}: nodes in {dtype} ...", file=sys.stderr)
        try:
            nodes: ByNodes = run_nodes(wanted.comfyui, picture, request, subject.device, dtype)
        except (RuntimeError, OSError) as error:
            check.faults.append(f"{_line(error)}")
            continue
        check.runs[f"nodes {dtype}"] = {"seconds": nodes.seconds, "comfyui": nodes.comfyui}
        _require_finite(check, f"nodes {dtype}", nodes.tensors)
        found = relative_errors(nodes.tensors, exact.stages.tensors)
        _compare(check, f"nodes {dtype} against pipeline float32", found, tolerance)


def _compare(check: Checked, what: str, errors: dict[str, float | None], tolerance: float) -> None:
    check.errors[what] = errors
    for stage, error in errors.items():
        if error is None:
            check.faults.append(f"{what}: {stage} has another shape, or values that are not numbers")
        elif error > tolerance and not stage.startswith("noise prediction"):  # which is a step on the way, not a result
            check.faults.append(f"{what}: {stage} has a relative error of {error:.2g}, expected {tolerance:g} at most")


def _require_finite(check: Checked, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for stage, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            check.faults.append(f"{what}: {stage} holds values that are not numbers (NaN or infinity)")


def _summary(run: Run) -> dict[str, Any]:
    return {"seconds": run.stages.seconds | {"all": run.seconds}, "peak_memory": run.stages.memory, "load_seconds": run.load_seconds}


def _images_of(data: Path) -> list[Path]:
    """A benchmark's low-quality images.

    Raises:
        FileNotFoundError, ValueError: there are none, or no originals beside them.
    """
    lq, hq = find_folders(data, None, None)
    if lq is None or hq is None:
        raise ValueError(
            f"--data: found no {'low-quality images' if lq is None else 'originals'} in {data}, expected {LOW_QUALITY[0]} and {ORIGINALS[0]}."
        )
    return images_in(lq, "--data")


def _benchmark(check: Checked, data: Path, images: Sequence[Path]) -> None:
    """The means of the method on a benchmark, beside the published ones where there are some, from the report that ``evaluate`` leaves."""
    settings, metrics = check.subject.settings, ["psnr", "ssim", "gmsd"]
    key, output = settings.method.key, default_output(settings.method.key, settings.demo)
    benchmark = recognise([path.stem for path in images])
    known = benchmark is not None and any(published.benchmark == benchmark.key for published in settings.method.published)
    settings = replace(settings, output=output, suffix=".png", device=str(check.subject.device))
    try:
        evaluate(Evaluation(metrics, data=data, restoration=settings, output=output, expect=key if known else None))
        report = read_report(output / REPORT)
    except (OSError, RuntimeError, ValueError) as error:  # what was verified is still reported
        check.faults.append(f"the benchmark fails: {_line(error)}")
        return
    check.benchmark = {name: report[name] for name in ("mean", "expected", "seconds", "peak_memory", "failed") if name in report}
    if failed := report.get("failed"):
        check.faults.append(f"of the benchmark's {len(images)} images {len(failed)} failed, {next(iter(failed))} first")


def _golden() -> dict[str, Any]:
    """The pipelines against the outputs of the authors' own code, which are in a checkout."""
    root = Path(__file__).resolve().parents[2]
    tests = [path for pattern in GOLDEN_TESTS for path in sorted(root.glob(pattern))]
    if not tests:
        return {"note": "the authors' outputs are in a checkout alone (tests/golden), and this is an installation"}
    if importlib.util.find_spec("pytest") is None:
        return {"note": "pytest is not installed (pip install pytest), with which the authors' outputs are compared"}
    print("pipelines against the outputs of the authors' code (tests/golden) ...", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)], capture_output=True, text=True, cwd=root
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found: dict[str, Any] = {"result": lines[-1].strip("= ") if lines else f"exit status {done.returncode}"}
    if done.returncode:
        found["faults"] = [f"the pipelines differ from the authors' outputs: {found['result']}"]
        found["output"] = done.stdout[-4000:]
    return found


def _read_reference(other: Path | None) -> dict[str, Any]:
    known: dict[str, Any] = read_report(REFERENCE, NAME).get("fingerprints", {}) if REFERENCE.is_file() else {}
    if other:
        known |= {check["key"]: check["fingerprints"] for check in read_report(other, NAME)["checks"]}
    return known


def _to_json(check: Checked) -> dict[str, Any]:
    subject = check.subject
    return {
        "title": subject.title,
        "key": check.key,
        "method": subject.settings.method.key,
        "weights": subject.hashes,
        "settings": subject.recorded,
        "runs": check.runs,
        "errors": check.errors,
        "faults": check.faults,
        "notes": check.notes,
        "benchmark": check.benchmark,
        "fingerprints": check.fingerprints,
    }


def _print(checks: Sequence[Checked], golden: Mapping[str, Any], missing: Sequence[str], faults: Sequence[str]) -> None:
    for check in checks:
        print(f"\n{check.subject.title}")
        seconds = {name: run["seconds"] for name, run in check.runs.items()}
        columns = [*(f"{name}, s" for name in seconds), *check.errors]
        table = [["stage", *(f"[{i}]" for i in range(1, len(columns) + 1))]]
        for stage in check.fingerprints:
            times = [f"{values[stage]:.2f}" if stage in values else "-" for values in seconds.values()]
            errors = ["-" if errors.get(stage) is None else f"{errors[stage]:.1e}" for errors in check.errors.values()]
            table.append([stage, *times, *errors])
        print(aligned(table))
        for i, name in enumerate(columns, 1):
            print(f"  [{i}] {name if name.endswith(', s') else f'relative error, {name}'}")
        for note in check.notes:
            print(f"  note: {note}.")
    print("\nAuthors' outputs:", golden.get("result") or golden.get("note"))
    for what in missing:
        print(f"Not verified: {what}")
    print("\nFound wrong:" if faults else "\nNothing was found wrong.", *(f"  {fault}" for fault in faults), sep="\n")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__
