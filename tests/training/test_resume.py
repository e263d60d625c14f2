"""Going on from a checkpoint: other settings, damage, kills at chosen places; and what the parser refuses."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

pytest.importorskip("diffusers")

from accelerate.state import AcceleratorState
from forked import Forked
from mean_task import Mean

from pipelines.cli import main
from pipelines.training import checkpoints
from pipelines.training.checkpoints import find_checkpoints
from pipelines.training.data import TrainingPictures
from pipelines.training.loop import train
from pipelines.training.options import LoopOptions
from pipelines.training.records import fingerprint


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (16, 16), (90, 120, 40)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


class WithSettings(Mean):
    def __init__(self, **settings):
        super().__init__()
        self.own = settings

    def settings(self):
        return {"method": "mean", "rank": 4} | self.own


@pytest.fixture
def run(tmp_path, photo):
    """A function that trains, afresh or on: the task's settings, the pictures' and the loop's, apart from the usual ones."""

    def go(steps, own=None, patch=16, crops=None, **more):
        AcceleratorState._reset_state()
        task = WithSettings(**(own or {}))
        pictures = TrainingPictures([photo], patch, 0, more.get("seed", 0), crops=crops)
        settings = {"output": tmp_path / "run", "batch": 1, "lr": 0.01, "save_every": 2, "sample_every": 1000, "resume": True} | more
        train(task, pictures, LoopOptions(steps=steps, **settings))
        return task

    return go


def weight(folder) -> str:
    return (folder / "result.txt").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"own": {"rank": 8}}, "rank 4 (now 8)"),
        ({"own": {"method": "other", "timesteps": (250, 200)}}, "method mean (now other), timesteps none (now 250 200)"),
        ({"ema": 0.9}, "ema 0.0 (now 0.9)"),
        ({"batch": 2}, "batch 1 (now 2)"),
        ({"accumulate": 2}, "accumulate 1 (now 2)"),
        ({"seed": 3}, "seed 0 (now 3)"),
        ({"optimizer": "muon"}, "optimizer adamw (now muon)"),
        ({"patch": 8}, "patch 16 (now 8)"),
        ({"crops": 5}, "crops none (now 5)"),
    ],
)
def test_a_resume_with_other_settings_says_which(tmp_path, run, change, message):
    run(2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and "logs" not in path.parts}
    with pytest.raises(ValueError) as error:
        run(4, **change)
    assert f"was begun with {message}. Give the settings that it was begun with, or another --output" in str(error.value)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_settings_that_may_change_count_and_are_said(tmp_path, run, caplog):
    run(2, lr=0.5)
    first = float(weight(tmp_path / "run"))
    caplog.set_level(logging.WARNING)
    run(3, lr=0.0)
    assert "other settings than before: lr 0.5 (now 0.0)" in caplog.text
    assert float(weight(tmp_path / "run")) == first, "the present learning rate counts"
    caplog.clear()
    run(4, lr=0.0)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "run.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, run, caplog, name, damage):
    run(4)
    current, old = find_checkpoints(tmp_path / "run")
    assert [json.loads((folder / "run.json").read_text())["step"] for folder in (current, old)] == [4, 2]
    data = (current / name).read_bytes()
    middle = len(data) - 4 if name == "model.safetensors" else len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
    (current / name).write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flipped": flipped}[damage])
    run(6)
    text = caplog.text
    assert name in text and f"The run continues from the previous checkpoint, {old}." in text
    whole = run(6, output=tmp_path / "uncut", resume=False)
    assert whole.steps == [0, 1, 2, 3, 4, 5] and weight(tmp_path / "run") == weight(tmp_path / "uncut")


def test_where_no_checkpoint_is_whole_the_last_is_named(tmp_path, run):
    run(4)
    for folder in find_checkpoints(tmp_path / "run"):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint: .*run.checkpoint.model\.safetensors"):
        run(6)


