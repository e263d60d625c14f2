"""Files of ``torch.save`` that hang a reader, take its memory, or make it raise what no one expects.

What may hang or take memory runs in a process of its own, with a limit on both.
"""

import io
import pickle
import struct
import zipfile

import limits
import pytest
import torch
from broken_files import STATE, refused, save, save_pickle

from fewstep_sr.weights.read import read_weights


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_right_is_read(tmp_path, legacy):
    content = {"state_dict": STATE, "optimizer": {"state": {0: {"step": torch.tensor(3), "exp_avg": STATE["b.weight"]}}}, "epoch": 2, "names": ["a"]}
    state, metadata = read_weights(save(tmp_path / "a.pth", content, legacy))
    assert metadata == {} and torch.equal(state["state_dict"]["a.weight"], STATE["a.weight"])
    assert state["optimizer"]["state"][0]["step"] == 3 and state["names"] == ["a"]


def test_other_tensors_that_are_right(tmp_path):
    """Views of one storage, parameters, halves, transposed and empty ones, and integers: all are in published files."""
    whole = torch.arange(12.0)
    content = {
        "first": whole[:6].view(2, 3),
        "second": whole[6:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 4),
        "index": torch.arange(5),
        "scalar": torch.tensor(2.0),
        "position_ids": torch.arange(7).expand(1, -1),
    }
    for legacy in (False, True):
        state, _ = read_weights(save(tmp_path / "a.pth", content, legacy))
        assert all(torch.equal(state[key], value) for key, value in content.items())
    tied = {"embedding": whole, "head": whole, "copy": {"embedding": whole}}
    assert read_weights(save(tmp_path / "a.pth", tied))[0]["copy"]["embedding"].shape == (12,)


@limits.forks
@pytest.mark.parametrize("key", ["x", "model", "state_dict", "params"])
def test_dictionary_that_holds_itself(tmp_path, key):
    content: dict = {}
    content[key] = content
    refused(save_pickle(tmp_path / "a.pth", pickle.dumps(content, 2)), "a dictionary that holds itself")


@pytest.mark.slow
@limits.forks
def test_dictionaries_without_end(tmp_path):
    """Not a cycle, but as good as one: 40 levels of two, and many levels of one."""
    twice: object = {}
    for _ in range(30):
        twice = {"a": twice, "b": twice}
    refused(save_pickle(tmp_path / "a.pth", pickle.dumps({"x": twice}, 2)), "a dictionary that holds itself")
    lists = b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * 5000 + b"a" * 4999 + b"s."
    refused(save_pickle(tmp_path / "b.pth", lists), "a dictionary that holds itself")


