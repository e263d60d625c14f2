"""What suits a CPU: precision, memory format and threads, measured where machines differ."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from .convolutions import Convolutions, TransposedUpsample, as_product

Choice = tuple[torch.dtype, torch.memory_format]
"""What a convolutional network computes in, and how it keeps images."""

MIN_GAIN, MIN_GAIN_OF_PRECISION = 1.05, 1.5
"""How many times as fast another memory format must be, and another precision: more than a measurement's noise, and much more for lost digits."""

PRODUCT_SIDES = 8, 16
"""Sides of small images in a UNet, in its own cells: the larger they are, the less the order of the weights matters."""

CLOCK = time.process_time if sys.platform == "linux" else time.perf_counter
"""Seconds of the processor, where they are told finely enough: others may use the machine. Threads that wait for each other keep it busy as well."""

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


def choose_convolutions(dtype: torch.dtype, memory_format: torch.memory_format) -> Convolutions:
    """Which convolutions this processor computes in less time in another order, each where it is worth it."""
    gains = gains_of_convolutions(dtype, memory_format)
    product_pixels = 0
    for side in PRODUCT_SIDES:
        if gains[side] < MIN_GAIN:
            break
        product_pixels = side**2
    return Convolutions(gains["transposed"] >= MIN_GAIN, product_pixels)


@torch.no_grad()
def gains_of_convolutions(dtype: torch.dtype, memory_format: torch.memory_format, channels: int = 1024) -> dict[str | int, float]:
    """How many times as fast the other order is: of an enlargement ("transposed"), and of a convolution of images of PRODUCT_SIDES."""
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype)
    product, found = as_product(conv, max(PRODUCT_SIDES) ** 2), {}
    for side in PRODUCT_SIDES:  # a UNet's, in the plain format
        image = torch.rand(1, channels, side, side).to(dtype)
        found[side] = _gain(partial(conv, image), partial(product, image))
    channels //= 4
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
    image = torch.rand(1, channels, 32, 32).to(dtype).contiguous(memory_format=memory_format)
    plain = lambda: conv(F.interpolate(image, scale_factor=2.0, mode="nearest"))  # noqa: E731
    return found | {"transposed": _gain(plain, partial(TransposedUpsample(conv), image))}


def _gain(plain: Callable[[], object], other: Callable[[], object]) -> float:
    try:
        seconds = _seconds(plain, other)
    except RuntimeError:  # not in this precision
        return 0.0
    return seconds[0] / seconds[1]


def _seconds(*runs: Callable[[], object]) -> list[float]:
    """Of each the fastest of three runs, in turns, after a first one, which warms up."""
    found = [math.inf] * len(runs)
    for turn in range(4):
        for i, run in enumerate(runs):
            start = CLOCK()
            run()
            found[i] = min(found[i], CLOCK() - start) if turn else math.inf
    return found


@torch.no_grad()
def seconds_of_a_block(dtype: torch.dtype, memory_format: torch.memory_format, channels: int = 128, side: int = 96) -> float:
    """Of a VAE's normalisation and convolution and a UNet's product of matrices; infinite where the CPU cannot."""
    image, weight = torch.rand(1, channels, side, side), torch.rand(channels, channels, 3, 3)
    image, weight = (t.to(dtype).contiguous(memory_format=memory_format) for t in (image, weight))
    tokens, matrix = torch.rand(side**2, channels).to(dtype), torch.rand(4 * channels, channels).to(dtype)

    def block() -> None:
        F.conv2d(F.silu(F.group_norm(image, 32)), weight, padding=1)
        F.linear(tokens, matrix)

    try:
        return _seconds(block)[0]
    except RuntimeError:
        return math.inf


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
