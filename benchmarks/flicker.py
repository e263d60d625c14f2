"""Flicker of a video that is restored frame by frame, and what lowers it.

    python benchmarks/flicker.py

Three clips of eight frames are made of a photo of the tests, seeded: one that stands still, one that pans by two pixels a frame, and one that stands still under grain
that is drawn anew for each frame (standard deviation 6 of 255). Each is halved in size, and the miniature enlarges it twice. Flicker is the mean absolute difference,
in 1/255, of a frame and the one before, which is moved by the known motion; the pan's is a whole pixel of the small frames. ``error`` is the mean absolute difference to the clip
without grain, so that a ghost, or a blur, is seen.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fewstep_sr.image.color import fix_color  # noqa: E402
from fewstep_sr.methods import METHODS  # noqa: E402
from pipelines.demo import load_demo  # noqa: E402

FRAMES, SIDE, SCALE = 8, 128, 2


def clips(photo: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """By name: frames (T, 3, h, w), the clean originals (T, 3, H, W), and how far the picture moves to the left in each frame of the original."""
    image = np.asarray(Image.open(ROOT / "tests" / "data" / "photos" / f"{photo}.png").convert("RGB"), np.float32) / 255
    image = torch.from_numpy(image)[100:, 60:]
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, step, grain in (("still", 0, 0.0), ("pan", SCALE, 0.0), ("grain", 0, 6 / 255)):
        originals = torch.stack([image[:SIDE, i * step : i * step + SIDE] for i in range(FRAMES)]).permute(0, 3, 1, 2)
        small = F.interpolate(originals, scale_factor=1 / SCALE, mode="area")
        small = (small + grain * torch.randn(small.shape, generator=generator)).clamp(0, 1)
        found[name] = (small * 255).round() / 255, originals, step
    return found


def flicker(frames: torch.Tensor, step: int) -> float:
    """Of (T, 3, H, W) that moves to the left by ``step`` pixels a frame; a border of 8 is left out."""
    inner = frames[..., 8:-8, 8:-8]
    width = inner.shape[-1] - step
    return (inner[1:, ..., :width] - inner[:-1, ..., step:]).abs().mean().item() * 255


def bicubic(frames: torch.Tensor) -> torch.Tensor:
    return F.interpolate(frames, scale_factor=SCALE, mode="bicubic").clamp(0, 1)


def restorer(method: str, one_draw: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    pipeline, prompt_embeds = load_demo(method)
    pipeline.set_progress_bar_config(disable=True)
    demo = METHODS[method].demo
    options = dict(demo.call) if demo else {}

    def restore(frames: torch.Tensor) -> torch.Tensor:
        images = []
        for i, frame in enumerate(frames):
            generator = torch.Generator().manual_seed(12345 if one_draw else i)
            arguments = {"prompt_embeds": prompt_embeds, "generator": generator, "color_fix": None, "output_type": "pt", "scale": SCALE}
            images.append(pipeline(frame[None], **arguments, **options).images)
        return torch.cat(images)

    return restore


def held_colors(images: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """AdaIN towards the mean and deviation of the whole shot in place of each frame's."""
    axes = (0, 2, 3)
    mean, deviation = (getattr(frames, name)(axes, keepdim=True) for name in ("mean", "std"))
    own = images.mean(axes, keepdim=True), images.std(axes, keepdim=True)
    return ((images - own[0]) / own[1] * deviation + mean).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", default="chelsea")
    arguments = parser.parse_args()
    from fewstep_sr.image.temporal import Steady

    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {}

    def note(name: str, images: torch.Tensor, originals: torch.Tensor, step: int) -> None:
        error = (images - originals)[..., 8:-8, 8:-8].abs().mean().item() * 255
        rows.setdefault(name, []).append(f"{flicker(images, step):.2f} | {error:.2f}")
        print(name, rows[name][-1], flush=True)

    restorers = {"InvSR": restorer("invsr"), "OSEDiff": restorer("osediff")}
    another_draw = restorer("invsr", one_draw=False)
    for _, (small, originals, step) in clips(arguments.photo).items():
        steady = Steady()
        steadied = torch.cat([steady(frame[None]) for frame in small])
        note("originals", originals, originals, step)
        note("bicubic", bicubic(small), originals, step)
        note("bicubic, steadied", bicubic(steadied), originals, step)
        note("InvSR, a draw for each frame, adain", fix_color(another_draw(small), small, "adain"), originals, step)
        for name, restore in restorers.items():
            images = restore(small)
            note(f"{name}, no colour fix", images.clamp(0, 1), originals, step)
            for fix in ("adain", "wavelet"):
                note(f"{name}, {fix}", fix_color(images, small, fix), originals, step)
            note(f"{name}, colours held over the shot", held_colors(images, small), originals, step)
            note(f"{name}, wavelet, steadied", fix_color(restore(steadied), steadied, "wavelet"), originals, step)
    print("\n| | still: flicker | error | pan: flicker | error | grain: flicker | error |\n|---|---|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
