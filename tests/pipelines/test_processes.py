"""Several processes without a launcher's help: one that never comes, one that dies, one that takes long."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

SHARE = """
import os, signal, sys, time
from pathlib import Path
from pipelines.batch import Job, Written, join, run

state, peers = join("cpu")
folder, plan = Path(sys.argv[1]), sys.argv[2 + state.process_index]

def work(job):
    if plan == "dies" and job.source.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "stops" and job.source.name == "b":
        os.kill(os.getpid(), signal.SIGSTOP)
    if plan == "fails" and job.source.name == "b":
        sys.exit(3)
    if plan == "slow":
        time.sleep(4)
    if plan == "sleeps":
        time.sleep(600)
    if job.source.name == "b":
        (folder / f"done {state.process_index}").touch()
    return Written(job.target, (1, 1), 1)

try:
    outcome = run([Job(folder / name, folder / name) for name in "ab"], work, state, peers)
    print("written:", len(outcome.written), flush=True)
    with peers.waiting(lambda: "All work is done."):
        state.wait_for_everyone()
finally:
    peers.leave()
"""


def start(rank: int, command: list[str], port: int, patience: float, **more: str) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "FEWSTEP_SR_PATIENCE": str(patience), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def share(tmp_path, port):
    (tmp_path / "share.py").write_text(SHARE)
    processes = []

    def begin(*plans: str, patience: float = 2) -> list[subprocess.Popen]:
        processes.extend(start(rank, [str(tmp_path / "share.py"), str(tmp_path), *plans], port, patience) for rank in range(2))
        return processes

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["upscale", "train"])
def test_a_process_that_never_joins_is_not_waited_for(tmp_path, port, rank, command):
    words = {
        "upscale": ["upscale", str(ROOT / "miniature" / "photo.png"), "--demo", "-o", str(tmp_path / "out.png")],
        "train": [
            "train",
            "osediff",
            "--base",
            str(ROOT / "miniature"),
            "--data",
            str(ROOT / "miniature" / "photo.png"),
            "-o",
            str(tmp_path / "run"),
        ],
    }[command]
    more = ["--steps", "1", "--patch", "64", "--vsd-weight", "0", "--lpips-weight", "0"] if command == "train" else []
    process = start(rank, ["-m", "pipelines", *words, *more], port, patience=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "processes: 2 were started, but not all have joined within 2 seconds" in errors
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rank, plan, what",
    [(1, "dies", "lost another"), (0, "dies", "process 0|lost another"), (1, "stops", "process 1 has given no sign of life for 2 seconds"), (1, "fails", "process 1 has ended|lost another")],
)  # fmt: skip
def test_one_that_is_gone_is_reported_with_what_the_others_did(share, rank, plan, what):
    plans = ["works", "works"]
    plans[rank] = plan
    waits = share(*plans)[1 - rank]
    _, errors = waits.communicate(timeout=90)
    assert waits.returncode == 1
    assert re.search(what, errors), errors
    assert "It has written 2 of its 2 images. The same command goes on" in errors


def test_a_share_may_take_longer_than_the_patience(share):
    processes = share("works", "slow")
    for process in processes:
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0 and "written: 4" in output, errors


def test_one_that_is_told_to_end_reports_even_while_it_waits(tmp_path, share):
    """As a launcher does with the others when one has failed."""
    waits, _ = share("works", "sleeps", patience=60)
    end = time.monotonic() + 90
    while not (tmp_path / "done 0").exists() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(3)  # until it waits for the other
    waits.terminate()
    _, errors = waits.communicate(timeout=30)
    assert waits.returncode == 128 + signal.SIGTERM
    assert "was told to end" in errors and "It has written 2 of its 2 images" in errors
