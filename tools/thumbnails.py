"""The templates' thumbnails: what each is about, before and after. ``python -m tools.thumbnails`` writes them anew.

Published weights are not bundled, so all results are the bundled miniature's, on photos that it was not trained on, and say so. Templates of methods that the
miniature does not have show its OSEDiff; the caption says that, and where a picture shows less than its template does.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from fewstep_sr.methods import METHODS
from fewstep_sr.miniature import COLOR_FIX
from pipelines.demo import load_demo
from pipelines.training.degradation import Degradation

ROOT = Path(__file__).resolve().parents[1]
SIDE = 480
STRIP = 40
"""Height of the line below that says what made the picture."""

BADGE = (0.5, 0.15)
"""The page lays "Node graph" over the upper left corner: no writing there, within this share of the width and height."""
BASELINE = SIDE - STRIP - 24
"""Middle of the last line of writing above the strip."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the width and height."""


@cache
def photo(name: str) -> Image.Image:
    """The middle square of a photo, 256 x 256 pixels."""
    image = Image.open(ROOT / "tests" / "data" / "photos" / f"{name}.png").convert("RGB")
    left = (image.width - 256) // 2
    return image.crop((left, 0, left + 256, 256))


@cache
def degraded(name: str) -> Image.Image:
    """The photo at half its size, degraded as mildly as cameras do."""
    pixels = torch.from_numpy(np.array(photo(name))).movedim(-1, 0) / 255  # HWC -> CHW
    low = Degradation(scale=2, mild_chance=1.0)(pixels, seed=7).movedim(0, -1) * 255
    return Image.fromarray(low.round().byte().numpy())


@cache
def restored(name: str, method: str = "osediff", **settings) -> Image.Image:
    return restore(degraded(name), method, **settings)


def restore(image: Image.Image, method: str, **settings) -> Image.Image:
    pipeline, prompt_embeds = load_demo(method)
    pipeline.set_progress_bar_config(disable=True)
    record = METHODS[method]
    options = {option.name: option.default for option in record.options} | dict(record.demo.call) | settings
    generator = torch.Generator().manual_seed(12345)
    return pipeline(image, prompt_embeds=prompt_embeds, color_fix=COLOR_FIX, generator=generator, **pipeline.call_options(options)).images[0]


