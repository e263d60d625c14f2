"""The one reader of weight files: what is no file, what is cut off, and safetensors that are not what they claim."""

import json
import os

import limits
import pytest
import safetensors.torch
import torch
from broken_files import STATE, refused, save, save_header

from fewstep_sr.weights.read import read_weights


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_every_cut_is_the_one_sentence(tmp_path, form):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        save(path, STATE, legacy=form == "legacy")
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^a\.(pth|safetensors): "):
            read_weights(path)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "unknown type": {"a": entry("Q4")},
    "a type that is a number": {"a": entry(5)},
    "negative shape": {"a": entry(shape=[-1])},
    "shape beyond 64 bits": {"a": entry(shape=[2**40, 2**40])},
    "shape that is text": {"a": entry(shape="x")},
    "offsets backwards": {"a": entry(offsets=[4, 0])},
    "negative offsets": {"a": entry(offsets=[-4, 0])},
    "offsets beyond the file": {"a": entry(shape=[10**9], offsets=[0, 4 * 10**9])},
    "overlapping": {"a": entry(), "b": entry()},
    "a hole": {"a": entry(offsets=[0, 4]), "b": entry(offsets=[8, 12])},
    "metadata that is no text": {"__metadata__": {"a": 5}, "b": entry()},
    "no entry": {"a": 5},
    "no fields": {"a": {}},
    "a list": [],
    "half a surrogate pair": {"\ud800": entry()},
    "a name that is no name": {"\x1b[31m": entry()},
    "a name without end": {"k" * 5000: entry()},
}


@limits.forks
@pytest.mark.parametrize("what", HEADERS)
def test_safetensors_header(tmp_path, what):
    header = json.dumps(HEADERS[what])
    header = header if header.startswith("{") else '{"a":' + header + "}"
    refused(save_header(tmp_path / "a.safetensors", header, bytes(12 if what == "a hole" else 4)), "")


@pytest.mark.slow
@limits.forks
def test_safetensors_header_without_end(tmp_path):
    path = save_header(tmp_path / "a.safetensors", '{"a":1}' + " " * (20 << 20))
    refused(path, "the safetensors header claims 20,971,527 bytes, expected at most 16,777,216")
    for stated in (2**64 - 1, 2**63, 2**40, 0, 3):
        refused(save_header(path, '{"a":1}', stated=stated), "")
    many = {f"e{i}": entry(shape=[0], offsets=[0, 0]) for i in range(60_000)}
    refused(save_header(path, json.dumps(many)), "found 60,000 tensors, expected at most 20,000")


def test_safetensors_that_are_right(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0), "small": torch.ones(3).to(torch.float8_e4m3fn), "index": torch.arange(3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "ä"})
    state, metadata = read_weights(tmp_path / "a.safetensors")
    assert metadata["note"] == "ä" and {key: value.dtype for key, value in state.items()} == {key: value.dtype for key, value in tensors.items()}


@limits.forks
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "this is a pipe, a socket or a device")
    text, _ = limits.outcome(lambda: read_weights("/dev/zero"))
    assert text == "ValueError: zero: this is a pipe, a socket or a device, expected a weight file."
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=r"folder\.pth: this is a folder"):
        read_weights(tmp_path / "folder.pth")
    (tmp_path / "circle.pth").symlink_to(tmp_path / "circle.pth")
    with pytest.raises(ValueError, match=r"circle\.pth: it cannot be read \(a symbolic link that leads back to itself\)"):
        read_weights(tmp_path / "circle.pth")
    (tmp_path / "nowhere.pth").symlink_to(tmp_path / "missing")
    for path in (tmp_path / "nowhere.pth", tmp_path / "missing.pth", tmp_path / "missing" / "a.pth", save(tmp_path / "a.pth", STATE) / "b.pth"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: there is no such file"):
            read_weights(path)
    for name in ("a\0b.pth", "a" * 300 + ".pth"):
        with pytest.raises(ValueError, match="no file can have this name|cannot be read"):
            read_weights(tmp_path / name)


@limits.forks
def test_file_that_may_not_be_read(tmp_path):
    path = save(tmp_path / "a.pth", STATE)
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o111)

    def read():
        os.seteuid(65534) if os.geteuid() == 0 else None
        return read_weights(path)

    text, _ = limits.outcome(read)
    assert text.startswith("ValueError: ") and "a.pth: it cannot be read (no permission)" in text
