"""``evaluate`` on real files: figures that are known, pairs by name, runs that are cut and go on, and inputs that cannot be measured."""

import csv
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fewstep_sr.image.quality import compare
from pipelines.cli import main
from pipelines.evaluation import metrics, restore
from pipelines.evaluation.pairs import base_name, pair
from pipelines.pictures import read_pixels

BENCHMARK = os.environ.get("FEWSTEP_SR_BENCHMARK")


def image(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def benchmark(tmp_path) -> Path:
    """Four pairs under the names of the published crops, and results that are the originals five steps lighter."""
    for folder in ("test_LR", "test_HR", "results"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        original = image(i, (48, 32))
        original.save(tmp_path / "test_HR" / f"Canon_00{i}_HR.png")
        original.resize((12, 8), Image.Resampling.BICUBIC).save(tmp_path / "test_LR" / f"Canon_00{i}_LR4.png")
        flat = np.asarray(original).astype(int)
        Image.fromarray(np.clip(flat + 5, 0, 255).astype(np.uint8)).save(tmp_path / "results" / f"Canon_00{i}_LR4.png")
    return tmp_path


def run(*words) -> int:
    return main(["evaluate", "--device", "cpu", *map(str, words)])


def measured(path: Path) -> dict:
    return json.loads(path.read_text())


def test_results_against_their_originals(benchmark, capsys):
    files = [benchmark / f"out.{kind}" for kind in ("json", "csv", "md")]
    status = run("--data", benchmark, "--results", benchmark / "results", "--json", files[0], "--csv", files[1], "--markdown", files[2])
    assert status == 0
    report = measured(files[0])
    assert [row["name"] for row in report["pictures"]] == [f"Canon_00{i}_LR4" for i in range(4)]
    for i, row in enumerate(report["pictures"]):
        result, original = (read_pixels(benchmark / path).tensor() for path in (f"results/Canon_00{i}_LR4.png", f"test_HR/Canon_00{i}_HR.png"))
        assert {name: row[name] for name in ("psnr", "ssim", "gmsd")} == {name: value.item() for name, value in compare(result, original).items()}
        assert len(row["files"]["image"]) == len(row["files"]["original"]) == 64
    for name in ("psnr", "ssim", "gmsd"):
        assert report["mean"][name] == pytest.approx(sum(row[name] for row in report["pictures"]) / 4)
    assert report["settings"] == {"results": "results"} and report["versions"]["torch"] == importlib.metadata.version("torch")
    assert not files[0].with_name("out.jsonl").exists()

    table = list(csv.reader(files[1].open()))
    assert table[0] == ["picture", "psnr", "ssim", "gmsd"] and table[-1][0] == "mean" and len(table) == 6
    assert float(table[-1][1]) == pytest.approx(report["mean"]["psnr"], abs=1e-4)
    assert f"| mean | {report['mean']['psnr']:.4f} |" in files[2].read_text()
    assert f"{report['mean']['psnr']:.4f}" in capsys.readouterr().out


def test_a_known_error_gives_the_known_psnr(tmp_path):
    """Five steps of grey of 255 are 5 * 219 / 255 of Y: 35.46 dB."""
    for folder, value in (("hq", 100), ("results", 105)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 24), (value,) * 3).save(tmp_path / folder / "a.png")
    assert run("--hq", tmp_path / "hq", "--results", tmp_path / "results", "--json", tmp_path / "out.json", "--metrics", "psnr") == 0
    assert measured(tmp_path / "out.json")["mean"] == {"psnr": pytest.approx(-20 * np.log10(5 * 219 / 255 / 255), abs=2e-3)}


@pytest.mark.skipif(not BENCHMARK, reason="FEWSTEP_SR_BENCHMARK names no folder with OSEDiff's published benchmark_realsr")
@pytest.mark.slow
def test_published_results_give_the_published_figures(tmp_path, capsys):
    data = Path(BENCHMARK)
    out = tmp_path / "out.json"
    assert run("--data", data, "--results", data / "results_osediff", "--expect", "osediff", "--metrics", "psnr", "ssim", "--json", out) == 0
    report = measured(out)
    assert len(report["pictures"]) == 100
    assert round(report["mean"]["psnr"], 4) == 25.1511 and round(report["mean"]["ssim"], 4) == 0.7341
    assert all(abs(report["expected"]["difference"][name]) < 5e-5 for name in ("psnr", "ssim"))
    assert "25.1511" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Canon_001_LR4", "Canon_001"), ("Canon_001_HR", "Canon_001"), ("Canon_001", "Canon_001"), ("0801x4", "0801"), ("0801_x4", "0801"),
        ("img_LR4_SR", "img"), ("box4", "box4"), ("a.lq", "a"), ("x4", "x4"), ("0801_pch_00001", "0801_pch_00001"), ("blur", "blur"),
    ],
)  # fmt: skip
def test_names_without_their_marks(name, base):
    assert base_name(name) == base


