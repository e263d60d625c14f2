"""A picture's real size in its LATENT, and on which sides the padding lies after core's flips and rotations."""

from collections.abc import Callable

import torch

from ..fewstep_sr.image.sizes import padded_side
from .checks import PIXELS_PER_CELL

SIZE_KEY = "fewstep_sr_size"
"""LATENT's extra key: (height, width) in pixels of the picture that was encoded, before padding."""

THUMBNAIL_KEY = "fewstep_sr_thumbnail"
"""LATENT's extra key: the encoded pictures small, (B, 4, h, w), by which it is seen how a latent was turned since."""

MAX_SIDE = 32
"""Cells of a thumbnail's longer side."""

ALIKE = 0.5
"""Correlation from which a latent is taken for a picture that was encoded: a restored one has more, another picture less."""

Turn = Callable[[torch.Tensor], torch.Tensor]

UPRIGHT: dict[str, Turn] = {
    "as encoded": lambda x: x,
    "flipped horizontally": lambda x: x.flip(3),
    "flipped vertically": lambda x: x.flip(2),
    "rotated by 180 degrees": lambda x: x.flip(2, 3),
}
SIDEWAYS: dict[str, Turn] = {
    "rotated by 90 degrees": lambda x: x.rot90(1, (3, 2)),
    "rotated by 270 degrees": lambda x: x.rot90(3, (3, 2)),
    "transposed": lambda x: x.transpose(2, 3),
    "rotated by 180 degrees and transposed": lambda x: x.transpose(2, 3).flip(2, 3),
}


def remember_size(samples: torch.Tensor, height: int, width: int) -> dict:
    """The LATENT of encoded pictures of ``height`` x ``width`` pixels."""
    return {"samples": samples, SIZE_KEY: (height, width), THUMBNAIL_KEY: thumbnail(samples)}


def picture_size(latent: dict) -> tuple[int, int]:
    """Height and width in pixels of the picture in a LATENT that lies as it was encoded.

    It is the whole latent's where it was resized since or is another node's. Raises ValueError where it was flipped or rotated.
    """
    turn, rows, columns, _ = find_picture(latent)
    if turn != "as encoded":
        raise ValueError(
            f"latent: it was {turn} since it was encoded, expected it as 'VAE Encode (Few-Step SR)' gives it. Flip or rotate the image before it is "
            "encoded, or the latent after it is sampled."
        )
    return rows.stop - rows.start, columns.stop - columns.start


def find_picture(latent: dict) -> tuple[str, slice, slice, str | None]:
    """Where the picture lies in a decoded LATENT.

    Returns:
        How it was turned since it was encoded, the picture's rows and columns without the padding, and what could not be known, in words.
    """
    samples = latent["samples"]
    height, width = (side * PIXELS_PER_CELL for side in samples.shape[-2:])
    known = latent.get(SIZE_KEY)
    whole = ("as encoded", slice(0, height), slice(0, width), None)
    if not known:
        return whole
    padded = padded_side(known[0]), padded_side(known[1])
    if padded == tuple(known):
        return whole  # no padding: nothing to crop
    turns = {}
    if (height, width) == padded:
        turns |= UPRIGHT
    if (width, height) == padded:
        turns |= SIDEWAYS
    if not turns:
        return *whole[:3], (
            f"it was resized or cropped since a picture of {known[1]} x {known[0]} pixels was encoded. It is decoded whole: up to "
            f"{PIXELS_PER_CELL - 1} pixels along an edge may be padding."
        )
    turn, mixed = _find_turn(latent, turns)
    if mixed:
        return *whole[
            :3
        ], "it holds pictures of several encodes, whose sizes may differ. It is decoded whole: up to 7 pixels along an edge may be padding."
    # Where the padding lies, by turning a picture of ones in it.
    inside = torch.zeros(1, 1, *padded, dtype=torch.bool)
    inside[..., : known[0], : known[1]] = True
    inside = {**UPRIGHT, **SIDEWAYS}[turn](inside)[0, 0]
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    return turn, slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1), None


def _find_turn(latent: dict, turns: dict[str, Turn]) -> tuple[str, bool]:
    """How the latents were turned, and whether some of them are not of the batch that was encoded while others are."""
    first, thumbnail = next(iter(turns)), latent.get(THUMBNAIL_KEY)
    if thumbnail is None:
        return first, False
    alike = {}
    for name, turn in turns.items():
        encoded = turn(thumbnail)
        alike[name] = correlation(_reduced(latent["samples"], tuple(encoded.shape[-2:])), encoded)
    best = max(alike, key=lambda name: alike[name].mean())
    # What a turn hardly changes, such as a plain picture, lies as it was encoded.
    turn = best if alike[best].mean() > max(ALIKE, alike[first].mean() + 0.02) else first
    recognised = alike[turn] > ALIKE
    return turn, bool(recognised.any() and not recognised.all() and len(recognised) > len(thumbnail))


def correlation(samples: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    """(B,) of each sample with the encoded picture that it is most like."""
    samples, encoded = (_standardised(x) for x in (samples, encoded))
    if len(samples) == len(encoded):
        return (samples * encoded).sum(1)
    return (samples @ encoded.T).amax(1)


def _standardised(latents: torch.Tensor) -> torch.Tensor:
    flat = (latents - latents.mean((2, 3), keepdim=True)).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-6)


def thumbnail(samples: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, h, w) reduced to :data:`MAX_SIDE` cells a side at most."""
    height, width = samples.shape[-2:]
    scale = max(1.0, max(height, width) / MAX_SIDE)
    return _reduced(samples, (max(1, round(height / scale)), max(1, round(width / scale))))


def _reduced(samples: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(samples.float().cpu(), size)
