"""Runs over folders that are killed at chosen places and go on, and runs that end at what will meet every image."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.batch import Written, join, run, share
from pipelines.jobs import Job, list_jobs
from pipelines.pictures import OutputError, read_picture, write_picture
from pipelines.pictures.record import make_record, read_record, same_result

ROOT = Path(__file__).resolve().parents[2]


def record(job: Job) -> str:
    return make_record({"scale": 2}, job.source)


def is_done(job: Job) -> bool:
    found = read_record(job.target) if job.target.is_file() else None
    return found is not None and same_result(found, record(job))


def enlarge(job: Job) -> Written:
    picture = read_picture(job.source)
    restored = F.interpolate(picture.pixels.tensor(), scale_factor=2, mode="nearest")
    notes = write_picture(restored, picture, job.target, 95, record(job))
    return Written(job.target, (restored.shape[-1], restored.shape[-2]), job.target.stat().st_size, tuple(notes))


def go(source: Path, out: Path):
    state, peers = join("cpu")
    mine, done = share(list_jobs([str(source)], out, None), state, is_done)
    return run(mine, enlarge, state, peers), done


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_folder_runs as runs
from fewstep_sr import files

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

count = 0
def counted(place):
    global count
    count += place == {place!r}
    if count == 3:
        kill()

real_write, real_replace = Path.write_bytes, os.replace
def write(path, data):
    if path.suffix == ".part" and len(data) > 4096:
        with open(path, "wb") as file:
            file.write(bytes(data)[: len(data) // 2])
            file.flush()
            counted("half written")
    return real_write(path, data)

def replace(old, new):
    counted("before the renaming")
    real_replace(old, new)
    counted("after the renaming")

Path.write_bytes, files.os.replace = write, replace
runs.go(Path({source!r}), Path({out!r}))
"""


def photos(folder: Path, number: int = 6) -> list[str]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(number)]


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
@pytest.mark.parametrize(("place", "whole"), [("half written", 2), ("before the renaming", 2), ("after the renaming", 3)])
def test_killed_and_gone_on(tmp_path, place, whole):
    names, out = photos(tmp_path / "in"), tmp_path / "out"
    script = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), place=place, source=str(tmp_path / "in"), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert visible(out) == names[:whole]  # and nothing half-written under a result's name
    before = {name: (out / name).stat().st_mtime_ns for name in names[:whole]}
    for left in out.glob(".fewstepsr-*"):
        os.utime(left, (1, 1))  # an hour later
    outcome, done = go(tmp_path / "in", out)
    assert done == whole and len(outcome.written) == len(names) - whole and not outcome.failures
    assert sorted(os.listdir(out)) == names
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    for name in names:
        values = np.asarray(Image.open(out / name))
        assert np.array_equal(values[::2, ::2], np.asarray(Image.open(tmp_path / "in" / name)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_ends_the_run(tmp_path, monkeypatch, capsys, code):
    photos(tmp_path / "in")

    def refuse(path, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    outcome, _ = go(tmp_path / "in", tmp_path / "out")
    assert len(outcome.failures) == 1 and os.strerror(code) in outcome.failures[0][1] and outcome.not_begun == 5


def test_a_gpu_that_failed_ends_the_run_and_a_bad_image_does_not(tmp_path):
    jobs = [Job(tmp_path / f"{i}.png", tmp_path / f"o{i}.png") for i in range(4)]
    errors = {
        "CUDA error: device-side assert triggered": 1,
        "CUDA out of memory. Tried to allocate 2 GiB": 4,
        "it is damaged": 4,
    }
    for text, failures in errors.items():

        def fail(job, text=text):
            raise (torch.cuda.OutOfMemoryError if "memory" in text else RuntimeError)(text)

        outcome = run(jobs, fail, *join("cpu"))
        assert (len(outcome.failures), outcome.not_begun) == (failures, 4 - failures), text


def test_an_output_error_says_what_the_system_says(tmp_path):
    (tmp_path / "file").write_text("x")
    picture = photos(tmp_path / "in", 1) and read_picture(tmp_path / "in" / "0.png")
    with pytest.raises(OutputError, match=r"0.png cannot be written: (File exists|Not a directory)"):
        write_picture(picture.pixels.tensor(), picture, tmp_path / "file" / "0.png", 95)
