"""What suits a CPU: precision, memory format and threads, measured where machines differ."""

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

Choice = tuple[torch.dtype, torch.memory_format]
"""What a convolutional network computes in, and how it keeps images."""

MIN_GAIN, MIN_GAIN_OF_PRECISION = 1.05, 1.5
"""How many times as fast another memory format must be, and another precision: more than a measurement's noise, and much more for lost digits."""

CGROUP = Path("/sys/fs/cgroup")


def choose(dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)) -> Choice:
    """The fastest of these precisions, each in both memory formats, where it is worth it; the first in the plain format else. It takes half a second."""
    formats = (torch.contiguous_format, torch.channels_last)
    return fastest({(dtype, memory_format): seconds_of_a_block(dtype, memory_format) for dtype in dtypes for memory_format in formats})


def fastest(seconds: dict[Choice, float]) -> Choice:
    """The choice that takes the fewest seconds, of those whose gain over the first one is enough."""
    plain = next(iter(seconds))
    gains = {choice: seconds[plain] / seconds[choice] for choice in seconds}
    worth = [choice for choice, gain in gains.items() if gain >= (MIN_GAIN if choice[0] == plain[0] else MIN_GAIN_OF_PRECISION)]
    return min(worth, key=seconds.__getitem__, default=plain)


@torch.no_grad()
def seconds_of_a_block(dtype: torch.dtype, memory_format: torch.memory_format, channels: int = 128, side: int = 96) -> float:
    """The fastest of three runs of a VAE's normalisation and convolution and a UNet's product of matrices; infinite where the CPU cannot."""
    image, weight = torch.rand(1, channels, side, side), torch.rand(channels, channels, 3, 3)
    image, weight = (t.to(dtype).contiguous(memory_format=memory_format) for t in (image, weight))
    tokens, matrix = torch.rand(side**2, channels).to(dtype), torch.rand(4 * channels, channels).to(dtype)
    found = math.inf
    try:
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            F.conv2d(F.silu(F.group_norm(image, 32)), weight, padding=1)
            F.linear(tokens, matrix)
            found = min(found, time.perf_counter() - start)
    except RuntimeError:
        return math.inf
    return found


def fit_threads() -> None:
    """No more threads than the container's share of processors, where there is one: others would wait for each other. OMP_NUM_THREADS goes before."""
    share = processor_share()
    if share and "OMP_NUM_THREADS" not in os.environ and share < torch.get_num_threads():
        torch.set_num_threads(share)


def processor_share(cgroup: Path = CGROUP) -> int | None:
    """How many processors a container may keep busy, rounded up; None where nothing limits it."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such files, or "max"
        return None