def test_pairs_by_equal_names_first():
    """``a_HR`` has an image of its very name, and leaves ``a.png`` to ``a_LR4.png``."""
    pairs, unpaired = pair([Path("l/a_HR.png"), Path("l/a_LR4.png"), Path("l/c.png")], [Path("h/a_HR.png"), Path("h/a.png"), Path("h/d.png")])
    assert [(one.image.name, one.original.name) for one in pairs] == [("a_HR.png", "a_HR.png"), ("a_LR4.png", "a.png")]
    assert [path.name for path in unpaired] == ["c.png", "d.png"]


def test_what_has_no_other_half_is_named(benchmark, capsys):
    (benchmark / "results" / "Canon_001_LR4.png").unlink()
    image(9, (48, 32)).save(benchmark / "results" / "other.png")
    assert run("--data", benchmark, "--results", benchmark / "results", "--json", benchmark / "out.json") == 1
    assert "2 have no other half and are left out: other.png, Canon_001_HR.png." in capsys.readouterr().err
    report = measured(benchmark / "out.json")
    assert len(report["pictures"]) == 3 and report["unpaired"] == ["other.png", "Canon_001_HR.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows' names have no such characters")
def test_names_cannot_break_the_tables(benchmark, capsys):
    """Line breaks, a terminal's controls, Markdown's and HTML's marks, other scripts, and more characters than a line has."""
    name = "Canon_009_a\n|\x1b[31m<b>猫" + "x" * 150
    for folder in ("results", "test_HR"):
        shutil.copy(benchmark / "results" / "Canon_001_LR4.png", benchmark / folder / f"{name}.png")
    files = [benchmark / f"out.{kind}" for kind in ("json", "csv", "md")]
    words = ["--metrics", "psnr", "--json", files[0], "--csv", files[1], "--markdown", files[2]]
    assert run("--data", benchmark, "--results", benchmark / "results", *words) == 0
    assert name in [row["name"] for row in measured(files[0])["pictures"]] and name in [row[0] for row in csv.reader(files[1].open(newline=""))]
    lines = files[2].read_text().splitlines()
    assert "\x1b" not in "".join(lines) and len([line for line in lines if line.startswith("| Canon_")]) == 5
    assert next(line for line in lines if "Canon_009" in line).startswith("| Canon_009_a\\n\\|\\x1b[31m&lt;b&gt;\\u732b")
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 100


@pytest.mark.skipif(os.name == "nt", reason="Windows' names have no such characters")
def test_names_that_are_no_text(benchmark, capsys):
    """Bytes of another encoding, as old archives leave them: in a pair, in one that fails, and in one without its other half."""
    pair, broken, alone = (os.fsdecode(b"Canon_00" + which + b"_\xe9") for which in (b"7", b"8", b"9"))
    for name in (pair, broken):
        for folder in ("results", "test_HR"):
            shutil.copy(benchmark / "results" / "Canon_001_LR4.png", benchmark / folder / f"{name}.png")
    (benchmark / "results" / f"{broken}.png").write_bytes(b"no image")
    shutil.copy(benchmark / "results" / "Canon_001_LR4.png", benchmark / "results" / f"{alone}.png")
    files = [benchmark / f"out.{kind}" for kind in ("json", "csv", "md")]
    words = ["--metrics", "psnr", "--json", files[0], "--csv", files[1], "--markdown", files[2]]
    assert run("--data", benchmark, "--results", benchmark / "results", *words) == 1
    report = measured(files[0])
    assert pair in [row["name"] for row in report["pictures"]] and list(report["failed"]) == [broken] and report["unpaired"] == [f"{alone}.png"]
    said = capsys.readouterr()
    assert "Canon_007_\\udce9" in said.out and "Canon_008_\\udce9" in said.err and "Canon_009_\\udce9.png" in said.err


