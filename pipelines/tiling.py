"""A tiled UNet for large pictures: overlapping tiles of the latents, blended."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sr.tiles import TileLayout


@dataclass(frozen=True)
class UNetTiling:
    """Side and overlap of the tiles in latent cells of 8 pixels. Latents that fit into one tile are not tiled."""

    tile: int
    overlap: int

    def run(self, network: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        """``network`` over the tiles of ``latents`` (B, 4, h, w); the result has their shape."""
        layout = TileLayout(*latents.shape[-2:], tile=self.tile, overlap=self.overlap)
        if len(layout.tiles) == 1:
            return network(latents)
        blended = torch.zeros_like(latents, dtype=torch.float32)
        for tile in layout.tiles:
            part = network(tile.cut(latents)).float()
            tile.cut(blended).add_(part * layout.window(tile).to(part))
        return blended
