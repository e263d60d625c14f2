"""What the miniature makes of photos that it was not trained on, beside bicubic enlargement: PSNR, GMSD, HaarPSI and FSIM.

    python benchmarks/quality.py --photos tests/data/photos --seeds 6
    python benchmarks/quality.py --mild-degradation 1

Every photo is cropped to a multiple of 64 pixels, degraded to a quarter by the seeded degradation of the training, at its published settings or as mildly as
cameras do, and restored. GMSD is better the lower it is, the others the higher. The colours are the low-quality picture's (wavelet). ``vae`` is the miniature's own VAE, encode and decode, on the undegraded photo: no restoration goes beyond it.
"""

import argparse
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import piq
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fewstep_sr.methods import INVSR
from pipelines.demo import load_demo
from pipelines.pictures import read_pixels
from pipelines.training.degradation import Degradation

METRICS = {"PSNR": piq.psnr, "GMSD": piq.gmsd, "HaarPSI": piq.haarpsi, "FSIM": piq.fsim}

Restore = Callable[[torch.Tensor], torch.Tensor]


def methods() -> dict[str, Restore]:
    """Low-quality pictures (1, 3, h, w) in [0, 1] to four times their size, in each way."""

    def restore(lq: torch.Tensor, demo, **settings) -> torch.Tensor:
        pipeline, prompt_embeds = demo
        generator = torch.Generator().manual_seed(0)
        return pipeline(lq, prompt_embeds=prompt_embeds, generator=generator, color_fix="wavelet", output_type="pt", **settings).images

    invsr, osediff = load_demo("invsr"), load_demo("osediff")
    for pipeline, _ in (invsr, osediff):
        pipeline.set_progress_bar_config(disable=True)
    return {
        "bicubic": lambda lq: F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1),
        "OSEDiff": partial(restore, demo=osediff),
        "InvSR": partial(restore, demo=invsr, **INVSR.demo.call),
        "InvSR, from 200": partial(restore, demo=invsr, num_inference_steps=1),
        "InvSR, 5 steps": partial(restore, demo=invsr, num_inference_steps=5),
    }


def read_photo(path: Path) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1], cropped to multiples of 64."""
    photo = read_pixels(path).tensor()
    height, width = (side // 64 * 64 for side in photo.shape[-2:])
    return photo[..., :height, :width]


@torch.no_grad()
def measure(photos: list[Path], seeds: int, names: Collection[str] | None = None, mild: float = 0.0) -> dict[str, dict[str, float]]:
    """Means over photos and seeds of each metric, for each method, or those of these names, and the VAE alone. ``mild`` is the share of mild degradations."""
    restorers = {name: restore for name, restore in methods().items() if names is None or name in names}
    degradation = Degradation(mild_chance=mild)
    vae = load_demo()[0].vae
    figures: dict[str, list[list[float]]] = {name: [] for name in (*restorers, "vae")}
    for path in photos:
        photo = read_photo(path)
        figures["vae"].append(_figures(vae.decode(vae.encode(photo * 2 - 1).latent_dist.mode()).sample / 2 + 0.5, photo))
        for seed in range(seeds):
            lq = degradation(photo[0], seed)[None]
            for name, restore in restorers.items():
                figures[name].append(_figures(restore(lq), photo))
    return {name: dict(zip(METRICS, np.mean(rows, 0).tolist(), strict=True)) for name, rows in figures.items()}


def _figures(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    return [metric(found.float().clamp(0, 1), expected).item() for metric in METRICS.values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path(__file__).resolve().parent.parent / "tests/data/photos")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--mild-degradation", type=float, default=0.0, metavar="SHARE", help="chance of the mild degradation (default: %(default)g)")
    arguments = parser.parse_args()
    table = measure(sorted(arguments.photos.glob("*.png")), arguments.seeds, mild=arguments.mild_degradation)
    print("| |", " | ".join(METRICS), "|\n|---|" + "---|" * len(METRICS))
    for name, row in table.items():
        print(f"| {name} |", " | ".join(f"{value:.3f}" if metric != "PSNR" else f"{value:.2f}" for metric, value in row.items()), "|")