def test_a_checkpoint_without_a_record_goes_on_and_says_so(tmp_path, run, caplog):
    """As an earlier version wrote it."""
    run(2)
    (tmp_path / "run" / "checkpoint" / "run.json").unlink()
    assert run(3).steps == [2]
    assert "is of an earlier version" in caplog.text


def test_a_resume_of_nothing_is_said(tmp_path, run, caplog):
    """It may be that the output is mistyped."""
    said = "found no checkpoint to continue from; the run begins with step 1"
    run(1, resume=False)
    run(2)
    assert said not in caplog.text
    run(1, output=tmp_path / "rnu")
    assert f"rnu: {said}" in caplog.text


def test_a_fingerprint_is_of_the_weights():
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(4, 4) for _ in range(2))
    assert fingerprint(first) == fingerprint(first) != fingerprint(second)
    assert fingerprint(first, second) != fingerprint(second, first)


def train_and_die(output, place: str) -> None:
    """Five steps, checkpoints after each two and the last; killed at ``place``."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def at(number, function):
        calls = []

        def call(*arguments):
            calls.append(1)
            return die() if len(calls) == number else function(*arguments)

        return call

    class Doomed(Mean):
        def begin_step(self, step):
            if place == f"step {step}":
                die()
            super().begin_step(step)

        def save(self, folder):
            if place == "before result":
                die()
            super().save(folder)
            if place == "after result":
                die()

    if place == "in checkpoint":
        checkpoints.write_record = at(2, checkpoints.write_record)
    if place.startswith("rename"):
        Path.rename = at(int(place.split()[1]), Path.rename)
    AcceleratorState._reset_state()
    options = LoopOptions(output, 5, batch=1, lr=0.01, save_every=2, ema=0.9, resume=True)
    train(Doomed(), TrainingPictures([output.parent / "photo.png"], 16, 0), options)


PLACES = ["step 1", "step 3", "before result", "after result", "in checkpoint", "rename 1", "rename 2", "rename 3"]
"""Before the first checkpoint and after it; around the result; while the second checkpoint is written, and on either side of its renaming."""


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_resumed_is_the_uncut_run(tmp_path, photo, place):
    assert Forked(lambda: train_and_die(tmp_path / "run", place), tmp_path / "log").wait() == -signal.SIGKILL
    again = Forked(lambda: train_and_die(tmp_path / "run", "nowhere"), tmp_path / "log")
    assert again.wait() == 0, again.text
    AcceleratorState._reset_state()
    task = Mean()
    options = LoopOptions(tmp_path / "uncut", 5, batch=1, lr=0.01, save_every=2, ema=0.9)
    train(task, TrainingPictures([photo], 16, 0), options)
    assert weight(tmp_path / "run") == weight(tmp_path / "uncut")
    assert (tmp_path / "run" / "samples" / "0000005.png").is_file()
    assert not list((tmp_path / "run").glob("*.part"))


BAD = {
    "--steps": ["0", "-1", "1.5", "nan", "99999999999999999999"],
    "--batch": ["0", "-4", "99999999"],
    "--patch": ["0", "-64", "999999"],
    "--crops": ["0", "-1"],
    "--lr": ["0", "-1e-4", "nan", "inf", "1e9"],
    "--matrix-lr": ["0", "nan"],
    "--warmup": ["-1", "x"],
    "--weight-decay": ["-0.1", "nan", "inf"],
    "--max-grad-norm": ["0", "-1", "nan"],
    "--ema": ["1", "1.5", "-0.1", "nan"],
    "--seed": ["-1", str(2**32)],
    "--accumulate": ["0", "-2"],
    "--workers": ["-1", "100000"],
    "--threads": ["0", "-1", "100000"],
    "--save-every": ["0", "-1"],
    "--sample-every": ["0", "-1"],
    "--max-minutes": ["-1", "nan"],
}
OSEDIFF = {"--rank": ["0", "-4", "99999"], "--timestep": ["-1", "1000"], "--guidance": ["nan", "inf"], "--vae-lr": ["-1", "nan"]}
OSEDIFF |= {f"--{name}-weight": ["-1", "nan", "inf"] for name in ("mse", "lpips", "vsd", "regulariser", "latent", "gradient", "structure")}
INVSR = {
    "--timesteps": ["0", "1001"],
    "--predictor-channels": ["0", "65"],
    "--predictor-layers": ["0"],
    "--predictor-time": ["0"],
    "--adversarial-from": ["-1"],
}
INVSR |= {f"--{name}-weight": ["-1", "nan", "inf"] for name in ("latent", "perceptual", "gaussian", "variance", "mse", "structure", "adversarial")}


@pytest.mark.parametrize("method, options", [("osediff", BAD | OSEDIFF), ("invsr", BAD | INVSR)])
def test_ranges_are_refused_at_once(tmp_path, capsys, method, options):
    for option, values in options.items():
        for value in values:
            words = [option, value, value] if option == "--predictor-time" else [f"{option}={value}"]  # "=" for values with a minus
            with pytest.raises(SystemExit) as exit:
                main(["train", method, "--data", "nowhere", "-o", str(tmp_path / "run"), "--steps", "1", *words])
            error = capsys.readouterr().err
            assert exit.value.code == 2 and f"argument {option}" in error and f"found '{value}', expected" in error, (option, value)
    assert not (tmp_path / "run").exists()


def test_ends_of_the_ranges_are_taken():
    from pipelines.cli import make_parser

    def parse(argv):
        return make_parser(argv).parse_args(argv)

    words = "--steps 1 --batch 1 --patch 64 --crops 1 --lr 10 --warmup 0 --weight-decay 0 --max-grad-norm inf --ema 0 --seed 4294967295 --workers 0"
    words += " --threads 1 --save-every 1 --sample-every 1 --max-minutes 0 --accumulate 1"
    for method, more in (("osediff", "--rank 1 --timestep 999 --guidance 0 --vsd-weight 0"), ("invsr", "--timesteps 1 1000 --ema 0.9999")):
        arguments = parse(["train", method, "--data", "x", "-o", "y", *words.split(), *more.split()])
        assert arguments.steps == 1 and arguments.seed == 2**32 - 1
    assert parse(["train", "osediff", "--data", "x", "-o", "y", "--steps", "1", "--timestep", "0"]).timestep == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["osediff", "--mse-weight", "0", "--lpips-weight", "0", "--vsd-weight", "0"], "losses: found none that has a weight above 0"),
        (["invsr", "--latent-weight", "0"], "losses: found none that has a weight above 0"),
        (["invsr", "--predictor-channels", "64", "--predictor-layers", "1", "2"], "found 1 and 2 numbers"),
    ],
)
def test_a_training_that_would_learn_nothing_is_refused(tmp_path, photo, capfd, words, message):
    command = ["train", *words, "--base", str(ROOT / "miniature"), "--data", str(photo), "-o", str(tmp_path / "run"), "--steps", "1", "--patch", "64"]
    assert main(command) == 2
    assert message in capfd.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_says_what_it_wrote_and_what_has_changed(tmp_path, photo, capfd, caplog):
    command = [
        "train",
        "osediff",
        "--base",
        str(ROOT / "miniature"),
        "--data",
        str(photo),
        "-o",
        str(tmp_path / "run"),
        "--patch",
        "64",
        "--batch",
        "1",
    ]
    command += ["--vsd-weight", "0", "--lpips-weight", "0"]
    assert main([*command, "--steps", "2", "--max-minutes", "0"]) == 0
    assert "osediff.safetensors: after 1 of 2 steps. --resume continues" in capfd.readouterr().out
    AcceleratorState._reset_state()
    assert main([*command, "--steps", "2", "--resume", "--rank", "8"]) == 2
    error = capfd.readouterr().err
    assert "rank 4 (now 8)" in error and len(error.strip().splitlines()[-1]) < 400
    AcceleratorState._reset_state()
    assert main([*command, "--steps", "1", "--resume"]) == 0
    told = capfd.readouterr()
    assert "nothing to train, found all of 1 steps made" in caplog.text and "after 1 of 1 steps" in told.out
