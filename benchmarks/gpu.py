"""Time, memory and precision of every method on one GPU, in a single run.

    python benchmarks/gpu.py                               # 512², 2048², 4096², float16; writes gpu.md, gpu.json and gpu.svg
    python benchmarks/gpu.py --device cpu --reduced --sizes 256 512          # that it runs, without a GPU

It needs torch, diffusers, accelerate and einops, and no weight files: networks have the published sizes and random weights. Times are of device events
(on a CPU of the clock), the median of several runs after a warm-up. The same run has two things to compare with:

- the loop: tiles of the same size one at a time, each result taken to the host before the next, as the published programs and diffusers' tiled VAE work;
- the floor: the stage's multiply-adds, counted on networks without memory, at the speed that a large matrix product reaches in this run.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_size import METHODS, STAGES, Compiler, Networks, stages
from gpu_report import CAP, GIB, plot, report
from torch.utils.flop_counter import FlopCounterMode

SIZES = (512, 2048, 4096)
TILE = 1024
LOOP_TILE, LOOP_OVERLAP = 96, 32
"""The published programs' UNet tiles in latent pixels."""


class Clock:
    """Milliseconds and peak memory of what runs on a device."""

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"

    def run(self, call: Callable[[], Any], repeats: int) -> tuple[float, float]:
        """Median milliseconds after one warm-up, and the peak in GiB above what was there before (0 on a CPU, where it is not known)."""
        call()
        times, before = [], 0
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(repeats):
            times.append(self._once(call))
        peak = (torch.cuda.max_memory_allocated() - before) / GIB if self.is_cuda else 0.0
        return statistics.median(times), peak

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def multiply_adds_per_second(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """What a product of two square matrices reaches here."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    milliseconds, _ = Clock(device).run(lambda: [a @ b for _ in range(5)], 5)
    return 5 * side**3 / (milliseconds / 1000)


class Work:
    """Multiply-adds of what runs inside: calls of the networks are noted with their shapes, and each shape is counted once, without memory."""

    def __init__(self, networks: Networks):
        self._parts = {
            "vae.encoder": lambda n: n.vae.encoder,
            "vae.decoder": lambda n: n.vae.decoder,
            "light_vae.decoder": lambda n: n.light_vae.decoder,
            "unet": lambda n: n.unet,
            "predictor": lambda n: n.predictor,
            "tagger": lambda n: n.tagger,
            "estimator": lambda n: n.estimator,
        }
        self._networks = networks
        self._counted = Networks(torch.float32, torch.device("meta"), networks.reduced)
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}

    def of(self, call: Callable[[], Any]) -> float:
        """Multiply-adds of ``call``, which is made once."""
        calls: list[tuple[str, tuple[int, ...]]] = []
        hooks = [
            part(self._networks).register_forward_pre_hook(lambda _, inputs, name=name: calls.append((name, tuple(inputs[0].shape))))
            for name, part in self._parts.items()
        ]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()
        return sum(self._count(*each) for each in calls)

    def _count(self, name: str, shape: tuple[int, ...]) -> float:
        if (name, shape) not in self._known:
            with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
                given = [torch.empty(shape)]
                if name in ("unet", "predictor"):
                    given.append(torch.empty(1))
                if name == "unet":
                    given.append(torch.empty(shape[0], 77, self._counted.context_dim))
                self._parts[name](self._counted)(*given)
            self._known[name, shape] = counter.get_total_flops() / 2
        return self._known[name, shape]


def loops(networks: Networks, pixels: int, tile: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The stages as a loop over tiles, one at a time, on the host: what they are compared with."""
    device, dtype, cells = networks.device, networks.dtype, pixels // 8
    image, latents = torch.rand(1, 3, pixels, pixels) * 2 - 1, torch.randn(1, 4, cells, cells)
    embeds = torch.randn(1, 77, networks.context_dim).to(device, dtype)

    def over_tiles(source: torch.Tensor, scale_in: int, scale_out: float, side: int, overlap: int, call: Callable) -> torch.Tensor:
        length = source.shape[-1] // scale_in
        starts = sorted({min(start, length - side) for start in range(0, length - overlap, side - overlap)}) if length > side else [0]
        side, total, weights = min(side, length), None, None
        for top in starts:
            for left in starts:
                part = source[..., top * scale_in : (top + side) * scale_in, left * scale_in : (left + side) * scale_in]
                answer = call(part.to(device, dtype)).float().cpu()
                if total is None:
                    total = torch.zeros(1, answer.shape[1], round(length * scale_out), round(length * scale_out))
                    weights = torch.zeros_like(total[:, :1])
                place = (..., *(slice(round(s * scale_out), round((s + side) * scale_out)) for s in (top, left)))
                total[place] += answer
                weights[place] += 1
        return total / weights

    vae_tile = tile // 8
    return {
        "encode": lambda: over_tiles(image, 8, 1, vae_tile, 8, lambda part: networks.vae.encode(part).latent_dist.parameters),
        "decode": lambda: over_tiles(latents, 1, 8, vae_tile, 8, lambda part: networks.vae.decode(part).sample),
        "light decode": lambda: over_tiles(latents, 1, 8, vae_tile, 8, lambda part: networks.light_vae.decode(part).sample),
        "step": lambda: over_tiles(
            latents, 1, 1, LOOP_TILE, LOOP_OVERLAP, lambda part: networks.unet(part, 999, encoder_hidden_states=embeds).sample
        ),
    }


def measure(
    networks: Networks, sizes: list[int], tile: int, repeats: int, speed: float | None, compiler: Compiler | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds and peak of every stage, for each size; without a compiler the share of the floor and the loop's as well."""
    clock, work, found = Clock(networks.device), Work(networks), {}
    for pixels in sizes:
        found[str(pixels)] = {}
        in_loops = loops(networks, pixels, tile) if compiler is None else {}
        for stage, call in stages(networks, pixels, tile, compiler=compiler).items():
            milliseconds, peak = clock.run(call, repeats)
            entry = {"ms": milliseconds, "peak_gib": peak}
            if speed:
                entry["floor"] = work.of(call) / speed * 1000 / milliseconds
            if stage in in_loops:
                entry["loop_ms"], entry["loop_peak_gib"] = clock.run(in_loops[stage], max(1, repeats // 2))
            found[str(pixels)][stage] = entry
            print(f"{pixels}² {stage}: {json.dumps({name: round(value, 3) for name, value in entry.items()})}", file=sys.stderr, flush=True)
    return found


def errors(device: torch.device, reduced: bool, pixels: int, dtypes: list[torch.dtype]) -> dict[str, dict[str, float]]:
    """Relative error of each stage in lower precision against float32, with the same weights and inputs."""
    exact = Networks(torch.float32, device, reduced)
    wanted = {stage: call().float().cpu() for stage, call in stages(exact, pixels, None).items()}
    found: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        lower = Networks(dtype, device, reduced)
        for name in set(STAGES.values()):
            getattr(lower, name).load_state_dict(getattr(exact, name).state_dict())
        found[str(dtype).removeprefix("torch.")] = {
            stage: float((call().float().cpu() - wanted[stage]).norm() / wanted[stage].norm()) for stage, call in stages(lower, pixels, None).items()
        }
    return found


def within_cap(reduced: bool, pixels: int, tile: int, dtype: torch.dtype) -> dict[str, Any]:
    """A whole picture with :data:`CAP` GiB for this process, one network on the device at a time."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * GIB / torch.cuda.get_device_properties(0).total_memory))
    host = Networks(dtype, torch.device("cpu"), reduced)
    host.device = device  # where the stages run
    try:
        torch.cuda.reset_peak_memory_stats()
        calls, start = stages(host, pixels, tile), time.perf_counter()
        for stage in METHODS["InvSR"]:
            network = _on_host(host, STAGES[stage])
            network.to(device)
            calls[stage]()
            network.to("cpu")
        torch.cuda.synchronize()
        return {"done": True, "seconds": time.perf_counter() - start, "peak_gib": torch.cuda.max_memory_allocated() / GIB}
    except torch.cuda.OutOfMemoryError as error:
        return {"done": False, "error": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _on_host(networks: Networks, name: str) -> torch.nn.Module:
    device, networks.device = networks.device, torch.device("cpu")
    try:
        return getattr(networks, name)
    finally:
        networks.device = device


def describe(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    return f"{name}, PyTorch {torch.__version__}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="outputs, in pixels a side (default: 512 2048 4096)")
    parser.add_argument("--tile", type=int, default=TILE, help="side of the tiles in pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reduced", action="store_true", help="small networks of the same structure")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled networks out")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.md"), help="the report; the figures go beside it as .json, the plot as .svg")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "float16"))
    start = time.perf_counter()
    with torch.no_grad():
        speed = multiply_adds_per_second(dtype, device, 8192 if device.type == "cuda" else 1024)
        results: dict[str, Any] = {
            "machine": describe(device), "cuda": device.type == "cuda", "dtype": str(dtype).removeprefix("torch."),
            "reduced": arguments.reduced, "tile": arguments.tile, "speed": speed,
        }  # fmt: skip
        networks = Networks(dtype, device, arguments.reduced)
        results["eager"] = measure(networks, arguments.sizes, arguments.tile, arguments.repeats, speed)
        if not arguments.no_compile:
            results["compiled"] = measure(networks, arguments.sizes, arguments.tile, arguments.repeats, None, Compiler(arguments.backend))
        del networks
        others = [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.bfloat16]
        results["errors"] = errors(device, arguments.reduced, min(arguments.sizes), others)
        largest = max(arguments.sizes)
        results["cap"] = within_cap(arguments.reduced, largest, arguments.tile, dtype) | {"pixels": largest} if device.type == "cuda" else None
    results["seconds"] = time.perf_counter() - start
    arguments.output.write_text(report(results), encoding="utf-8")
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    try:
        plot(results, arguments.output.with_suffix(".svg"))
    except ImportError:
        print("No plot: matplotlib is not installed.", file=sys.stderr)
    print(report(results))
    print(f"{results['seconds']:.0f} s in all; written to {arguments.output}, .json and .svg beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
