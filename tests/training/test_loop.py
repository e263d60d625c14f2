"""The training loop itself, on a task of one number: what it waits for, how it seeds, what it does with losses that are no numbers, and after a kill."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

from accelerate.state import AcceleratorState
from forked import Forked
from mean_task import Mean

from pipelines.training import loop
from pipelines.training.data import TrainingPictures, load_batches
from pipelines.training.loop import draw_seed, train
from pipelines.training.options import LoopOptions

SEEDS = (7896617691693857887, 8216639538911712585)

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::item"}
"""What item(), float(), bool() and tolist() come down to: on a GPU they wait for all that was asked of it."""


class Waits(TorchDispatchMode):
    """Counts the reads of tensors' values."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().split(".")[0]
        self.count += name in READS
        return function(*arguments, **(options or {}))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (16, 16), (90, 120, 40)).save(tmp_path / "photo.png")
    return TrainingPictures([tmp_path / "photo.png"], 16, 0)


def options(tmp_path, steps, **more) -> LoopOptions:
    return LoopOptions(tmp_path / "run", steps, **{"batch": 1, "lr": 0.01, "save_every": 1000, "sample_every": 1000} | more)


def test_a_batch_that_is_not_logged_waits_for_nothing(tmp_path, pictures):
    """Between the begins of two batches no tensor is read, unless figures were logged in between; with clipping, averages and added-up gradients."""
    with Waits() as waits:
        task = Mean(waits=waits)
        train(task, pictures, options(tmp_path, 8, log_every=4, accumulate=2, ema=0.9, warmup=2, cosine=True))
    between = [after - before for before, after in zip(task.counts, task.counts[1:], strict=False)]
    logged = 7  # the batch that ends step 4
    assert between[logged] > 0, "this test sees reads"
    assert [count for i, count in enumerate(between) if i != logged] == [0] * 14


def test_figures_are_means_over_the_steps(tmp_path, pictures):
    history = train(Mean(losses=[1.0, 3.0, 5.0, 7.0]), pictures, options(tmp_path, 2, lr=0.0, log_every=2, accumulate=2))
    once = train(Mean(), pictures, LoopOptions(tmp_path / "once", 1, batch=1, lr=0.0, log_every=1))
    assert history[0]["step"] == 2 and history[0]["mean"] == pytest.approx(4 * once[0]["mean"])
    assert history[0]["mean/half"] == pytest.approx(2 * once[0]["mean"])
    assert history[0]["mean/gradient"] == pytest.approx(4 * once[0]["mean/gradient"])  # norms of (1 + 3) / 2 and (5 + 7) / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every, save_every", [(1000, 6), (5, 1000)])
