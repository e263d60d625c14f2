"""Peak memory of every stage at the published networks' full size, computed without a GPU.

    python benchmarks/footprint.py                          # Markdown tables; needs diffusers, no weights and no GPU
    python benchmarks/footprint.py --sizes 512 4096 --tile 768 --dtype float32

The networks run under PyTorch's fake tensors as if on a CUDA device: every operation is dispatched with its shapes and dtypes, and nothing is
computed. What is counted are the bytes of all live tensors on the device, without the weights. Attention counts as a fused kernel, which keeps no
attention matrix. Images in tiles lie on the host. Not counted are the workspaces of convolutions, what the allocator loses to fragmentation, and CUDA's own context.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from full_size import METHODS, STAGES, Networks, Runtime, stages
from gpu_report import GIB, table
from live_bytes import DEVICE, peak_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep_sr.tiling.whole_picture import WholePicture

CARDS = (6, 8, 12, 24)
CONTEXT = 0.8
"""GiB of a card that are not for tensors: CUDA's context and the workspaces of convolutions. An assumption, not a measurement."""


def measure(sizes: list[int], tile: int | None, dtype: torch.dtype) -> tuple[dict[int, dict[str, int]], dict[str, int]]:
    """Peak bytes of every stage for each size, and bytes of each network's weights."""
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(WholePicture, "off", return_value=0.0):  # which has no value here
        networks = Networks(dtype, DEVICE)
        weights = {name: networks.weights(name) for name in dict.fromkeys(STAGES.values())}  # all are there before anything is counted
        peaks = {}
        for pixels in sizes:
            peaks[pixels] = {}
            for name, run in stages(networks, pixels, tile, Runtime()).items():
                peaks[pixels][name] = peak_bytes(run)
                print(f"{pixels}² {name}: {peaks[pixels][name] / GIB:.2f} GiB", file=sys.stderr, flush=True)
        return peaks, weights


def needed(peaks: dict[str, int], weights: dict[str, int], method: str, offload: bool) -> float:
    """GiB of a method's hungriest stage with its weights: those of the stage's own network where others are offloaded, else all."""
    used = METHODS[method]
    resident = sum(weights[name] for name in {STAGES[stage] for stage in used})
    return max(peaks[stage] + (weights[STAGES[stage]] if offload else resident) for stage in used) / GIB


def largest_whole(whole: dict[int, dict[str, int]], weights: dict[str, int], method: str, offload: bool, room: float) -> int:
    """Side, in steps of 64 pixels, of the largest image that goes without tiles into ``room`` GiB: peaks grow with the area."""
    known = max(whole)
    fits = lambda side: needed({stage: peak * side**2 // known**2 for stage, peak in whole[known].items()}, weights, method, offload) <= room  # noqa: E731
    return max((side for side in range(64, 2 * known + 1, 64) if fits(side)), default=0)


def report(tiled: dict[int, dict[str, int]], whole: dict[int, dict[str, int]], weights: dict[str, int]) -> str:
    """The tables: peaks of stages and of methods, weights, and what fits into which card."""
    peaks = [
        [f"{pixels}² {how}", *(f"{found[stage] / GIB:.2f}" for stage in STAGES)]
        for how, sizes in (("tiled", tiled), ("whole", whole))
        for pixels, found in sizes.items()
    ]
    methods = [[method, *(f"{max(found[stage] for stage in stages) / GIB:.2f}" for found in tiled.values())] for method, stages in METHODS.items()]
    rows = []
    for method in METHODS:
        for offload in (False, True):
            fits = []
            for card in CARDS:
                sizes = [pixels for pixels, found in tiled.items() if needed(found, weights, method, offload) <= card - CONTEXT]
                fits.append(f"{max(sizes, default=0)}², {largest_whole(whole, weights, method, offload, card - CONTEXT)}²")
            rows.append([method, "one at a time" if offload else "all", *fits])
    return "\n\n".join(
        [
            table(["output", *(f"{stage}, GiB" for stage in STAGES)], peaks),
            table(["most of a method's stages beside the weights, GiB, tiled", *(f"{pixels}²" for pixels in tiled)], methods),
            table(["weights", *weights], [["GiB", *(f"{size / GIB:.2f}" for size in weights.values())]]),
            table(["largest output: in tiles (of those above), whole", "weights on the card", *(f"{card} GB" for card in CARDS)], rows),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192], help="outputs in tiles, in pixels a side")
    parser.add_argument("--whole", type=int, nargs="*", default=[512, 1024, 2048], help="outputs without tiles")
    parser.add_argument("--tile", type=int, default=1024, help="side of the tiles in pixels (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--json", type=Path, help="write the bytes here as well")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    tiled, weights = measure(arguments.sizes, arguments.tile, dtype)
    whole, _ = measure(arguments.whole, None, dtype)
    print(report(tiled, whole, weights))
    if arguments.json:
        arguments.json.write_text(json.dumps({"tiled": tiled, "whole": whole, "weights": weights}, indent=1) + "\n")
