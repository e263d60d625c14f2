"""Weights read in processes that are forked after their parent has computed on several threads, as servers and loaders of data do."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from fewstep_sr.weights import forked

READ = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {support!r}]
from pathlib import Path
import torch
import toys
from fewstep_sr.methods import INVSR, METHODS, load_weights
from pipelines.files import convert, describe_file

folder = Path({folder!r})
torch.save(toys.predictor_state_dict(3), folder / "predictor.pth")
torch.save(toys.osediff_checkpoint(3, 64), folder / "osediff.pkl")
works = {{
    "predictor": lambda: load_weights(INVSR, folder / "predictor.pth"),
    "adapter": lambda: load_weights(METHODS["osediff"], folder / "osediff.pkl"),
    "info": lambda: describe_file(folder / "predictor.pth"),
    "convert": lambda: convert(folder / "predictor.pth", folder / "out.safetensors"),
    "threads after": lambda: load_weights(INVSR, folder / "predictor.pth") and torch.get_num_threads() == 2 or os._exit(3),
}}
torch.set_num_threads(2)
torch.randn(1 << 20).amin()  # on both
for name, work in works.items():
    child = os.fork()
    if not child:
        signal.alarm(30)
        work()
        os._exit(0)
    print(name, os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_weights_are_read_after_a_fork(tmp_path):
    script = READ.format(root=str(ROOT), support=str(ROOT / "tests" / "support"), folder=str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert found.stdout.split("\n")[:-1] == [f"{name} 0" for name in ("predictor", "adapter", "info", "convert", "threads after")], found.stderr[
        -2000:
    ]


def test_nothing_changes_where_nothing_was_forked(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", None)
    with forked.safe_after_fork():
        pass
