"""Flicker of a video that is restored frame by frame, and what lowers it.

    python benchmarks/flicker.py
    python benchmarks/flicker.py --method pisasr --base ... --weights ...

Three clips of eight frames are made of a photo of the tests, seeded: one that stands still, one that pans by two pixels a frame, and one that stands still under grain
that is drawn anew for each frame (standard deviation 6 of 255). Each is halved in size, and the miniature enlarges it twice. Flicker is the mean absolute difference,
in 1/255, of a frame and the one before, which is moved by the known motion; the pan's is a whole pixel of the small frames. ``error`` is the mean absolute difference to the clip
without grain, so that a ghost, or a blur, is seen. In a fourth clip, under grain as well, a square of another photo crosses the picture: its error is of what the square has just
uncovered, where ghosts are.

Options after those that are named here are those of ``upscale``: a method, its base and its weights take the miniature's place.
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
        if grain:
            found["ghosts"] = *_crossed(originals, grain, generator), 0
    return found


def _crossed(still: torch.Tensor, grain: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A square of 48 pixels, brighter and of another photo, moves by eight pixels a frame over a picture that stands still."""
    other = np.asarray(Image.open(ROOT / "tests" / "data" / "photos" / "astronaut.png").convert("RGB"), np.float32) / 255
    square = torch.from_numpy(other)[:48, 200:248].permute(2, 0, 1) * 0.5 + 0.5
    originals = still.clone()
    for i, frame in enumerate(originals):
        frame[:, 40:88, 8 + 8 * i : 56 + 8 * i] = square
    small = F.interpolate(originals, scale_factor=1 / SCALE, mode="area")
    small = (small + grain * torch.randn(small.shape, generator=generator)).clamp(0, 1)
    return (small * 255).round() / 255, originals


def uncovered(images: torch.Tensor, originals: torch.Tensor) -> float:
    """The mean absolute difference, in 1/255, where the square of :func:`_crossed` was up to four frames before."""
    parts = [(images[i] - originals[i])[:, 40:88, max(8, 8 * i - 24) : 8 + 8 * i] for i in range(1, FRAMES)]
    return torch.cat([part.abs().flatten() for part in parts]).mean().item() * 255


def blended(states: torch.Tensor, step: int, newest: float | None) -> torch.Tensor:
    """Start states (T, 4, h, w) averaged over time along the known motion, bicubically where it is no whole cell.

    Args:
        newest: weight of a frame's own in a recursive mean; None for the plain mean of up to eight.
    """
    cells = step / 8
    grid_y, grid_x = (torch.arange(side) for side in states.shape[-2:])
    width, height = states.shape[-1], states.shape[-2]
    grid = torch.stack(torch.broadcast_tensors((2 * (grid_x + cells) + 1) / width - 1, ((2 * grid_y + 1) / height - 1)[:, None]), -1)[None]
    out = [states[:1]]
    for number, state in enumerate(states[1:].split(1), 2):
        moved = F.grid_sample(out[-1], grid.to(state), "bicubic", "border", align_corners=False) if cells else out[-1]
        weight = newest if newest is not None else 1 / min(number, 8)
        out.append(weight * state + (1 - weight) * moved)
    return torch.cat(out)


def flicker(frames: torch.Tensor, step: int) -> float:
    """Of (T, 3, H, W) that moves to the left by ``step`` pixels a frame; a border of 8 is left out."""
    inner = frames[..., 8:-8, 8:-8]
    width = inner.shape[-1] - step
    return (inner[1:, ..., :width] - inner[:-1, ..., step:]).abs().mean().item() * 255


def bicubic(frames: torch.Tensor) -> torch.Tensor:
    return F.interpolate(frames, scale_factor=SCALE, mode="bicubic").clamp(0, 1)


