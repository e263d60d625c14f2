"""Wall time, peak memory and seams of the nodes in a real ComfyUI, on small networks with random weights (tests/toys.py).

    python benchmarks/run.py --sizes 512 1024 2048     # peak memory, each size in a process of its own
    python benchmarks/run.py --seams                   # tiles against the whole picture

Run it with ComfyUI's Python; ComfyUI is looked for in COMFYUI_PATH, then in ~/comfy/ComfyUI.
"""

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
SEED, TILE = 5, 256  # pixels


def load_nodes():
    """ComfyUI's node classes, the pack's among them, on the CPU."""
    sys.argv = sys.argv[:1]
    sys.path[:0] = [str(COMFYUI), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    from comfy.cli_args import args

    args.cpu = True
    import nodes

    async def load():
        await nodes.init_public_apis()
        await nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")

    asyncio.run(load())
    sys.path.append(str(ROOT))
    return nodes.NODE_CLASS_MAPPINGS


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_once(size: int) -> None:
    """Encode, one tiled OSEDiff step, decode; prints the time and the peak above what was there before, pictures and latents included."""
    nodes = load_nodes()
    import toys

    model, vae = toys.comfy_model(SEED), toys.comfy_vae(SEED)
    picture = torch.rand(1, size, size, 3)
    before, start = peak_mib(), time.perf_counter()
    with torch.inference_mode():
        latent = nodes["FewStepSRVAEEncode"].execute(picture, vae, tile_size=TILE)[0]
        tiled = nodes["FewStepSRTiledModel"].execute(model, tile_size=32, overlap=8)[0]
        restored = nodes["OSEDiffOneStep"].execute(tiled, toys.conditioning(SEED), latent)[0]
        nodes["FewStepSRVAEDecode"].execute(restored, vae, tile_size=TILE)
    print(f"| {size}² | {time.perf_counter() - start:.0f} s | {peak_mib() - before:.0f} MiB | {12 * size**2 / 2**20:.0f} MiB |", flush=True)


def seams() -> None:
    nodes = load_nodes()
    import seams as meter
    import toys

    from sr.tiles import TileLayout

    vae, size = toys.comfy_vae(SEED), 512
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=(size, size), mode="bicubic").clamp(0, 1).movedim(1, -1)
    rows, columns = meter.borders(TileLayout(size // 8, size // 8, TILE // 8, 8), 8)
    for name, picture in (("smooth", smooth), ("textured", toys.picture(1, size, size))):
        with torch.inference_mode():
            latent = nodes["FewStepSRVAEEncode"].execute(picture, vae, tile_size=size)[0]
            whole, tiled = (nodes["FewStepSRVAEDecode"].execute(latent, vae, tile_size=side)[0].movedim(-1, 1) for side in (size, TILE))
        found = meter.measure(tiled, whole, rows, columns)
        print(f"| {name} | {found.gradient_ratio:.3f} | {', '.join(f'{e:.3f}' for e in found.error_by_distance)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[])
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seams", action="store_true")
    arguments = parser.parse_args()
    if arguments.once:
        run_once(arguments.once)
    for side in arguments.sizes:
        subprocess.run([sys.executable, __file__, "--once", str(side)], check=True)
    if arguments.seams:
        seams()
