"""What a training does: how long, how fast and how often all of them, and each method's own losses."""

import math
from dataclasses import dataclass
from pathlib import Path

from fewstep_sr.methods.osediff import TIMESTEP

from .distillation import GUIDANCE
from .optimizers import MUON_LR

TIMESTEPS = (250, 200, 150, 100)
"""Of InvSR's training, counted from 1, as its authors publish them."""

DISCRIMINATOR_CHANNELS = (128, 256, 512)


@dataclass(frozen=True)
class LoopOptions:
    """What all trainings share. ``batch`` is of one process; ``max_minutes`` ends a run early, as if it had been cut, but saved."""

    output: Path
    steps: int
    batch: int = 4
    lr: float = 5e-5
    warmup: int = 0
    cosine: bool = False
    seed: int = 0
    ema: float = 0.0
    accumulate: int = 1
    mixed_precision: str = "no"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    matrix_lr: float = MUON_LR
    betas: tuple[float, float] = (0.9, 0.999)
    workers: int = 0
    save_every: int = 500
    sample_every: int = 500
    log_every: int = 10
    max_minutes: float = math.inf
    resume: bool = False


@dataclass(frozen=True)
class OSEDiffOptions:
    """``rank`` and weights of the losses, those of the published training where nothing is said.

    ``latent`` is of a distance (L2, or L1) to the high-quality picture's latents, and ``gradients`` of one between the pictures' differences at
    three scales, ``structure`` of the gradient magnitudes' dissimilarity: none is part of the method; they are cheap where there is no GPU, or no
    LPIPS. ``regulariser_everywhere`` lets the regulariser learn in all its layers, as the paper has it, and not in the middle alone, as the published
    program has it. ``timestep`` is that of the one step; ``vae_lr`` the learning rate of the encoder's updates, where it is not that of all others.
    """

    rank: int = 4
    mse: float = 1.0
    lpips: float = 2.0
    vsd: float = 1.0
    regulariser: float = 1.0
    regulariser_everywhere: bool = False
    guidance: float = GUIDANCE
    latent: float = 0.0
    latent_l1: bool = False
    gradients: float = 0.0
    structure: float = 0.0
    timestep: int = TIMESTEP
    vae_lr: float | None = None


STAGES = ("pixel", "semantic")
"""Of PiSA-SR's training, in their order."""


@dataclass(frozen=True)
class PiSASROptions:
    """Stage, ranks and weights of the losses, those of the published training where nothing is said (scripts/train/train_pisasr.sh of its authors).

    The pixel stage has the squared distance of the pictures alone; the semantic one has it, too, with LPIPS and classifier score distillation.
    ``null_prompt`` is the share of batches that the generator sees with the empty prompt; the distillation never does.
    """

    stage: str = STAGES[0]
    rank_pixel: int = 4
    rank_semantic: int = 4
    mse: float = 1.0
    lpips: float = 2.0
    csd: float = 1.0
    guidance: float = GUIDANCE
    null_prompt: float = 0.5


@dataclass(frozen=True)
class InvSROptions:
    """Mode and weights of the losses, those of the published training where nothing is said.

    ``start`` trains on states of the low-quality picture (eq. 8); otherwise on states of the high-quality one (eq. 10), with the Gaussian constraint.
    ``adversarial_from`` is the number of steps in which the discriminator learns alone. Not part of the method, and cheap where there is no time for a
    discriminator: ``variance`` is of the constraint's part that the variance has, ``mse`` of the decoded pictures' squared distance in [-1, 1], ``structure`` of
    their gradient magnitudes' dissimilarity. With ``variance_alone`` the mean stays as it is and the variance alone learns: after L2 alone, which takes the noise away, the diffusion
    model sees states that are cleaner than their timestep says, and smooths them.
    """

    start: bool = True
    timesteps: tuple[int, ...] = TIMESTEPS
    latent: float = 1.0
    perceptual: float = 2.0
    gaussian: float = 0.0
    variance: float = 0.0
    variance_alone: bool = False
    mse: float = 0.0
    structure: float = 0.0
    adversarial: float = 0.0
    adversarial_from: int = 10_000
    discriminator_channels: tuple[int, ...] = DISCRIMINATOR_CHANNELS