def restorer(method: str, one_draw: bool = True, blend: float | None = 1.0) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``blend``: weight of a frame's own start state in the mean with those before, see :func:`blended`; 1 for none."""
    pipeline, prompt_embeds = load_demo(method)
    pipeline.set_progress_bar_config(disable=True)
    demo = METHODS[method].demo
    options = dict(demo.call) if demo else {}

    stage = "denoise" if method == "invsr" else "one_step"
    own = getattr(pipeline, stage)

    def restore(frames: torch.Tensor, step: int) -> torch.Tensor:
        if blend != 1:
            setattr(pipeline, stage, lambda states, *rest, **named: own(blended(states, step, blend), *rest, **named))
            generators = [torch.Generator().manual_seed(12345) for _ in frames]
            arguments = {"prompt_embeds": prompt_embeds, "generator": generators, "color_fix": None, "output_type": "pt"}
            return pipeline(frames, **arguments, scale=SCALE, **options).images
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


def upscaler(words: list[str]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Frames through ``upscale`` with these options, colours fixed as they say."""
    from accelerate import PartialState

    from pipelines.cli import make_parser
    from pipelines.settings import Settings
    from pipelines.upscale import Upscaler, find_files

    argv = ["upscale", "clip.mp4", "-o", "out.mp4", "--scale", f"{SCALE}", *words]
    settings = Settings.from_arguments(make_parser(argv).parse_args(argv))
    state = PartialState(cpu=settings.device == "cpu")
    restore = Upscaler(settings, *find_files(settings, state), state, lambda job: "").restore
    return lambda frames, step: torch.cat([restore(frame).float().cpu() for frame in frames.split(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", default="chelsea")
    parser.add_argument("--strips", help="a folder for the crossing square's last frames, as pictures to look at")
    arguments, words = parser.parse_known_args()
    from fewstep_sr.image.temporal import Steady

    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {}

    def note(name: str, images: torch.Tensor) -> None:
        """Of the clip that is at work."""
        if clip == "ghosts":
            figures = f"{uncovered(images, originals):.2f}"
            if arguments.strips:
                strip = (torch.cat(list(images[-3:]), -1) * 255).round().byte().permute(1, 2, 0).numpy()
                Path(arguments.strips).mkdir(parents=True, exist_ok=True)
                Image.fromarray(strip).save(Path(arguments.strips, f"{name.replace(', ', '_').replace(' ', '_')}.png"))
        else:
            error = (images - originals)[..., 8:-8, 8:-8].abs().mean().item() * 255
            figures = f"{flicker(images, step):.2f} | {error:.2f}"
        rows.setdefault(name, []).append(figures)
        print(clip, name, figures, flush=True)

    given = upscaler(words) if words else None
    restorers = {} if given else {"InvSR": restorer("invsr"), "OSEDiff": restorer("osediff")}
    blends = {
        f"{title}, wavelet, start states blended{how}": restorer(key, blend=newest)
        for title, key in (() if given else (("InvSR", "invsr"), ("OSEDiff", "osediff")))
        for how, newest in ((" (half the newest)", 0.5), (" (mean of up to eight)", None))
    }
    another_draw = None if given else restorer("invsr", one_draw=False)
    for clip, (small, originals, step) in clips(arguments.photo).items():
        steady = Steady()
        steadied = torch.cat([steady(frame[None]) for frame in small])
        note("originals", originals)
        note("bicubic", bicubic(small))
        note("bicubic, steadied", bicubic(steadied))
        if given:
            note("as given", given(small, step))
            note("as given, steadied", given(steadied, step))
        if another_draw:
            note("InvSR, a draw for each frame, adain", fix_color(another_draw(small, step), small, "adain"))
        for name, restore in restorers.items():
            images = restore(small, step)
            note(f"{name}, no colour fix", images.clamp(0, 1))
            for fix in ("adain", "wavelet"):
                note(f"{name}, {fix}", fix_color(images, small, fix))
            note(f"{name}, colours held over the shot", held_colors(images, small))
            note(f"{name}, wavelet, steadied", fix_color(restore(steadied, step), steadied, "wavelet"))
        for name, restore in blends.items():
            note(name, fix_color(restore(small, step), small, "wavelet"))
    print("\n| | still: flicker | error | pan: flicker | error | grain: flicker | error | ghosts: error |\n|---|---|---|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
