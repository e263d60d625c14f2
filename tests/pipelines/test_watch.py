"""``upscale --watch``: files that come while it runs, that are still being written, that are bad; stop and start."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Forked
from PIL import Image

pytest.importorskip("diffusers")

from pipelines import upscale, watch  # noqa: F401 (once, for all the processes that are forked off)
from pipelines.cli import main

PHOTO = (ROOT / "miniature" / "photo.png").read_bytes()
PAUSE = 0.3


@pytest.fixture
def start(tmp_path):
    started = []
    (tmp_path / "inbox").mkdir()

    def work() -> int:
        watch.PAUSE = PAUSE
        return main(["upscale", "--watch", str(tmp_path / "inbox"), "-o", str(tmp_path / "outbox"), "--demo", "--scale", "1", "--device", "cpu"])

    def begin() -> Forked:
        started.append(Forked(work, tmp_path / f"log {len(started)}"))
        wait_for(lambda: "Watching" in started[-1].text, started[-1])
        return started[-1]

    yield begin
    for process in started:
        process.end()


def wait_for(condition, process: Forked, seconds=120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.process.is_alive() and time.monotonic() < end, process.text
        time.sleep(0.05)


def stop(process: Forked, number=signal.SIGTERM) -> int:
    os.kill(process.process.pid, number)
    return process.wait(60)


@pytest.mark.slow
def test_files_as_they_come(tmp_path, start):
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    (inbox / "there.png").write_bytes(PHOTO)
    process = start()
    wait_for((outbox / "there.png").is_file, process)

    with open(inbox / "slow.png", "wb", buffering=0) as file:  # in pieces, which come faster than it looks twice
        for at in range(0, len(PHOTO), len(PHOTO) // 8):
            file.write(PHOTO[at : at + len(PHOTO) // 8])
            time.sleep(PAUSE / 3)
            assert not (outbox / "slow.png").exists()
    (inbox / "sub").mkdir()
    (inbox / "sub" / "other.png").write_bytes(PHOTO)
    wait_for(lambda: (outbox / "slow.png").is_file() and (outbox / "sub" / "other.png").is_file(), process)
    assert "slow.png: " not in process.text.replace("slow.png: 100%", "").replace("slow.png:   0%", ""), "it was never read half"

    (inbox / "bad.png").write_bytes(PHOTO[:500])
    wait_for(lambda: "bad.png: " in process.text and "truncated" in process.text, process)
    reports = process.text.count("truncated")
    time.sleep(4 * PAUSE)
    assert process.text.count("truncated") == reports, "a bad file is done once"
    (inbox / "bad.png").write_bytes(PHOTO)  # and again when it has changed
    wait_for((outbox / "bad.png").is_file, process)

    before = {path: path.stat().st_mtime_ns for path in outbox.rglob("*.png")}
    assert stop(process) == 1 and "4 images written" in process.text and "1 failed" in process.text

    (inbox / "new.png").write_bytes(PHOTO)
    process = start()
    wait_for((outbox / "new.png").is_file, process)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert stop(process, signal.SIGINT) == 0 and "1 image written" in process.text
    assert all(Image.open(path).size for path in outbox.rglob("*.png")) and not list(outbox.rglob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photo.png", "-o", "out"], "is no folder that exists"),
        (["nowhere", "-o", "out"], "is no folder that exists"),
        (["in"], "found no -o"),
        (["in", "-o", "out", "--overwrite"], "each start would do all again"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("photo.png").write_bytes(PHOTO)
    assert main(["upscale", "--watch", *words, "--demo"]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_one_process_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["upscale", "--watch", str(tmp_path), "-o", str(tmp_path / "out"), "--demo"]) == 2
    assert "2 processes were started, expected 1" in capsys.readouterr().err
