"""Stable Diffusion's noise table and the few-step schedules of OSEDiff and InvSR.

Everything counts in indices of the table, 0 (almost clean) to 999 (almost noise). The methods publish their timesteps
differently: InvSR counts from 1, so that its 200 is index 199; OSEDiff counts from 0, so that its 999 is index 999.
"""

from functools import cache
from itertools import pairwise

import torch

NUM_TRAIN_TIMESTEPS = 1000
METHODS = ("InvSR", "OSEDiff")

# InvSR, published schedules for one to five steps (inference_invsr.py), counted from 1.
INVSR_TIMESTEPS = {
    1: (200,),
    2: (200, 100),
    3: (200, 100, 50),
    4: (200, 150, 100, 50),
    5: (250, 200, 150, 100, 50),
}
# The noise predictor is trained for start timesteps up to this one (InvSR), counted from 1.
INVSR_MAX_START = 250
OSEDIFF_TIMESTEP = 999


@cache
def alphas_cumprod() -> torch.Tensor:
    """The cumulative product of alphas, shape (1000,), float32: "scaled linear" betas from 0.00085 to 0.012 (Rombach et al., 2022)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


@cache
def sigmas() -> torch.Tensor:
    """Noise level relative to the signal, sqrt((1 - a) / a) for each index, shape (1000,), float32, ascending."""
    a = alphas_cumprod().double()
    return ((1 - a) / a).sqrt().float()


def sigma_to_index(sigma: float) -> int:
    """The index of the table's entry nearest to ``sigma`` (in log sigma, as samplers space it).

    Raises ValueError where no entry is near: a sigma of zero or outside the table has no timestep.
    """
    table = sigmas()
    low, high = table[0].item(), table[-1].item()
    if not low * 0.999 <= sigma <= high * 1.001:
        raise ValueError(
            f"sigma {sigma:.6g} is outside Stable Diffusion's noise table ({low:.6g} to {high:.6g}). Wire the SIGMAS of 'Few-Step Scheduler' here."
        )
    return int((table.log() - torch.tensor(sigma).log()).abs().argmin())


def parse_timesteps(text: str) -> list[int]:
    """Timesteps written as ``"250, 200, 100"`` (commas, semicolons or spaces). Empty text gives an empty list.

    Raises ValueError for anything that is not a whole number.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(f"timesteps: found {text!r}, expected whole numbers such as '250, 200, 150, 100, 50'.") from None


def few_step_indices(method: str, steps: int, timesteps: str | list[int] = "") -> list[int]:
    """Indices of the noise table at which the model is called, descending.

    Args:
        method: ``"InvSR"`` or ``"OSEDiff"``.
        steps: number of model calls. InvSR publishes 1 to 5; beyond, its timesteps are evenly spaced from 250.
            OSEDiff is a one-step method; more steps are evenly spaced from 999.
        timesteps: replaces the method's schedule; counted as the method publishes them (InvSR from 1, OSEDiff from 0).

    Raises:
        ValueError: unknown method, no steps, timesteps out of range or not strictly descending.
    """
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(METHODS)}.")
    given = parse_timesteps(timesteps) if isinstance(timesteps, str) else list(timesteps)
    if not given and steps < 1:
        raise ValueError(f"steps: found {steps}, expected 1 or more.")

    if method == "InvSR":
        published = given or INVSR_TIMESTEPS.get(steps) or _evenly(INVSR_MAX_START, steps)
        first_allowed, origin = (INVSR_MAX_START, 1)
        why = "InvSR's noise predictor is trained for start timesteps up to 250 (counted from 1)"
    else:
        published = given or _evenly(OSEDIFF_TIMESTEP, steps)
        first_allowed, origin = (OSEDIFF_TIMESTEP, 0)
        why = "OSEDiff's timesteps are indices of Stable Diffusion's noise table"
    published = list(published)
    if published[0] > first_allowed or published[-1] < origin:
        raise ValueError(f"timesteps: found {published}, expected values from {first_allowed} down to {origin}: {why}.")
    if any(a <= b for a, b in pairwise(published)):
        raise ValueError(f"timesteps: found {published}, expected each smaller than the one before it.")
    if method == "OSEDiff" and published[0] != OSEDIFF_TIMESTEP:
        raise ValueError(
            f"timesteps: found {published}, expected 999 first: OSEDiff's start state is exact only at the end of the noise table. "
            "For another single timestep use the 'OSEDiff One Step' node."
        )
    return [t - origin for t in published]


def _evenly(start: int, steps: int) -> list[int]:
    """``steps`` whole timesteps from ``start`` towards 0, 0 itself left out."""
    if steps > start:
        raise ValueError(f"steps: found {steps}, expected at most {start}: there are only that many timesteps below the start.")
    return [start - start * i // steps for i in range(steps)]
