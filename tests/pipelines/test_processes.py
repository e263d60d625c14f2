"""Several processes without a launcher's help: one that never comes, one that dies, one that takes long."""

import io
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from forked import Forked, environment_of, free_port
from tqdm import tqdm

pytest.importorskip("diffusers")

from pipelines import processes
from pipelines.batch import Job, Written, join, run
from pipelines.cli import main
from pipelines.training import methods, osediff  # noqa: F401 (once, for all the processes that are forked off)

pytestmark = pytest.mark.slow


def share(folder: Path, plan: str) -> None:
    """A run over two images, in which this process does as planned."""
    state, peers = join("cpu")

    def work(job: Job) -> Written:
        last = job.source.name == "b"
        if plan == "dies" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        if plan == "stops" and last:
            os.kill(os.getpid(), signal.SIGSTOP)
        if plan == "fails" and last:
            sys.exit(3)
        time.sleep({"slow": processes.patience() + 2, "sleeps": 600}.get(plan, 0))
        if last:
            (folder / f"done {state.process_index}").touch()
        return Written(job.target, (1, 1), 1)

    try:
        outcome = run([Job(folder / name, folder / name) for name in "ab"], work, state, peers)
        print("written:", len(outcome.written), flush=True)
        with peers.waiting(lambda: "All work is done."):
            state.wait_for_everyone()
    finally:
        peers.leave()


@pytest.fixture
def patience(tmp_path) -> float:
    """Seconds that are short, but much longer than a process that lives can be silent here: as many times longer as the machine is busy."""
    begin = time.monotonic()
    for number in range(3):
        assert Forked(lambda: 0, tmp_path / f"trial {number}").wait() == 0
    return max(3.0, 10 * (time.monotonic() - begin))


@pytest.fixture
def start(tmp_path, patience):
    """A function that starts processes by rank as a launcher does that takes no further care of them."""
    port, started = free_port(), []

    def begin(works: dict, patience: float = patience) -> list[Forked]:
        for rank, work in works.items():
            environment = environment_of(rank, 2, port) | {"FEWSTEP_SR_PATIENCE": str(patience)}
            started.append(Forked(work, tmp_path / f"log {rank}", environment))
        return started

    yield begin
    for process in started:
        process.end()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["upscale", "train"])
def test_a_process_that_never_joins_is_not_waited_for(tmp_path, start, patience, rank, command):
    photo, miniature = str(ROOT / "miniature" / "photo.png"), str(ROOT / "miniature")
    words = {
        "upscale": ["upscale", photo, "--demo", "-o", str(tmp_path / "out.png")],
        "train": ["train", "osediff", "--base", miniature, "--data", photo, "-o", str(tmp_path / "run"), "--steps", "1", "--patch", "64"],
    }[command]
    more = ["--vsd-weight", "0", "--lpips-weight", "0"] if command == "train" else []
    (process,) = start({rank: lambda: main([*words, *more])})
    assert process.wait() == 2
    assert f"processes: 2 were started, but not all have joined within {patience:.0f} seconds" in process.text
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rank, plan, what",
    [
        (1, "dies", "lost another"),
        (0, "dies", "process 0, which keeps|lost another"),
        (1, "stops", r"process 1 has given no sign of life for \d+ seconds"),
        (1, "fails", "process 1 has ended|lost another"),
    ],
)
def test_one_that_is_gone_is_reported_with_what_the_others_did(tmp_path, start, rank, plan, what):
    plans = {0: "works", 1: "works"} | {rank: plan}
    waits = start({number: lambda plan=plan: share(tmp_path, plan) for number, plan in plans.items()})[1 - rank]
    assert waits.wait() == 1
    assert re.search(what, waits.text), waits.text
    assert "It has written 2 of its 2 images. The same command continues" in waits.text


def test_a_share_may_take_longer_than_the_patience(tmp_path, start):
    for process in start({0: lambda: share(tmp_path, "works"), 1: lambda: share(tmp_path, "slow")}):
        assert process.wait() == 0 and "written: 4" in process.text, process.text


def test_a_run_that_is_stopped_for_a_while_goes_on(tmp_path, start, patience):
    """As by Ctrl-Z and fg, or when a machine sleeps: the time in which nobody could give or see a sign of life does not count."""
    first, second = start({0: lambda: share(tmp_path, "works"), 1: lambda: share(tmp_path, "slow")})
    while not (tmp_path / "done 0").exists():
        time.sleep(0.1)
    for process in (first, second):
        os.kill(process.process.pid, signal.SIGSTOP)
    time.sleep(patience + 1)
    os.kill(first.process.pid, signal.SIGCONT)
    time.sleep(patience / 2)
    os.kill(second.process.pid, signal.SIGCONT)
    for process in (first, second):
        assert process.wait() == 0 and "written: 4" in process.text, process.text


def test_one_that_is_told_to_end_reports_even_while_it_waits(tmp_path, start):
    """As a launcher does with the others when one has failed."""
    waits, _ = start({0: lambda: share(tmp_path, "works"), 1: lambda: share(tmp_path, "sleeps")}, patience=200)
    end = time.monotonic() + 200
    while not (tmp_path / "done 0").exists() and time.monotonic() < end:
        time.sleep(0.2)
    asleep = 0
    while asleep < 20 and time.monotonic() < end:  # until it waits for the other
        asleep = asleep + 1 if psutil.Process(waits.process.pid).status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.1)
    waits.process.terminate()
    assert waits.wait() == 128 + signal.SIGTERM
    assert "was told to end" in waits.text and "It has written 2 of its 2 images" in waits.text


@pytest.mark.parametrize("text", ["soon", "0", "-5", "nan", "inf"])
def test_patience_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("FEWSTEP_SR_PATIENCE", text)
    with pytest.raises(ValueError, match=f"FEWSTEP_SR_PATIENCE: found '{text}', expected seconds"):
        processes.patience()


def test_a_killed_process_stops_no_progress_bar(tmp_path):
    list(tqdm([0], file=io.StringIO()))  # from here on there is a lock that processes inherit

    def hold() -> int:
        tqdm.get_lock().acquire()
        print("held")
        time.sleep(60)
        return 0

    holding = Forked(hold, tmp_path / "log")
    while "held" not in holding.text:
        time.sleep(0.02)
    holding.end()
    assert Forked(lambda: len(list(tqdm([0]))) - 1, tmp_path / "bar").wait(10) == 0
