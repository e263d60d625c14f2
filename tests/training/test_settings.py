"""The trainings' command lines as typed settings: every option arrives, and stands for what is published where it is left out."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from pipelines.training.methods import add_methods
from pipelines.training.options import InvSROptions, LoopOptions, OSEDiffOptions, PiSASROptions
from pipelines.training.settings import BaseSettings, DataSettings, InvSRSettings, OSEDiffSettings, PiSASRSettings

KINDS = {"osediff": OSEDiffSettings, "invsr": InvSRSettings, "pisasr": PiSASRSettings}
NEEDED = ["--data", "photos", "-o", "run", "--steps", "7"]

parser = argparse.ArgumentParser()
add_methods(parser.add_subparsers(), argparse.ArgumentParser(add_help=False))
COMMANDS = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch):
    """A command without --comfyui looks where the variable says."""
    for command in COMMANDS.values():
        monkeypatch.setattr(next(action for action in command._actions if action.dest == "comfyui"), "default", None)


def settings(method: str, *words: str) -> OSEDiffSettings | InvSRSettings:
    return KINDS[method].from_arguments(parser.parse_args([method, *NEEDED, *words]))


def other(action: argparse.Action) -> list[str]:
    """Words that give an option another value than its default."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(choice for choice in action.choices if choice != action.default)]
    values = {"--data": ["other"], "--steps": ["9"], "--output": ["elsewhere"], "--patch": ["128"], "--timesteps": ["250", "10"]}
    values |= {"--predictor-channels": ["64", "128"], "--predictor-layers": ["1", "2"], "--predictor-time": ["64", "128"]}
    values |= {"--discriminator-channels": ["32", "64"], "--ema": ["0.25"], "--mild-degradation": ["0.25"], "--null-prompt": ["0.25"]}
    return values.get(action.option_strings[-1], ["3"])


OPTIONS = [
    pytest.param(method, action, id=f"{method}{action.option_strings[-1]}")
    for method, command in COMMANDS.items()
    for action in command._actions
    if action.dest != "help"
]


@pytest.mark.parametrize(("method", "action"), OPTIONS)
def test_every_option_arrives(method, action):
    option = action.option_strings[-1]
    needed = {"--variance-alone": ["--init", "a.pth", "--variance-weight", "1"], "--weights": ["--stage", "semantic", "--weights", "a"]}
    beside = needed.get(option, [])
    if option == "--stage":
        assert settings(method, *needed["--weights"]).options.stage == "semantic" != settings(method).options.stage
        return
    assert settings(method, *beside, option, *other(action)) != settings(method, *beside)


def test_osediff_without_options_is_the_published_training():
    found = settings("osediff")
    assert found.options == OSEDiffOptions() and found.base == BaseSettings()
    assert (found.negative_prompt, found.tagger, found.dape) == (None, None, None)
    assert found.data == DataSettings(("photos",), 512, LoopOptions(Path("run"), 7, lr=5e-5, weight_decay=1e-2, max_grad_norm=1.0))


def test_pisasr_without_options_is_the_published_first_stage():
    found = settings("pisasr")
    assert found.options == PiSASROptions() and found.base == BaseSettings() and found.weights is None
    assert found.data == DataSettings(("photos",), 512, LoopOptions(Path("run"), 7, lr=5e-5, weight_decay=1e-2, max_grad_norm=1.0))


def test_invsr_without_options_is_the_published_training():
    found = settings("invsr")
    assert found.options == InvSROptions() and found.base == BaseSettings() and (found.perceptual, found.init) == (None, None)
    assert (found.predictor.block_out_channels, found.predictor.layers_per_block) == ((256, 512), (3, 3))
    assert (found.predictor.time_channels, found.predictor.temb_channels) == (256, 512)
    assert found.data.loop == LoopOptions(Path("run"), 7, lr=5e-5, warmup=2000, ema=0.999, max_grad_norm=math.inf)


@pytest.mark.parametrize(("words", "start", "timesteps", "gaussian"), [
    ([], True, (250, 200, 150, 100), 0.0),
    (["--mode", "middle"], False, (200, 150, 100), 0.1),
    (["--mode", "middle", "--gaussian-weight", "0"], False, (200, 150, 100), 0.0),
    (["--gaussian-weight", "0.5", "--timesteps", "90"], True, (90,), 0.5),
])  # fmt: skip
def test_modes_of_invsr(words, start, timesteps, gaussian):
    options = settings("invsr", *words).options
    assert (options.start, options.timesteps, options.gaussian) == (start, timesteps, gaussian)


def test_a_loops_every_option_but_two_is_on_the_command_line():
    """The betas are the methods' own, and figures are logged every ten steps."""
    known = {action.dest for action in COMMANDS["osediff"]._actions}
    assert {field.name for field in fields(LoopOptions)} - known == {"betas", "log_every"}


@pytest.mark.parametrize(("method", "words", "message"), [
    ("osediff", ["--patch", "96"], "--patch: found 96, expected a multiple of 64, the size of the UNet's coarsest latent pixel."),
    ("invsr", ["--patch", "96"], "--patch: found 96, expected a multiple of 64"),
    ("pisasr", ["--patch", "96"], "--patch: found 96, expected a multiple of 64"),
    ("pisasr", ["--stage", "semantic"], "--weights: found none, expected the pixel stage's run"),
    ("pisasr", ["--weights", "run"], "--weights: found run, but --stage pixel begins anew."),
    ("invsr", ["--variance-alone"], "--variance-alone: expected --init with a trained predictor, --variance-weight above 0, and no --weight-decay."),
    ("invsr", ["--variance-alone", "--init", "a.pth"], "--variance-alone: expected"),
    ("invsr", ["--variance-alone", "--variance-weight", "1"], "--variance-alone: expected"),
    ("invsr", ["--variance-alone", "--init", "a.pth", "--variance-weight", "1", "--weight-decay", "0.1"], "--variance-alone: expected"),
    ("invsr", ["--predictor-layers", "3"], "--predictor-channels, --predictor-layers: found 2 and 1 numbers, expected as many of one as of the other"),
    ("invsr", ["--predictor-layers", "33", "32"], "--predictor-layers: found 65 in all, expected at most 64: a file of more is not read."),
])  # fmt: skip
def test_what_does_not_go_together(method, words, message):
    with pytest.raises(ValueError) as error:
        settings(method, *words)
    assert str(error.value).startswith(message)


def test_what_goes_together():
    assert settings("invsr", "--variance-alone", "--init", "a.pth", "--variance-weight", "1").init == Path("a.pth")
    assert settings("osediff", "--comfyui", "~/ComfyUI").base.comfyui == Path.home() / "ComfyUI"
