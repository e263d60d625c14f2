"""Weight files are written whole or not at all, beside others that write the same."""

import os
import signal
import threading

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from fewstep_sr.weights import save
from fewstep_sr.weights.save import save_safetensors

TENSORS = {"a": torch.arange(50_000.0)}


def test_folders_are_made_and_permissions_are_the_users(tmp_path):
    path = tmp_path / "new" / "folder" / ("w" * 243 + ".safetensors")
    save_safetensors(TENSORS, path, {"family": "x"})
    assert torch.equal(load_file(path)["a"], TENSORS["a"]) and os.listdir(path.parent) == [path.name]
    (tmp_path / "plain").write_text("x")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        save_safetensors(TENSORS, tmp_path / "w.safetensors", {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="a file is where a folder is needed"):
        save_safetensors(TENSORS, tmp_path / "file" / "w.safetensors", {})
    with pytest.raises(ValueError, match="bytes long, but its folder takes"):
        save_safetensors(TENSORS, tmp_path / ("w" * 260 + ".safetensors"), {})


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on files here")
def test_a_disk_that_ends_keeps_the_old_file(tmp_path):
    import resource

    (tmp_path / "w.safetensors").write_text("old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w.safetensors cannot be written|File too large"):
            save_safetensors(TENSORS, tmp_path / "w.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["w.safetensors"] and (tmp_path / "w.safetensors").read_text() == "old"


def test_two_writers_share_no_temporary_file(tmp_path, monkeypatch):
    real, names = safetensors.torch.save_file, []
    both = threading.Barrier(2, timeout=30)

    def write(tensors, name, metadata):
        names.append(name)
        both.wait()  # both have their name, neither has written
        real(tensors, name, metadata)

    monkeypatch.setattr(save.safetensors.torch, "save_file", write)
    failures = []

    def run():
        try:
            save_safetensors(TENSORS, tmp_path / "w.safetensors", {})
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures and len(set(names)) == 2 and os.listdir(tmp_path) == ["w.safetensors"]
