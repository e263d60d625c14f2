"""The training as published: the timesteps of distillation, and what the loop makes of gradients that are known, so that each weight can be worked out by hand."""

import math
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

pytest.importorskip("diffusers")

from pipelines.training import distillation
from pipelines.training.data import TrainingPictures
from pipelines.training.distillation import draw_timesteps
from pipelines.training.loop import train
from pipelines.training.options import LoopOptions
from pipelines.training.task import Task


class Slope(Task):
    """Two weights, from zero, whose gradients are given: micro-step after micro-step, the last one ever after."""

    def __init__(self, *gradients: tuple[float, float]):
        self.module = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(self.module.weight)
        self.phases = {"slope": self.module}
        self.gradients, self.seen, self.sampled, self.saved = list(gradients), [], [], []

    def _weights(self) -> list[float]:
        return self.module.weight.flatten().tolist()

    def loss(self, phase, batch, generator):
        self.seen.append(self._weights())
        gradient = self.gradients[min(len(self.seen), len(self.gradients)) - 1]
        return self.phases[phase](torch.tensor([gradient])).sum(), {}

    def sample(self, batch):
        self.sampled.append(self._weights())
        return torch.zeros(3, 8, 8)

    def save(self, folder):
        self.saved.append(self._weights())


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def run(tmp_path):
    """Trains on one grey picture. AdamW's first beta is 0, so that nothing but the present gradient has a direction."""
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "photo.png")

    def run(task: Slope, steps: int, **options) -> list[dict[str, float]]:
        pictures = TrainingPictures([tmp_path / "photo.png"], 8, 0)
        settings = {"batch": 1, "lr": 0.1, "betas": (0.0, 0.0), "log_every": 1}
        return train(task, pictures, LoopOptions(tmp_path / "run", steps, **settings | options))

    return run


def first_weights(task: Slope) -> list[float]:
    return [*(weights[0] for weights in task.seen), task.module.weight[0, 0].item()]


def test_gradients_are_clipped_to_norm_one(run):
    """With betas (0, 1/2) the second update is g2 / sqrt((g1^2 + 2 g2^2) / 3): the first gradient, (6, 8), counts as (0.6, 0.8)."""
    task = Slope((6.0, 8.0), (0.3, 0.4))
    history = run(task, 2, betas=(0.0, 0.5))
    assert [entry["slope/gradient"] for entry in history] == pytest.approx([10, 0.5])
    assert task.seen[1] == pytest.approx([-0.1, -0.1])
    second = [0.3 / math.sqrt((0.6**2 + 2 * 0.3**2) / 3), 0.4 / math.sqrt((0.8**2 + 2 * 0.4**2) / 3)]
    assert task.saved[-1] == pytest.approx([-0.1 - 0.1 * update for update in second])


def test_clipping_norm_is_an_option(run):
    """Here the first gradient counts as (3, 4)."""
    task = Slope((6.0, 8.0), (0.3, 0.4))
    run(task, 2, betas=(0.0, 0.5), max_grad_norm=5.0)
    assert task.saved[-1][0] == pytest.approx(-0.1 - 0.1 * 0.3 / math.sqrt((3**2 + 2 * 0.3**2) / 3))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_accumulate_to_their_mean_before_they_are_clipped(run, accumulate):
    task = Slope(*[(0.2, 0.0)] * accumulate, *[(0.6, 0.0), (-0.2, 0.0)] * accumulate)
    history = run(task, 2, betas=(0.0, 0.5), accumulate=accumulate)
    second = 0.2 if accumulate == 2 else 0.6
    assert len(task.seen) == 2 * accumulate and history[-1]["slope/gradient"] == pytest.approx(second)
    assert task.saved[-1][0] == pytest.approx(-0.1 - 0.1 * second / math.sqrt((0.2**2 + 2 * second**2) / 3))


def moves(task: Slope, accumulate: int = 1) -> list[float]:
    """How far each step went, relative to the learning rate: with betas (0, 0) AdamW goes its learning rate against the gradient's sign."""
    weights = first_weights(task)[::accumulate]
    return [(before - after) / 0.1 for before, after in pairwise(weights)]


def test_rate_is_constant_by_default(run):
    task = Slope((1.0, 1.0))
    run(task, 5)
    assert moves(task) == pytest.approx([1] * 5, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warmup_rises_to_the_rate(run, accumulate):
    task = Slope((1.0, 1.0))
    run(task, 6, warmup=4, accumulate=accumulate)
    assert moves(task, accumulate) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-4)


def test_cosine_falls_to_zero(run):
    task = Slope((1.0, 1.0))
    run(task, 4, cosine=True)
    half = math.sqrt(0.5)
    assert moves(task) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2], rel=1e-4)


def test_cosine_begins_where_warmup_ends(run):
    task = Slope((1.0, 1.0))
    run(task, 8, warmup=2, cosine=True)
    assert moves(task) == pytest.approx([0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6))], rel=1e-4)


def test_average_is_what_is_saved_and_shown(run):
    """The average follows the weights with 1 - decay, where the decay of step t is no larger than t / (9 + t) (diffusers' EMAModel), and 0 in the first."""
    task, decay = Slope((1.0, 1.0)), 0.2
    run(task, 6, ema=decay, save_every=3, sample_every=3)
    averages, average = [], 0.0
    for t, weight in enumerate(first_weights(task)[1:], 1):
        share = min(decay, t / (9 + t)) if t > 1 else 0.0
        average = share * average + (1 - share) * weight
        averages.append(average)
    assert averages[-1] > first_weights(task)[-1] + 0.01  # it lags behind
    for found in (task.saved, task.sampled):
        assert [weights[0] for weights in found] == pytest.approx([averages[2], averages[5]], rel=1e-4)
    assert first_weights(task) == pytest.approx([-0.1 * step for step in range(7)], rel=1e-4)  # training goes on from the weights themselves


def test_without_average_the_weights_are_saved(run):
    task = Slope((1.0, 1.0))
    run(task, 3)
    assert task.saved[-1] == pytest.approx([-0.3, -0.3], rel=1e-4)


def test_distillation_draws_from_20_to_979():
    """OSEDiff, train_osediff.py: torch.randint(20, 980); the regulariser's own loss takes all of the base's timesteps, 0 to 999."""
    generator = torch.Generator().manual_seed(0)
    assert (distillation.MIN_TIMESTEP, distillation.MAX_TIMESTEP, distillation.GUIDANCE) == (20, 980, 7.5)
    drawn = draw_timesteps(50_000, generator, distillation.MIN_TIMESTEP, distillation.MAX_TIMESTEP)
    assert drawn.shape == (50_000,) and set(drawn.tolist()) == set(range(20, 980))
    assert set(draw_timesteps(50_000, generator).tolist()) == set(range(1000))