def test_bad_images_are_named_and_the_others_measured(benchmark, capsys):
    results = benchmark / "results"
    Image.new("RGB", (48, 31)).save(results / "Canon_000_LR4.png")
    (results / "Canon_002_LR4.png").write_bytes((results / "Canon_003_LR4.png").read_bytes()[:60])
    assert run("--data", benchmark, "--results", results, "--json", benchmark / "out.json") == 1
    failed = measured(benchmark / "out.json")["failed"]
    assert "found 48 x 31 pixels, expected 48 x 32" in failed["Canon_000_LR4"] and failed["Canon_002_LR4"]
    assert len(measured(benchmark / "out.json")["pictures"]) == 2
    assert "2 failed:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda data: None, ["--data", "nowhere", "--results", "results"], "--data: there is no folder"),
        (lambda data: None, ["--data", ".", "--results", "nowhere"], "--results: there is no folder"),
        (lambda data: [path.unlink() for path in (data / "results").iterdir()], ["--data", ".", "--results", "results"], "there are no images in"),
        (lambda data: [path.rename(path.with_name(f"z{i}.png")) for i, path in enumerate((data / "results").iterdir())],
         ["--data", ".", "--results", "results"], "no image has its original"),
        (lambda data: image(1, (48, 32)).save(data / "results" / "Canon_000_LR4.jpg"), ["--data", ".", "--results", "results"], "could both be"),
        (lambda data: None, ["--data", ".", "--results", "results", "--metrics", "psrn"], "--metrics: found psrn, expected psnr"),
        (lambda data: None, ["--data", "."], "neither --method nor --results"),
        (lambda data: None, ["--data", ".", "--results", "results", "--device", "warp"], "--device: found 'warp'"),
        (lambda data: None, ["--data", ".", "--results", "results", "--method", "invsr"], "expected one of them"),
        (lambda data: None, ["--results", "results"], "--data: found none"),
        (lambda data: None, ["--data", ".", "--results", "results", "--expect", "invsr", "--benchmark", "drealsr"], "but known are osediff on realsr"),
        (lambda data: (data / "out.json").write_text("{}"), ["--data", ".", "--results", "results", "--json", "out.json"], "is no report of evaluate"),
        (lambda data: [Image.new("RGB", (8, 8)).save(p) for f in ("results", "test_HR") for p in (data / f).iterdir()],
         ["--data", ".", "--results", "results"], "no image could be measured: Canon_000_LR4: image: found 8 x 8 pixels, expected 11 a side"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(benchmark, monkeypatch, capsys, change, words, message):
    change(benchmark)
    before = sorted(benchmark.rglob("*"))
    monkeypatch.chdir(benchmark)
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(benchmark.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "verify"])
def test_two_methods_are_not_one_of_them(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--method", "osediff", "--demo", "--method", "invsr"])
    assert "--method: found osediff and invsr, expected one. Run the command once for each." in capsys.readouterr().err


def test_images_without_originals(benchmark, capsys):
    """A folder of low-quality images alone: what compares is left out in words, and if nothing else is asked for it is an error."""
    assert run("--data", benchmark / "test_LR", "--results", benchmark / "results") == 2
    assert "--metrics: psnr, ssim, gmsd compare with originals, and there are none. Give --hq" in capsys.readouterr().err


def test_without_originals_what_compares_is_left_out(benchmark, pyiqa):
    out = benchmark / "out.json"
    assert run("--data", benchmark / "test_LR", "--results", benchmark / "results", "--metrics", "psnr", "niqe", "--json", out) == 0
    report = measured(out)
    assert list(report["mean"]) == ["niqe"] and "it compares with originals, and there are none" in report["left_out"]["psnr"]
    assert len(report["pictures"]) == 4 and "original" not in report["pictures"][0]["files"]


class PyiqaDouble:
    """In pyiqa's place: LPIPS' weights cannot be fetched, NIQE is the mean grey, MUSIQ fails at its second image, FID counts files."""

    calls: list = []

    def create_metric(self, name, device=None, **options):
        self.calls.append((name, options))
        if name == "lpips":
            raise OSError("We couldn't connect to the server\nto load this file")
        if name == "musiq":
            return self.musiq
        return {"niqe": lambda x: x.mean() * 10, "fid": lambda original, results: torch.tensor(float(len(list(Path(results).iterdir()))))}[name]

    def musiq(self, x):
        self.failing = getattr(self, "failing", 0) + 1
        if self.failing > 1:
            raise RuntimeError("expected more pixels")
        return x.mean()


@pytest.fixture
def pyiqa(monkeypatch):
    double = PyiqaDouble()
    double.calls = []
    monkeypatch.setitem(sys.modules, "pyiqa", double)
    monkeypatch.setattr(metrics, "version", lambda name: "0.0")
    return double


def test_a_metric_that_cannot_be_had_is_said_and_the_others_go_on(benchmark, pyiqa, capsys):
    words = ["--metrics", "psnr", "lpips", "niqe", "musiq", "fid", "--json", benchmark / "out.json"]
    assert run("--data", benchmark, "--results", benchmark / "results", *words) == 0
    report = measured(benchmark / "out.json")
    assert list(report["mean"]) == ["psnr", "fid", "niqe"] and report["mean"]["fid"] == 4
    assert "couldn't connect to the server to load this file" in report["left_out"]["lpips"]
    assert "pyiqa fails at it: expected more pixels" in report["left_out"]["musiq"]
    assert report["metrics"]["niqe"] == "pyiqa 0.0" and report["metrics"]["psnr"].startswith("fewstep_sr")
    assert all("musiq" not in row for row in report["pictures"])
    error = capsys.readouterr().err
    assert "lpips is left out: " in error and "musiq is left out: " in error


def test_pyiqa_is_called_as_the_authors_do(pyiqa):
    pyiqa.create_metric = lambda name, device=None, **options: pyiqa.calls.append((name, options)) or (lambda *a: torch.tensor(0.0))
    metrics.Meter(list(metrics.METRICS), torch.device("cpu"), through_pyiqa=True)
    y = {"test_y_channel": True, "color_space": "ycbcr"}
    plain = ["lpips", "dists", "fid", "niqe", "musiq", "maniqa-pipal", "clipiqa"]
    assert pyiqa.calls == [("psnr", y), ("ssim", y), ("gmsd", {}), *((name, {}) for name in plain)]


def test_without_pyiqa_its_licence_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    meter = metrics.Meter(["psnr", "lpips"], torch.device("cpu"))
    assert meter.names == ["psnr"] and "pip install pyiqa; its licence is PolyForm Noncommercial License 1.0.0" in meter.left_out["lpips"]
    with pytest.raises(ValueError, match="none can be computed. lpips: pyiqa is not installed"):
        metrics.Meter(["lpips"], torch.device("cpu"))


def test_bicubic_is_measured_and_goes_on(benchmark, monkeypatch):
    out = benchmark / "bicubic"
    words = ["--data", benchmark, "--method", "bicubic", "-o", out]
    assert run(*words) == 0
    first = measured(out / "evaluation.json")
    for i, row in enumerate(first["pictures"]):
        low, original = (read_pixels(benchmark / path).tensor() for path in (f"test_LR/Canon_00{i}_LR4.png", f"test_HR/Canon_00{i}_HR.png"))
        expected = compare(F.interpolate(low, scale_factor=4, mode="bicubic"), original)
        assert row["psnr"] == pytest.approx(expected["psnr"].item(), abs=1e-6) and row["seconds"] >= 0

    monkeypatch.setattr(metrics.Meter, "__call__", _forbidden)
    monkeypatch.setattr(restore.F, "interpolate", _forbidden)
    assert run(*words) == 0  # nothing is enlarged or measured again
    assert measured(out / "evaluation.json")["pictures"] == first["pictures"]


def test_metrics_of_earlier_runs_stay_in_the_report(benchmark, capsys):
    """Of the same files; the table has those that were asked for."""
    words = ["--data", benchmark, "--method", "bicubic", "-o", benchmark / "bicubic"]
    assert run(*words, "--metrics", "psnr", "gmsd") == 0
    first = measured(benchmark / "bicubic" / "evaluation.json")
    assert run(*words, "--metrics", "ssim") == 0
    assert "gmsd" not in capsys.readouterr().out.rpartition("Bicubic")[2]
    second = measured(benchmark / "bicubic" / "evaluation.json")
    assert list(second["mean"]) == list(second["metrics"]) == ["psnr", "ssim", "gmsd"]
    assert [[row[name] for name in ("psnr", "gmsd")] for row in second["pictures"]] == [
        [row[name] for name in ("psnr", "gmsd")] for row in first["pictures"]
    ]
    Image.new("RGB", (48, 32)).save(benchmark / "test_HR" / "Canon_001_HR.png")
    assert run(*words, "--metrics", "ssim") == 0
    assert list(measured(benchmark / "bicubic" / "evaluation.json")["mean"]) == ["ssim"]


def _forbidden(*_, **__):
    raise AssertionError("it was known")


def test_a_run_that_was_cut_goes_on(benchmark, monkeypatch, capsys):
    """Stopped while it measures the third image: the figures of two, and the seconds of all, are kept."""
    out = benchmark / "out"
    words = ["--data", benchmark, "--method", "bicubic", "-o", out]
    real, count = metrics.Meter.__call__, []

    def stopped(self, *arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(metrics.Meter, "__call__", stopped)
    assert run(*words) == 130 and not (out / "evaluation.json").exists()
    journal = out / "evaluation.jsonl"
    with journal.open("a") as file:
        file.write('{"name": "Canon_002_LR4", "fil')  # and the last line half-written

    count.clear()
    monkeypatch.setattr(metrics.Meter, "__call__", lambda self, *arguments: count.append(1) or real(self, *arguments))
    assert run(*words) == 0
    report = measured(out / "evaluation.json")
    assert len(count) == 2 and len(report["pictures"]) == 4 and report["seconds"]["images"] == 4 and not journal.exists()
    (benchmark / "again").mkdir()
    assert run("--data", benchmark, "--results", out, "--json", benchmark / "again" / "a.json") == 0
    assert measured(benchmark / "again" / "a.json")["mean"] == report["mean"]


def test_a_changed_image_is_measured_again(benchmark):
    words = ["--data", benchmark, "--results", benchmark / "results", "--json", benchmark / "out.json"]
    assert run(*words) == 0
    before = measured(benchmark / "out.json")
    image(77, (48, 32)).save(benchmark / "results" / "Canon_002_LR4.png")
    assert run(*words) == 0
    after = measured(benchmark / "out.json")
    changed = [a["name"] for a, b in zip(after["pictures"], before["pictures"], strict=True) if a != b]
    assert changed == ["Canon_002_LR4"]


def test_foreign_files_in_the_results_folder_are_refused(benchmark, capsys):
    """What this program has not written is not measured as a method's result."""
    for method in ("bicubic", "osediff"):
        demo = ["--demo"] if method == "osediff" else []
        assert run("--data", benchmark, "--method", method, *demo, "-o", benchmark / "results") == 2
        assert "which this program has not written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_method_on_the_miniature(benchmark, capsys):
    """Figures of the images that it writes; a second run restores nothing and keeps the seconds, another seed restores again."""
    out = benchmark / "out"
    words = ["--data", benchmark, "--method", "invsr", "--demo", "-o", out, "--expect", "invsr"]
    assert run(*words) == 0
    error = capsys.readouterr()
    assert "RealSR has 100 images, and these are 4" in error.err and "published" in error.out
    assert f"evaluation.json are in {out}." in error.out
    first = measured(out / "evaluation.json")
    assert first["settings"]["method"] == "invsr" and first["settings"]["demo"] and first["peak_memory"]["bytes"] > 2**20
    assert "noise_predictor.safetensors" in first["weights"] and first["expected"]["figures"]["psnr"] == 24.5
    for row in first["pictures"]:
        result, original = (read_pixels(path).tensor() for path in (out / f"{row['name']}.png", benchmark / "test_HR" / f"{row['name'][:9]}_HR.png"))
        assert row["psnr"] == compare(result, original)["psnr"].item() and row["seconds"] > 0
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert run(*words) == 0
    assert (
        measured(out / "evaluation.json")["pictures"] == first["pictures"]
        and measured(out / "evaluation.json")["peak_memory"] == first["peak_memory"]
    )
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.png")} == times


def test_an_unreadable_low_quality_image_fails_alone(benchmark, capsys):
    (benchmark / "test_LR" / "Canon_001_LR4.png").write_text("no image")
    assert run("--data", benchmark, "--method", "bicubic", "-o", benchmark / "out") == 1
    report = measured(benchmark / "out" / "evaluation.json")
    assert len(report["pictures"]) == 3 and "cannot identify" in report["failed"]["Canon_001_LR4"]


def test_the_help_names_metrics_and_benchmarks(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in metrics.METRICS)
    assert all(title in text for title in ("RealSR", "DRealSR", "DIV2K-Val", "RealSet80", "RealLQ250"))
