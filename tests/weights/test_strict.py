"""Tensors that a network will use, and networks built from what a file says of itself."""

import limits
import pytest
import torch

from fewstep_sr.networks.indices import dimension, layer_count, layer_counts
from fewstep_sr.networks.noise_predictor import NoisePredictorConfig
from fewstep_sr.networks.ram import TaggerConfig
from fewstep_sr.networks.swin import SwinConfig
from fewstep_sr.weights.strict import own_copies, printable, require_weights

UNFIT = {
    "NaN": (torch.tensor([1.0, float("nan")]), r"file: a\.weight holds values that are not finite"),
    "infinity": (torch.tensor([[1.0], [float("inf")]]), r"file: a\.weight holds values that are not finite"),
    "minus infinity in half precision": (torch.tensor([-1e9]).half(), r"file: a\.weight holds values that are not finite"),
    "NaN in bfloat16": (torch.tensor(float("nan")).bfloat16(), r"file: a\.weight holds values that are not finite"),
    "NaN in 8 bits": (torch.tensor([[1.0], [float("nan")]]).to(torch.float8_e4m3fn), r"file: a\.weight holds values that are not finite"),
    "integers": (torch.arange(3), r"file: a\.weight is of int64, expected floating-point numbers"),
    "booleans": (torch.ones(3, dtype=torch.bool), r"file: a\.weight is of bool, expected floating-point numbers"),
    "complex": (torch.ones(3, dtype=torch.complex64), r"file: a\.weight is of complex64, expected floating-point numbers"),
    "nothing": (torch.zeros(0, 4), r"file: a\.weight has the shape \(0, 4\), which holds no numbers"),
    "text": ("text", r"file: a\.weight is 'text', expected a tensor"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_tensors_that_are_no_weights(what):
    tensor, message = UNFIT[what]
    with pytest.raises(ValueError, match=message):
        own_copies({"b.weight": torch.ones(2), "a.weight": tensor}, "file")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(), (3,), (5, 4), (2, 3, 1, 1)])
def test_tensors_that_are_weights(dtype, shape):
    tensor = torch.full(shape, 1.5).to(getattr(torch, dtype)).requires_grad_()
    copy = own_copies({"a": tensor}, "file")["a"]
    assert torch.equal(copy.float(), tensor.detach().float()) and copy.dtype == tensor.dtype
    assert copy.data_ptr() != tensor.data_ptr() and not copy.requires_grad
    require_weights(torch.full((300, 70_000), 0.5).to(torch.float8_e5m2), "in parts")


@limits.forks
def test_tensors_that_share_a_storage():
    """A thousand views of a megabyte would be a gigabyte of copies; what is tied within what is stored is copied."""
    stored = torch.ones(1 << 18)
    views = {f"{i}": stored[: (1 << 18) - i] for i in range(1000)}
    text, grown = limits.outcome(lambda: own_copies(views, "file"))
    assert text.startswith("ValueError: file: the tensors claim 1,046,577,998"[:40]) and "but share 1,048,576 stored ones" in text
    assert grown < 64 << 20
    halves = own_copies({"a": stored[: 1 << 17], "b": stored[1 << 17 :]}, "file")
    assert sum(half.numel() for half in halves.values()) == stored.numel()


def test_names_in_messages():
    assert printable("läyer.weight") == "läyer.weight" and printable("a\n\x1b[31m") == "a\\n\\x1b[31m"
    assert printable("\ud800") == "\\ud800" and len(printable("k" * 10**6)) == 200


PATTERN = r"blocks\.(\w+)\.layers\.(\w+)"


def test_layers_are_counted():
    keys = [f"blocks.{i}.layers.{j}" for i, layers in enumerate((2, 12, 1)) for j in reversed(range(layers))]
    assert layer_counts([*keys, "other.5"], PATTERN, "it") == (2, 12, 1)
    assert layer_count(keys, r"blocks\.1\.layers\.(\w+)", "it") == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("blocks.1.layers.0", None),
        ("blocks.0.layers.1000000000", r"it: the layers of block 0 are numbered 0, 1000000000; expected 0 to n - 1, with n at most 64"),
        ("blocks.0.layers.2", "the layers of block 0 are numbered 0, 2;"),
        ("blocks.1000000000.layers.0", "its blocks are numbered 0, 1000000000;"),
        ("blocks.0.layers." + "9" * 5000, "the layers of block 0 are numbered 0, 99999999999999999999;"),
        ("blocks.0.layers.01", "the layers of block 0 are numbered 0, 01;"),
        ("blocks.0.layers.²", "the layers of block 0 are numbered 0, ²;"),
        ("blocks.0.layers.٣", "the layers of block 0 are numbered 0, ٣;"),
        ("blocks.0.layers.x", "the layers of block 0 are numbered 0, x;"),
    ],
)
def test_layers_that_are_no_count(wrong, message):
    keys = ["blocks.0.layers.0", wrong]
    if message is None:
        assert layer_counts(keys, PATTERN, "it") == (1, 1)
        return
    with pytest.raises(ValueError, match=message):
        layer_counts(keys, PATTERN, "it")


def test_layers_without_end():
    with pytest.raises(ValueError, match="it has 120 layers, expected at most 64"):
        layer_counts([f"blocks.{i}.layers.{j}" for i in range(2) for j in range(60)], PATTERN, "it")
    with pytest.raises(ValueError, match="expected 0 to n - 1, with n at most 64"):
        layer_count([f"layers.{i}" for i in range(65)], r"layers\.(\w+)", "it")
    with pytest.raises(ValueError, match="its blocks are numbered not at all"):
        layer_counts(["x"], PATTERN, "it")


def test_dimension():
    state = {"a": torch.zeros(3, 4), "b": torch.tensor(1.0), "c": torch.zeros(3, 0)}
    assert dimension(state, "a", 1, ndim=2) == 4
    for key, message in (("a", r"a has shape \(3, 4\), expected 4 axes"), ("b", r"b has shape \(\)"), ("d", "the tensor 'd' is missing")):
        with pytest.raises(ValueError, match=message):
            dimension(state, key, 0, ndim=4)
    with pytest.raises(ValueError, match=r"c has shape \(3, 0\)"):
        dimension(state, "c", 0, ndim=2)


def test_configs_name_what_is_missing():
    for config in (NoisePredictorConfig, TaggerConfig):
        with pytest.raises(ValueError, match="are numbered not at all"):
            config.from_state_dict({})
    with pytest.raises(ValueError, match="at most 8 stages"):
        keys = {f"layers.{i}.blocks.0.norm1.weight": torch.zeros(2) for i in range(9)}
        tables = {f"layers.{i}.blocks.0.attn.relative_position_bias_table": torch.zeros(1, 1) for i in range(9)}
        SwinConfig.from_state_dict(keys | tables | {"patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)}, "")