def test_a_loss_that_is_no_number_is_named_with_its_step(tmp_path, pictures, value, log_every, save_every):
    """Found when figures are logged or before a checkpoint is written, with the step at which it began; the checkpoint before stays."""
    train(Mean(), pictures, options(tmp_path, 2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()}
    AcceleratorState._reset_state()
    task = Mean(losses=[1.0, value, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(RuntimeError, match=f"mean: the loss is {value} at step 3. Lower lr or train in float32; the last checkpoint is whole."):
        train(task, pictures, options(tmp_path, 100, log_every=log_every, save_every=save_every, resume=True))
    assert not task.saved
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()} == before


def test_seeds_are_the_same_everywhere():
    """Fixed values: NumPy promises that SeedSequence does not change."""
    assert draw_seed(0, 0, 0) == SEEDS[0] and draw_seed(7, 123, 1) == SEEDS[1]
    seeds = {draw_seed(*numbers) for numbers in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (7, 123, 1))}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_draws_of_a_batch_are_seeded_with_its_number(tmp_path, pictures):
    task = Mean()
    train(task, pictures, options(tmp_path, 2, accumulate=2, seed=3))
    expected = [torch.rand((), generator=torch.Generator().manual_seed(draw_seed(3, number, 0))) for number in range(4)]
    assert torch.equal(torch.stack(task.draws), torch.stack(expected))
    assert task.steps == [0, 0, 1, 1]


def test_a_run_killed_before_its_result_was_written_writes_it(tmp_path, pictures, monkeypatch, caplog):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Mean, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train(Mean(), pictures, options(tmp_path, 3, save_every=3))
    monkeypatch.undo()
    AcceleratorState._reset_state()
    assert (tmp_path / "run" / "checkpoint").is_dir() and not (tmp_path / "run" / "result.txt").exists()
    task = Mean()
    train(task, pictures, options(tmp_path, 3, resume=True))
    uncut = Mean()
    train(uncut, pictures, LoopOptions(tmp_path / "uncut", 3, batch=1, lr=0.01))
    assert (tmp_path / "run" / "result.txt").read_text() == (tmp_path / "uncut" / "result.txt").read_text()
    assert (tmp_path / "run" / "samples" / "0000003.png").is_file()
    assert "found all of 3 steps made" in caplog.text


def saved_step(tmp_path) -> int:
    return json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())["step"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA out of memory"), ValueError("data: there is no other picture")])
@pytest.mark.parametrize("where", ["loss", "data"])
def test_what_dies_in_the_middle_saves_first(tmp_path, pictures, monkeypatch, caplog, error, where):
    """In the forward pass, or where a batch is read: the steps that are made are saved, and a resumed run is the uncut one."""
    calls = []

    def dies(real):
        def call(*arguments):
            calls.append(1)
            if len(calls) == 6 + (where == "data"):  # one sample is drawn for the example
                raise error
            return real(*arguments)

        return call

    kind, name = (Mean, "loss") if where == "loss" else (type(pictures), "__getitem__")
    monkeypatch.setattr(kind, name, dies(getattr(kind, name)))
    with pytest.raises(type(error)):
        train(Mean(), pictures, options(tmp_path, 9, save_every=1000))
    monkeypatch.undo()
    AcceleratorState._reset_state()
    made = 5 if where == "loss" else 4  # the sixth batch is read before the fifth is learned from
    assert saved_step(tmp_path) == made and f"after step {made}, which is saved" in caplog.text
    train(Mean(), pictures, options(tmp_path, 9, resume=True))
    train(Mean(), pictures, LoopOptions(tmp_path / "uncut", 9, batch=1, lr=0.01))
    assert (tmp_path / "run" / "result.txt").read_text() == (tmp_path / "uncut" / "result.txt").read_text()


def test_what_dies_within_an_update_keeps_the_checkpoint_before(tmp_path, pictures, monkeypatch):
    """Where weights are half updated, or a disk takes nothing, the last checkpoint stays and the error is the first one."""
    calls, real = [], torch.optim.Optimizer.zero_grad

    def dies(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", dies)
    with pytest.raises(KeyboardInterrupt):
        train(Mean(), pictures, options(tmp_path, 9, save_every=4))
    assert saved_step(tmp_path) == 4


def test_an_error_is_not_hidden_by_a_disk_that_takes_nothing(tmp_path, pictures, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.training.loop.save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(Mean(), pictures, options(tmp_path, 9, save_every=2))
    assert "could not be saved (" in caplog.text and "No space left" in caplog.text


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def cut(tmp_path, pictures):
    """A run of one step, with an average; returns its checkpoint."""
    train(Mean(), pictures, options(tmp_path, 1, ema=0.9))
    AcceleratorState._reset_state()
    return tmp_path / "run" / "checkpoint"


FILES = ["optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "custom_checkpoint_2.pkl", "random_states_0.pkl"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_resuming_runs_no_file(tmp_path, pictures, cut, name, zipped):
    marker = tmp_path / "ran"
    if zipped:
        torch.save({"step": Code(marker)}, cut / name)
    else:
        (cut / name).write_bytes(pickle.dumps(Code(marker), 2))
    with pytest.raises(ValueError, match=rf"checkpoint: found a Python object \(\w+\.mkdir\) that could run code in .*{name}, expected tensors"):
        train(Mean(), pictures, options(tmp_path, 2, ema=0.9, resume=True))
    assert not marker.exists()


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no state at all", None])
def test_a_damaged_checkpoint_is_named(tmp_path, pictures, cut, name, damage):
    path = cut / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    found = "random states of 0 processes" if name.startswith("random") and not damage else name
    before = {file.name: file.read_bytes() for file in cut.iterdir()}
    with pytest.raises(ValueError, match=f"checkpoint: .*{found}"):
        train(Mean(), pictures, options(tmp_path, 2, ema=0.9, resume=True))
    assert {file.name: file.read_bytes() for file in cut.iterdir()} == before  # and no half of it is saved in its place


def test_states_of_something_else_are_named(tmp_path, pictures, cut):
    for name in FILES:
        whole = (cut / name).read_bytes()
        torch.save({"other": 1}, cut / name)
        with pytest.raises(ValueError, match=f"checkpoint: .*{name}"):
            train(Mean(), pictures, options(tmp_path, 2, ema=0.9, resume=True))
        AcceleratorState._reset_state()
        (cut / name).write_bytes(whole)


def test_resume_brings_back_the_random_states(tmp_path, pictures, cut, monkeypatch):
    """Before a loader draws its own seed from them."""
    expected, found = torch.load(cut / "random_states_0.pkl", weights_only=False), []

    def load(*arguments):
        found.extend((torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))
        return load_batches(*arguments)

    monkeypatch.setattr(loop, "load_batches", load)
    train(Mean(), pictures, options(tmp_path, 2, ema=0.9, resume=True))
    assert torch.equal(found[0], expected["torch_manual_seed"])
    assert (found[1] == expected["numpy_random_seed"][1]).all() and found[2] == expected["random_state"]


@pytest.mark.slow
def test_processes_find_a_bad_loss_together(tmp_path):
    """Only the second process's loss is bad: both end, with its step and value."""
    Image.new("RGB", (16, 16), "gray").save(tmp_path / "photo.png")

    def work() -> None:
        rank = os.environ["RANK"]
        task = Mean(losses=[1.0, float("inf") if rank == "1" else 1.0, 1.0, 1.0, 1.0])
        try:
            train(task, TrainingPictures([tmp_path / "photo.png"], 16, 0), options(tmp_path, 5, lr=0.0, save_every=3))
        except RuntimeError as error:
            (tmp_path / f"error{rank}").write_text(str(error))

    processes = Forked.together(work, 2, tmp_path)
    assert [process.wait() for process in processes] == [0, 0], processes[0].text
    for rank in (0, 1):
        assert (tmp_path / f"error{rank}").is_file()
        assert "the loss is inf at step 1" in (tmp_path / f"error{rank}").read_text()
    assert not (tmp_path / "run" / "checkpoint").exists()