@limits.forks
def test_tuples_without_end(tmp_path):
    """Python hashes them by recursion, which ends the process."""
    refused(save_pickle(tmp_path / "a.pth", b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s."), "tuples in tuples without end")


@limits.forks
@pytest.mark.parametrize("shape", [(10**9, 4), (10**5, 10**5), (2**40,)])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensor_larger_than_its_storage(tmp_path, shape, legacy):
    path = save(tmp_path / "a.pth", STATE | {"c.weight": torch.zeros(1).expand(shape)}, legacy)
    refused(path, "c.weight claims the shape")


@limits.forks
@pytest.mark.parametrize("legacy", [False, True])
def test_storage_larger_than_the_file(tmp_path, legacy):
    """The number of a storage's elements, made 2**28 - 1 in the pickle."""
    path = save(tmp_path / "a.pth", {"x": torch.zeros(77)}, legacy)
    if legacy:
        path.write_bytes(path.read_bytes().replace(b"KM", b"J\xff\xff\xff\x0f"))
        refused(path, "its tensors claim 1,073,741,820 bytes")
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        assert entries["data.pkl"].count(b"KM") == 2
        data = entries.pop("data.pkl").replace(b"KM", b"J\xff\xff\xff\x0f")
        refused(save_pickle(path, data, entries), "for which the archive has no entry of that size")


def test_storage_of_another_size_than_its_entry(tmp_path):
    """PyTorch maps what lies behind a short entry into its tensor, without a word."""
    path = save(tmp_path / "a.pth", {"x": torch.zeros(77), "y": torch.ones(50)})
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    entries["data/0"] = entries["data/0"][:-4]
    with pytest.raises(ValueError, match="claims 308 bytes, for which the archive has no entry of that size"):
        read_weights(save_pickle(path, entries.pop("data.pkl"), entries))


def test_storages_that_are_never_filled(tmp_path):
    """An older file whose last pickle names no storages: its tensors would be whatever memory held."""
    data = save(tmp_path / "a.pth", {"x": torch.ones(8)}, legacy=True).read_bytes()
    at = data.rfind(b"\x80\x02]")
    (tmp_path / "a.pth").write_bytes(data[:at] + b"\x80\x02]." + data[data.index(b".", at) + 1 :])
    with pytest.raises(ValueError, match="it names 0 storages, but its tensors have 1"):
        read_weights(tmp_path / "a.pth")


@limits.forks
def test_zip_bomb(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data.pkl", bytes(256 << 20))
    assert path.stat().st_size < 2 << 20
    refused(path, "its entries are compressed")


@limits.forks
def test_directory_of_an_archive_is_bounded(tmp_path):
    """A directory takes eight times its size in Python, before anything of it can be looked at."""
    path = tmp_path / "a.pth"
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 600_000
    path.write_bytes(b"PK\x03\x04" + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 4, 0))
    refused(path, "claims 27,600,000 bytes, expected at most 16,777,216")


def test_archives_of_other_kinds(tmp_path):
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    (tmp_path / "script.pt").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"script\.pt: this is a TorchScript archive"):
        read_weights(tmp_path / "script.pt")
    save_pickle(tmp_path / "a.pth", b"\x80\x02}.", {"DATA.PKL": b"\x80\x02}."})
    with pytest.raises(ValueError, match="overlap or have the same name"):
        read_weights(tmp_path / "a.pth")


MEMORY_CALLS = {
    "bytearray": b"c__builtin__\nbytearray\n",
    "tensor": b"ctorch\nFloatTensor\n",
    "plain tensor": b"ctorch\nTensor\n",
    "bytes": b"c_codecs\nencode\n",
}


@limits.forks
@pytest.mark.parametrize("call", MEMORY_CALLS)
def test_call_that_takes_memory(tmp_path, call):
    """PyTorch's reader calls these with any argument."""
    data = b"\x80\x02}X\x01\x00\x00\x00x" + MEMORY_CALLS[call] + b"\x8a\x05" + struct.pack("<Q", 3 << 30)[:5] + b"\x85Rs."
    refused(save_pickle(tmp_path / "a.pth", data), "found bytes" if "byte" in call else "found tensors in a form that torch.save does not write")


@limits.forks
@pytest.mark.parametrize("length", [10_000, 1_000_000])
def test_names_and_texts_that_are_called(tmp_path, length):
    """PyTorch quotes them in its message, which it then searches in quadratic time: minutes for a name of 100 kB."""
    refused(save_pickle(tmp_path / "a.pth", b"\x80\x02c" + b"a" * length + b"\nb\n)R."), "the pickle holds Python objects")
    text = b"\x80\x02X" + struct.pack("<L", length) + b"a" * length + b"q\x000h\x00"
    for call in (b")R.", b")\x81."):
        refused(save_pickle(tmp_path / "b.pth", text + call), "calls something that is no function")


@limits.forks
def test_pickle_of_too_many_steps(tmp_path):
    refused(save_pickle(tmp_path / "a.pth", b"\x80\x02" + b"]" * 3_000_000 + b"."), "more than 500,000 steps")
    refused(save_pickle(tmp_path / "b.pth", b"\x80\x02X" + struct.pack("<L", 20 << 20) + bytes(20 << 20) + b"."), "a part that is not numbers claims")


SPECIAL = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse ": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "without numbers (on the device 'meta')": lambda: torch.zeros(3, device="meta"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path, kind, legacy):
    path = save(tmp_path / "a.pth", STATE | {"c.weight": SPECIAL[kind]()}, legacy)
    with pytest.raises(ValueError) as error:
        read_weights(path)
    assert str(error.value).startswith("a.pth: found ") and kind.strip() in str(error.value) and "expected dense" in str(error.value)


KEYS = {
    5: "the key 5",
    None: "a NoneType for a key",
    ("a", 1): "a tuple for a key",
    "\ud800": "'\\\\ud800'",
    "a\n": "'a\\\\n'",
}


@pytest.mark.parametrize("key", [*KEYS, "k" * 513], ids=repr)
@pytest.mark.parametrize("place", ["top", "inside"])
def test_keys_that_are_no_names(tmp_path, key, place):
    state = STATE | {key: torch.zeros(2)}
    with pytest.raises(ValueError, match=r"^a\.pth: found .*expected text of at most 512 printable characters") as error:
        read_weights(save(tmp_path / "a.pth", state if place == "top" else {"state_dict": state}))
    assert KEYS.get(key, "the key 'kkkk").replace("\\\\", "\\") in str(error.value) and len(str(error.value)) < 300


PICKLES = {
    "text cut": b"\x80\x02X\x00",
    "number cut": b"\x80\x02J\x00",
    "no such memo": b"\x80\x02h\x05.",
    "nothing to pop": b"\x80\x02s.",
    "no mark": b"\x80\x02u.",
    "text that is no text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "class name that is no text": b"\x80\x02c\xff\xfe\nx\n.",
    "a list for a key": b"\x80\x02}]K\x01s.",
    "calling a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a storage by no name": b"\x80\x02)Q.",
    "a storage of one part": b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",
    "wrong arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01\x85R.",
    "a state for a dictionary": b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",
    "a dictionary from a number": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "attributes": b"\x80\x02ctorch.nn.parameter\nParameter\n)R}b.",
    "an unknown step": b"\x80\x02\xff.",
    "another protocol": b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00N.",
    "nothing": b"",
    "a number of 5000 digits": b"\x80\x02I" + b"9" * 5000 + b"\n.",
    "a size that is none": b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00x\x85R.",
}


@pytest.mark.parametrize("what", PICKLES)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.filterwarnings("ignore")
def test_every_failure_is_the_one_sentence(tmp_path, what, form):
    path = tmp_path / "a.pth"
    if form == "zip":
        save_pickle(path, PICKLES[what])
    elif form == "legacy":
        save(path, STATE, legacy=True)
        whole = path.read_bytes()
        start = whole.index(b".", whole.index(b"type_sizes")) + 1
        path.write_bytes(whole[:start] + PICKLES[what] + (whole[start:] if PICKLES[what] else b""))
    else:
        path.write_bytes(b"\x80\x02" + PICKLES[what][2:])
    with pytest.raises(ValueError, match=r"^a\.pth: ") as error:
        read_weights(path)
    assert type(error.value) is ValueError and len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_plain_pickle_is_not_said_to_hold_code(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match=r"a\.pkl: this pickle was not written by torch\.save"):
        read_weights(tmp_path / "a.pkl")
