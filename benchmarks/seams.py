"""The seam meter: what tiles did to a picture, by the distance to their borders.

It compares with the untiled result, so that it means something for any network: a picture's own edges are in both.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seams:
    """``error_by_distance``: root mean square error relative to the untiled picture's deviation, in eighths of the way from a border to a tile's middle.

    ``gradient_ratio``: over all rows and columns at a border, the worst mean gradient relative to the untiled picture's in the same place; 1 is no seam.
    """

    error_by_distance: list[float]
    gradient_ratio: float


def measure(tiled: torch.Tensor, whole: torch.Tensor, rows: list[int], columns: list[int]) -> Seams:
    """Compare pictures or latents (B, C, H, W); ``rows`` and ``columns`` are where tiles begin and end inside the canvas."""
    error = (tiled - whole).double().square().mean(dim=(0, 1))
    distance = torch.minimum(_distance(whole.shape[-2], rows)[:, None], _distance(whole.shape[-1], columns)[None])
    bins = (distance / (distance.max() + 1) * 8).long()
    by_distance = [(error[bins == i].mean().sqrt() / whole.double().std()).item() for i in range(8) if (bins == i).any()]
    ratios = [r for dim, borders in ((-2, rows), (-1, columns)) for r in _ratios(tiled.double(), whole.double(), dim, borders)]
    return Seams(by_distance, max(ratios, default=1.0))


def _distance(length: int, borders: list[int]) -> torch.Tensor:
    positions = torch.arange(length) + 0.5
    return torch.stack([(positions - border).abs() for border in borders] or [torch.full((length,), float(length))]).amin(0)


def _ratios(tiled: torch.Tensor, whole: torch.Tensor, dim: int, borders: list[int]) -> list[float]:
    """Mean gradient across each border over the untiled picture's, relative to the same in the rest of the picture."""
    across = [t.diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1) for t in (tiled, whole)]
    ratio = across[0] / (across[1] + 1e-3 * across[1].mean())
    inside = torch.ones(len(ratio), dtype=torch.bool)
    inside[[b - 1 for b in borders]] = False
    return [(ratio[b - 1] / ratio[inside].median()).item() for b in borders]


def borders(layout, scale: int = 1) -> tuple[list[int], list[int]]:
    """Rows and columns at which a :class:`sr.tiles.TileLayout`'s tiles begin and end, the canvas's own borders left out."""
    tile = layout.tiles[0]
    return tuple(
        sorted({edge * scale for start in starts for edge in (start, start + side)} - {0, length * scale})
        for starts, side, length in ((layout.tops, tile.height, layout.height), (layout.lefts, tile.width, layout.width))
    )
