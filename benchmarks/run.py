"""Wall time and peak memory of both methods against the output's size, tiled and whole, in a real ComfyUI.

    python benchmarks/run.py --sizes 512 1024 2048 4096 --whole 512 1024 --plot docs/memory.svg
    python benchmarks/run.py --frames 20 200          # a batch of small frames

Run it with ComfyUI's Python; ComfyUI is looked for in COMFYUI_PATH, then in ~/comfy/ComfyUI. Networks are small, with random weights; every size runs
in a process of its own. Peak memory is what the process has at most above what it had before, without the picture that comes out.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from networks import SEED, load_nodes

TILE = 256
"""Side of the VAE's tiles in pixels; the UNet's are 32 cells."""

METHODS = {"OSEDiff": ("encode", "one step", "decode"), "InvSR": ("encode", "start state", "sampler", "decode")}


def resident(peak: bool) -> float:
    """MiB that this process has in memory, or had at most since :func:`forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)) / 1024


def forget_peak() -> float:
    """Start a new peak, with nothing kept that is free; MiB in memory now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident(peak=False)


def run_once(size: int, frames: int, tiled: bool) -> dict[str, list[float]]:
    """Seconds and MiB of every stage."""
    nodes = load_nodes()
    import networks
    import toys
    from comfy_extras import nodes_custom_sampler as core

    from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig

    pack = sys.modules[nodes["InvSRStartState"].__module__]
    config = NoisePredictorConfig(
        block_out_channels=(64,), layers_per_block=(1,), time_channels=128, temb_channels=64
    )  # its attention is over all pixels
    shapes = {k: tuple(v.shape) for k, v in NoisePredictor(config).state_dict().items()}
    predictor = pack.manage(lambda **kwargs: NoisePredictor(config, **kwargs), toys.weights(SEED, "predictor", shapes))
    vae, model, prompt = networks.comfy_vae(), toys.comfy_model(SEED), toys.conditioning(SEED)
    if tiled:
        model = nodes["FewStepSRTiledModel"].execute(model, tile_size=32, overlap=8)[0]
    tile_size = TILE if tiled else max(256, size)
    sigmas = torch.tensor([0.6, 0.0])
    picture, low_quality = torch.rand(frames, size, size, 3), torch.rand(frames, size // 4, size // 4, 3)
    results = {}

    def sample():
        guider = core.BasicGuider.execute(model, prompt)[0]
        euler = core.KSamplerSelect.execute("euler")[0]
        return core.SamplerCustomAdvanced.execute(results["start state"][0], guider, euler, sigmas, results["encode"][0])

    stages = {
        "encode": lambda: nodes["FewStepSRVAEEncode"].execute(picture, vae, tile_size=tile_size),
        "one step": lambda: nodes["OSEDiffOneStep"].execute(model, prompt, results["encode"][0]),
        "decode": lambda: nodes["FewStepSRVAEDecode"].execute(results["one step"][0], vae, tile_size=tile_size),
        "start state": lambda: nodes["InvSRStartState"].execute(predictor, low_quality, results["encode"][0], sigmas),
        "sampler": sample,
    }
    measured = {}
    with torch.inference_mode():
        for name, stage in stages.items():
            before, start = forget_peak(), time.perf_counter()
            results[name] = stage()
            of_result = 12 * size**2 * frames / 2**20 if name == "decode" else 0
            measured[name] = [time.perf_counter() - start, resident(peak=True) - before - of_result]
            print(f"{size}² {name}: {measured[name][0]:.0f} s, {measured[name][1]:.0f} MiB", file=sys.stderr, flush=True)
    return measured


def measure(size: int, frames: int, tiled: bool) -> dict[str, list[float]]:
    words = [sys.executable, __file__, "--once", str(size), str(frames), str(int(tiled))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # glibc gives back what is freed, instead of keeping it in pieces
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.splitlines()[-1])


def totals(measured: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Seconds of all stages and MiB of the hungriest one, for each method."""
    return {m: (sum(measured[s][0] for s in stages), max(measured[s][1] for s in stages)) for m, stages in METHODS.items()}


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {torch.get_num_threads()} threads, CPU, float32, PyTorch {torch.__version__}"


def plot(rows: dict[tuple[int, bool], dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for i, (axes, label) in enumerate(zip(both, ("seconds", "peak MiB above the pictures"), strict=True)):
        for colour, method in enumerate(METHODS):
            for tiled, style in ((True, "-"), (False, "--")):
                sizes = [size for size, kind in rows if kind == tiled]
                values = [totals(rows[size, tiled])[method][i] for size in sizes]
                axes.plot(sizes, values, f"C{colour}{style}", marker="o", label=f"{method} {'tiled' if tiled else 'whole'}")
        axes.set(xscale="log", yscale="log", xlabel="output, pixels a side", ylabel=label)
        axes.set_xticks(sorted({size for size, _ in rows}), labels=sorted({size for size, _ in rows}))
        axes.minorticks_off()
        axes.set_ylim(bottom=1)
    both[0].legend()
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="outputs in tiles, in pixels a side")
    parser.add_argument("--whole", type=int, nargs="*", default=[], help="outputs without tiles")
    parser.add_argument("--frames", type=int, nargs="*", default=[], help="batches of so many frames of 128 pixels")
    parser.add_argument("--plot", help="write the plot here (needs matplotlib)")
    parser.add_argument("--once", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(run_once(*arguments.once)))
        sys.exit()
    print(machine())
    print(
        "| output | "
        + " | ".join(f"{method}: s | MiB" for method in METHODS)
        + " | MiB of encode, one step, decode, start state, sampler |\n|"
        + "---|" * 6
    )
    rows = {}
    for size, frames, tiled in (
        [(s, 1, True) for s in arguments.sizes] + [(s, 1, False) for s in arguments.whole] + [(128, n, True) for n in arguments.frames]
    ):
        measured = measure(size, frames, tiled)
        rows[size, tiled] = measured
        columns = [f"{value:.0f}" for pair in totals(measured).values() for value in pair]
        name = f"{frames} frames of {size}²" if arguments.frames else f"{size}² {'tiled' if tiled else 'whole'}"
        print(f"| {name} | {' | '.join(columns)} | {', '.join(f'{mib:.0f}' for _, mib in measured.values())} |", flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)
