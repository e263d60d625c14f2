"""What the README shows of the miniature: photos that it never saw, beside bicubic enlargement and the originals."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from fewstep_sr.files import require_room
from fewstep_sr.image.formats import FORMATS
from fewstep_sr.methods import METHODS
from pipelines.demo import load_demo
from pipelines.pictures import read_pixels, read_size
from pipelines.training.degradation import Degradation


@torch.no_grad()
def compare(photos: Sequence[Path], path: Path, degradation: Degradation, seed: int = 0) -> None:
    """Write a row for each photo, cropped to multiples of 64: bicubic enlargement by 4 of what ``degradation`` leaves, OSEDiff, InvSR, the original.

    Raises:
        OSError, ValueError: it cannot be written, or a photo cannot be read or is too small; nothing is computed then.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"-o: found {path.name}, expected a name that ends in {', '.join(FORMATS)}.")
    require_room(path)
    for photo in photos:
        if min(size := read_size(photo)) < 64:
            raise ValueError(f"{photo}: found {size[0]} x {size[1]} pixels, expected 64 a side at least.")
    demos = {method: load_demo(method) for method in ("osediff", "invsr")}
    rows = []
    for i, photo in enumerate(photos):
        hq = read_pixels(photo).tensor()
        hq = hq[..., : hq.shape[-2] // 64 * 64, : hq.shape[-1] // 64 * 64]
        lq = degradation(hq[0], seed + i)[None]
        row = [F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False)]
        for method, (pipeline, prompt_embeds) in demos.items():
            generator, call = torch.Generator().manual_seed(0), METHODS[method].demo.call
            row.append(pipeline(lq, prompt_embeds=prompt_embeds, generator=generator, color_fix="wavelet", output_type="pt", **call).images)
        rows.append(torch.cat([*row, hq], -1)[0])
    width = max(row.shape[-1] for row in rows)
    sheet = torch.cat([F.pad(row, (0, width - row.shape[-1]), value=1.0) for row in rows], -2)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()).save(path, quality=92)
