"""Seconds of our OSEDiff and of its authors' program on this CPU, in turns, in one run.

    python benchmarks/against_osediff.py --checkout OSEDiff --python OSEDiff/.venv/bin/python
    python benchmarks/against_osediff.py --checkout OSEDiff --python ... --sizes 256 512 --pairs 4 --threads 1

``--checkout`` is a copy of the authors' repository (cswry/OSEDiff) and ``--python`` the interpreter of an environment that it runs in. No weights are needed: networks have Stable
Diffusion 2.1's shapes and random weights, adapters rank 4, text encoder and tagger are left out. Each program is a process of its own. They take turns, every
second time in the other order; ratios are of the same turn, and their median counts. Processor seconds are the better measure where others use the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from full_size import Networks
from gpu_report import table

OURS = {
    "float32": (torch.float32, False),
    "float32, light decoder": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, light decoder": (torch.bfloat16, True),
}
THEIRS = "OSEDiff's program, float32"


def build(checkpoint: Path, dtype: torch.dtype, light: bool):
    """Our pipeline as ``upscale`` sets it up on a CPU, on random weights."""
    from diffusers import DDPMScheduler

    from pipelines import OSEDiffPipeline
    from pipelines.processor import choose, choose_convolutions, fit_threads

    fit_threads()
    networks = Networks(torch.float32, torch.device("cpu"))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    vae = networks.light_vae if light else networks.vae
    pipeline = OSEDiffPipeline(vae=vae, text_encoder=None, tokenizer=None, unet=networks.unet, scheduler=scheduler)
    pipeline.load_weights(checkpoint)
    pipeline.prepare({})
    choice = choose([dtype])
    convolutions = choose_convolutions(*choice)
    print(*choice, convolutions, file=sys.stderr)
    pipeline.convert(*choice)
    pipeline.replace_convolutions(convolutions)
    pipeline.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def serve(checkpoint: Path, name: str) -> None:
    """As benchmarks/their_osediff.py."""
    torch.manual_seed(0)
    pipeline = build(checkpoint, *OURS[name])
    embeds = torch.randn(1, 77, 1024)
    print(f"PyTorch {torch.__version__}", flush=True)
    for line in sys.stdin:
        image = torch.rand(1, 3, int(line) // 4, int(line) // 4)
        clock, processor = time.perf_counter(), time.process_time()
        pipeline(image, prompt_embeds=embeds, color_fix=None, output_type="pt")
        print(time.perf_counter() - clock, time.process_time() - processor, flush=True)


class Program:
    """A process that says how long each image took it."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.version = self._read()

    def seconds(self, pixels: int) -> tuple[float, float]:
        """On the clock, and of the processor."""
        self.process.stdin.write(f"{pixels}\n")
        self.process.stdin.flush()
        clock, processor = map(float, self._read().split())
        return clock, processor

    def _read(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)}: ended with exit status {self.process.wait()}. Its own message is above.")
        return line

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(programs: dict[str, Program], pixels: int, pairs: int) -> list[list[str]]:
    """Rows of the table: medians of each program's seconds, and of the ratios to the first one's."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for program in programs.values():  # the first image takes longer
        program.seconds(pixels)
    for turn in range(pairs):
        for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(programs[name].seconds(pixels))
    reference = next(iter(found.values()))
    rows = []
    for name, seconds in found.items():
        row = [f"{pixels}²", name]
        for kind in (0, 1):
            ratios = [own[kind] / theirs[kind] for own, theirs in zip(seconds, reference, strict=True)]
            row += [
                f"{statistics.median(own[kind] for own in seconds):.2f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, help="the authors' repository")
    parser.add_argument("--python", default=sys.executable, help="interpreter of its environment (default: this one)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the results in pixels")
    parser.add_argument("--pairs", type=int, default=4, help="turns of each program (default: %(default)s)")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="what of ours to measure")
    parser.add_argument("--threads", type=int, help="of each program (default: what each of them takes)")
    parser.add_argument("--checkpoint", type=Path, help="where the random adapter is, or goes (default: a temporary file)")
    parser.add_argument("--serve", choices=OURS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.checkpoint, arguments.serve)
        sys.exit()
    if not arguments.checkout or not (arguments.checkout / "osediff.py").is_file():
        parser.error(f"--checkout: found {arguments.checkout}, expected a copy of the repository cswry/OSEDiff, with osediff.py in it.")
    use_huge_pages = {"THP_MEM_ALLOC_ENABLE": "1"}  # as upscale does
    environment = os.environ | ({"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {})
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "osediff.pkl"
        theirs = [arguments.python, str(here.with_name("their_osediff.py")), str(arguments.checkout), str(checkpoint)]
        programs = {THEIRS: Program(theirs, environment)}  # which writes the adapter
        for name in arguments.ours:
            command = [sys.executable, str(here), "--serve", name, "--checkpoint", str(checkpoint)]
            programs[f"ours, {name}"] = Program(command, use_huge_pages | environment)
        print("; ".join(f"{name}: {program.version}" for name, program in programs.items()), file=sys.stderr, flush=True)
        rows = []
        for pixels in arguments.sizes:
            rows += compare(programs, pixels, arguments.pairs)
            print(*rows[-len(programs) :], sep="\n", file=sys.stderr, flush=True)
        for program in programs.values():
            program.end()
    print(table(["result", "", "s", "to theirs", "processor s", "to theirs"], rows))
