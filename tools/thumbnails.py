"""The templates' thumbnails: the bundled photo before and after the bundled miniature. ``python -m tools.thumbnails`` writes them anew.

Published weights are not bundled, so the templates of other methods show the miniature's OSEDiff, and all say what they show.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fewstep_sr.methods import METHODS
from fewstep_sr.miniature import COLOR_FIX
from pipelines.demo import load_demo

ROOT = Path(__file__).resolve().parents[1]
SIZE = (480, 320)


def restore(method: str, photo: Image.Image) -> Image.Image:
    pipeline, prompt_embeds = load_demo(method)
    record = METHODS[method]
    options = {option.name: option.default for option in record.options} | dict(record.demo.call)
    generator = torch.Generator().manual_seed(12345)
    return pipeline(photo, prompt_embeds=prompt_embeds, color_fix=COLOR_FIX, generator=generator, **pipeline.call_options(options)).images[0]


def thumbnail(before: Image.Image, after: Image.Image) -> Image.Image:
    """The left half before, the right half after, as the slider of Compare Images shows them."""
    image = before.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
    half = SIZE[0] // 2
    image.paste(after.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).crop((half, 0, *SIZE)), (half, 0))
    draw = ImageDraw.Draw(image)
    draw.line([(half, 0), (half, SIZE[1])], fill="white", width=2)
    for x, anchor, text, size in (
        (10, "ls", "before", 20),
        (SIZE[0] - 10, "rs", "after", 20),
        (half + 8, "lt", "illustration: bundled miniature", 13),
    ):
        y = 8 if anchor == "lt" else SIZE[1] - 10
        draw.text((x, y), text, "white", ImageFont.load_default(size), anchor, stroke_width=2, stroke_fill="black")
    return image


def main() -> None:
    photo = Image.open(ROOT / "miniature" / "photo.png")
    images = {method: thumbnail(photo, restore(method, photo)) for method in ("osediff", "invsr")}
    for path in (ROOT / "example_workflows").glob("*.json"):
        images["invsr" if "InvSR" in path.stem else "osediff"].save(path.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