def enlarged(image: Image.Image, box: Box = (0, 0, 1, 1), size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A part of a square image, bicubically."""
    return image.resize(size, Image.Resampling.BICUBIC, [share * image.width for share in box])


def write(image: Image.Image, text: str, at: tuple[float, float], anchor: str = "mm", size: int = 28) -> None:
    ImageDraw.Draw(image).text(at, text, "white", ImageFont.load_default(size), anchor, stroke_width=2, stroke_fill="black")


def slider(before: Image.Image, after: Image.Image, box: Box = (0, 0, 1, 1)) -> Image.Image:
    """The left half before, the right half after, as the slider of Compare Images shows them."""
    half = SIDE // 2
    image = enlarged(before, box)
    image.paste(enlarged(after, box).crop((half, 0, SIDE, SIDE)), (half, 0))
    draw = ImageDraw.Draw(image)
    draw.line([(half, 0), (half, SIDE)], fill="white", width=3)
    draw.ellipse((half - 15, half - 15, half + 15, half + 15), fill="white")
    draw.polygon([(half - 10, half), (half - 3, half - 7), (half - 3, half + 7)], fill="black")
    draw.polygon([(half + 10, half), (half + 3, half - 7), (half + 3, half + 7)], fill="black")
    write(image, "before", (half // 2, BASELINE))
    write(image, "after", (half + half // 2, BASELINE))
    return image


def one(name: str, box: Box = (0, 0, 1, 1), method: str = "osediff", text: str = "") -> Image.Image:
    image = slider(degraded(name), restored(name, method), box)
    if text:
        write(image, text, (SIDE // 2, BASELINE - 40), size=24)
    return image


def side_by_side(panels: dict[str, Image.Image], left: float, top: float = 0.0, part: float = 1.0, columns: int = 3) -> Image.Image:
    """The same part of several results, with their names: its corner and its height, as shares of the sides."""
    rows = -(-len(panels) // columns)
    width, height = SIDE // columns, (SIDE - STRIP) // rows
    image = Image.new("RGB", (SIDE, SIDE), "white")
    for i, (name, panel) in enumerate(panels.items()):
        x, y = i % columns * width, i // columns * height
        image.paste(enlarged(panel, (left, top, left + part * width / height, top + part), (width - 2, height - 2)), (x, y))
        write(image, name, (x + width // 2, y + height - 24), size=22)
    return image


def inside(name: str, mask: Image.Image, outline: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """Restored inside a mask of SIDE x SIDE pixels, only enlarged outside."""
    image = Image.composite(enlarged(restored(name)), enlarged(degraded(name)), mask.filter(ImageFilter.GaussianBlur(4)))
    outline(ImageDraw.Draw(image))
    write(image, "before", (80, BASELINE))
    return image


def face() -> Image.Image:
    corners = (150, 120, 340, 310)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return inside("astronaut", mask, lambda draw: draw.rectangle(corners, outline="white", width=3))


def region() -> Image.Image:
    corners = (60, 10, 400, 260)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse(corners, fill=255)

    def dashes(draw: ImageDraw.ImageDraw) -> None:
        for angle in range(0, 360, 12):
            draw.arc(corners, angle, angle + 6, fill="white", width=3)

    return inside("coffee", mask, dashes)


OUTLINE = "58,100 62,70 75,50 95,28 130,15 165,20 190,40 203,75 200,105 188,120 178,132 172,150 158,176 185,190 205,220 210,240 240,256 0,256 0,235 15,205 35,165 55,150 92,150 88,138 82,130 68,118"
"""Around the astronaut."""


def cut_out() -> Image.Image:
    """The astronaut without the wall behind her, over the squares that stand for transparency."""
    alpha = Image.new("L", (SIDE, SIDE))
    corners = [tuple(float(number) * SIDE / 256 for number in corner.split(",")) for corner in OUTLINE.split()]
    ImageDraw.Draw(alpha).polygon(corners, fill=255)
    squares = np.indices((SIDE, SIDE)) // 24
    board = Image.fromarray(np.where(squares.sum(0) % 2, 200, 245).astype(np.uint8)).convert("RGB")
    alpha = alpha.filter(ImageFilter.GaussianBlur(8)).point(lambda value: min(255, max(0, (value - 112) * 8)))
    return Image.composite(one("astronaut"), board, ImageChops.lighter(alpha, labels()))


def labels() -> Image.Image:
    """Where :func:`slider` writes and draws, as a mask."""
    black = Image.new("RGB", (SIDE, SIDE))
    return slider(black, black).convert("L").point(lambda value: 255 if value > 100 else 0).filter(ImageFilter.MaxFilter(5))


def tiles() -> Image.Image:
    """Overlapping tiles over the half that is being worked on."""
    image = one("astronaut", method="invsr")
    draw = ImageDraw.Draw(image)
    for x in range(SIDE // 2, SIDE, 110):
        for y in range(0, SIDE, 110):
            draw.rectangle((x, y, x + 130, y + 130), outline="white", width=2)
    return image


def edges() -> Image.Image:
    """What a ControlNet sees, between before and after."""
    lines = photo("coffee").convert("L").filter(ImageFilter.GaussianBlur(2)).filter(ImageFilter.FIND_EDGES).point(lambda value: 255 * (value > 9))
    panels = {"before": degraded("coffee"), "edges": lines.convert("RGB"), "after": restored("coffee")}
    return side_by_side(panels, 0.4)


def video(name: str) -> Image.Image:
    """Frames before and after, on film."""
    image = Image.new("RGB", (SIDE, SIDE), "black")
    draw = ImageDraw.Draw(image)
    for row, (text, frame) in enumerate({"before": degraded(name), "after": restored(name)}.items()):
        top = 20 + row * 220
        for column in range(3):
            left = 0.15 * column
            image.paste(enlarged(frame, (left, 0.1, left + 0.65, 0.85), (154, 178)), (column * 160 + 3, top))
        write(image, text, (SIDE // 2, top + 158))
        for x in range(6, SIDE, 32):
            for y in (top - 14, top + 184):
                draw.rounded_rectangle((x, y, x + 18, y + 8), 2, fill="white")
    return image


def bundled(method: str) -> Image.Image:
    """The photo that the template itself shows, its middle square."""
    low = Image.open(ROOT / "miniature" / "photo.png").convert("RGB")
    high = restore(low, method)
    low, high = low.crop((30, 0, 105, 75)), high.crop((120, 0, 420, 300))
    return slider(low, high) if method == "osediff" else side_by_side({"before": low, "after": high}, 0.05, 0.2, 0.7, columns=2)


def methods_compared() -> Image.Image:
    panels = {"before": degraded("astronaut"), "OSEDiff": restored("astronaut"), "InvSR": restored("astronaut", "invsr")}
    return side_by_side(panels, 0.35, 0.02, 0.8)


def steps_compared() -> Image.Image:
    panels = {"before": degraded("chelsea")}
    for steps in range(1, 6):
        panels[f"{steps} step{'s' * (steps > 1)}"] = restored("chelsea", "invsr", steps=steps, timesteps=())
    return side_by_side(panels, 0.1, 0.15, 0.7)


def strengths_compared() -> Image.Image:
    panels = {"before": degraded("coffee"), "A": restored("coffee"), "B": restored("coffee", timestep=200)}
    return side_by_side(panels, 0.5, 0.1, 0.9)


WHOLE: list[tuple[str, Box]] = [
    ("coffee", (0, 0, 1, 1)),
    ("astronaut", (0, 0, 1, 1)),
    ("chelsea", (0, 0, 1, 1)),
    ("coffee", (0.25, 0.3, 0.95, 1)),
    ("astronaut", (0.2, 0.1, 0.8, 0.7)),
]
PARTS: list[tuple[str, Box]] = [
    ("chelsea", (0.3, 0.3, 1, 1)),
    ("coffee", (0.1, 0, 0.9, 0.8)),
    ("astronaut", (0.1, 0, 0.9, 0.8)),
    ("chelsea", (0.05, 0.15, 0.75, 0.85)),
    ("coffee", (0.1, 0.1, 0.8, 0.8)),
]
"""Parts of photos for the templates that each method has, so that neighbours in the list differ."""

THUMBNAILS: dict[str, Callable[[], Image.Image]] = {
    "1 Try InvSR without a download": lambda: bundled("invsr"),
    "1 Try OSEDiff without a download": lambda: bundled("osediff"),
    "A face, cropped, restored, pasted back (OSEDiff)": face,
    "All five methods compared": methods_compared,
    "Cut-out with transparency (OSEDiff x4)": cut_out,
    "Fidelity or detail (OSEDiff)": strengths_compared,
    "Fidelity or detail (PiSA-SR)": lambda: one("chelsea", (0, 0.1, 0.6, 0.7), text="fidelity or detail"),
    "GAN upscaler, then OSEDiff": lambda: one("astronaut", (0, 0.4, 0.6, 1)),
    "InvSR with 1 to 5 steps compared": steps_compared,
    "Large picture in tiles (InvSR)": tiles,
    "OSEDiff with a LoRA and a ControlNet": edges,
    "OSEDiff x4 with automatic tags": lambda: one("chelsea", text="cat, fur, whiskers"),
    "Only a region, by mask (OSEDiff)": region,
    "Text to image, then InvSR x4": lambda: one("astronaut", method="invsr"),
    "Long video x2 (OSEDiff)": lambda: video("astronaut"),
    "Video x2 (OSEDiff)": lambda: video("chelsea"),
}

MADE = "made with the bundled miniature"
OSEDIFF = "illustration: OSEDiff's miniature"
"""Where the miniature lacks the method, or the template does more than was done for the picture."""
CAPTIONS: dict[str, str] = {
    "All five methods compared": "two of the five, as miniatures",
    "Cut-out with transparency (OSEDiff x4)": OSEDIFF,
    "Fidelity or detail (PiSA-SR)": OSEDIFF,
    "GAN upscaler, then OSEDiff": OSEDIFF,
    "Large picture in tiles (InvSR)": "illustration: InvSR's miniature",
    "Long video x2 (OSEDiff)": OSEDIFF,
    "OSEDiff with a LoRA and a ControlNet": OSEDIFF,
    "OSEDiff x4 with automatic tags": OSEDIFF,
    "Text to image, then InvSR x4": "InvSR's miniature, on a photo",
    "Video x2 (OSEDiff)": OSEDIFF,
}
"""The line below the picture; MADE for the others."""

for place, record in enumerate(sorted(METHODS.values(), key=lambda record: record.title)):
    method = record.key if record.demo else "osediff"
    for template, parts in (("2 Restore one photo ({})", WHOLE), ("{} x4, step by step", PARTS)):
        name, box = parts[place % len(parts)]
        title = template.format(record.title)
        THUMBNAILS[title] = partial(one, name, box, method)
        if not record.demo:
            CAPTIONS[title] = OSEDIFF


def main() -> None:
    for name, draw in THUMBNAILS.items():
        image = draw()
        ImageDraw.Draw(image).rectangle((0, SIDE - STRIP, SIDE, SIDE), fill="black")
        write(image, CAPTIONS.get(name, MADE), (SIDE // 2, SIDE - STRIP // 2), size=24)
        image.save(ROOT / "example_workflows" / f"{name}.jpg", quality=82)


if __name__ == "__main__":
    main()
