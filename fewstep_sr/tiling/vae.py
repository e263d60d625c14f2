"""A VAE's encoder or decoder over pictures of any size and number: whole where one tile holds them, else in tiles."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .batching import Runtime, run_in_groups
from .host import HostCopies
from .mosaic import mosaic
from .tiles import Tile, TileLayout
from .whole_picture import Share, WholePicture, share_whole_picture

CPU = torch.device("cpu")

OVERLAP = 8
"""Cells that tiles share at least."""

MARGIN = 2
"""Cells along a tile's border with a neighbour that are left to the neighbour: padding there, where the picture goes on, spoils them most."""

MIN_TILE = 16
"""Side of the smallest tiles, in cells."""

MIN_MOSAIC, MAX_MOSAIC = 32**2, 128**2
"""Cells of the reduced pass, where memory allows: a half of the picture within these bounds, one tile at least."""

TOLERANCE = 0.03
"""By how much the statistics of the reduced pass may be off, in deviations, before a picture's tiles run again with corrected ones."""

MAX_RUNS = 3
"""Of a picture's tiles."""


@dataclass(frozen=True)
class TiledCoder:
    """An encoder or a decoder.

    Args:
        network: the VAE.
        call: what it makes of a part (n, C, h, w), as float32: ``call(network, part)``, with a copy of the network where there are tiles.
        attention: see :func:`fewstep_sr.tiling.whole_picture.share_whole_picture`.
        scale_in, scale_out: elements for each latent pixel along a side, of what goes in and of what comes out.
        fitting: how many tiles of (height, width) cells go through it in one call.
        device: where ``call`` takes its parts to. A picture in tiles goes there and comes back as a whole where the runtime says that it fits.
        runtime: see :class:`fewstep_sr.tiling.batching.Runtime`.
        prepare: what it takes to make a part one that goes in: range and type, so that no more bytes are sent to the device than the network reads.
        compiled: ``call``, compiled, for pictures and tiles one at a time: another number of them would be another graph. The reduced pass goes through ``call``.
    """

    network: nn.Module
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    attention: Callable[[nn.Module, nn.Module, WholePicture], None]
    scale_in: int
    scale_out: int
    fitting: Callable[[int, int], int]
    runtime: Runtime
    device: torch.device = CPU
    compiled: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda part: part

    def run(self, source: Callable[[int], torch.Tensor], result: torch.Tensor, tile: int) -> None:
        """Code every picture, with smaller tiles where memory runs out.

        Args:
            source: ``source(i)`` is picture i (1, C, H, W), asked for when it is its turn.
            result: zeros (B, C, h, w), to which the answers are added.
            tile: side of the tiles in cells, or less where as many smaller ones cover the picture.
        """
        height, width = (side // self.scale_out for side in result.shape[-2:])
        most = None
        while True:
            try:
                return self._run(
                    source, result, TileLayout(height, width, max(even_tile(height, tile), even_tile(width, tile)), OVERLAP, MARGIN), most
                )
            except Exception as error:
                if tile <= MIN_TILE or not self.runtime.is_out_of_memory(error):
                    raise
            self.runtime.free_memory()  # outside the except block, which keeps the tensors alive
            tile, most = max(MIN_TILE, min(tile, max(height, width)) // 2), 1
            logging.warning("VAE: out of memory, going on with tiles of %d pixels", tile * max(self.scale_in, self.scale_out))
            result.zero_()

    def _run(self, source, result: torch.Tensor, layout: TileLayout, most: int | None) -> None:
        first = layout.tiles[0]
        fitting = most or max(1, self.fitting(first.height, first.width))
        group, coded = (1, self.compiled) if self.compiled else (fitting, self.call)
        copies = HostCopies(self.runtime.locks_memory(self.device))
        if len(layout.tiles) == 1:
            return self._code_whole(source, result, coded, group, copies)
        whole = WholePicture()
        network = share_whole_picture(self.network, whole, self.attention)
        area, size = first.height * first.width, layout.height * layout.width
        reduced_cells = max(area, min(max(MIN_MOSAIC, size // 2), MAX_MOSAIC, fitting * area))
        update = self.runtime.progress(len(result) * len(layout.tiles))

        def call(part: torch.Tensor) -> torch.Tensor:
            return self.call(network, self.prepare(part))

        def call_tiles(tiles: torch.Tensor) -> torch.Tensor:
            return coded(network, tiles)

        for i, whole_result in enumerate(result):
            canvas = self._place(source(i))
            blended = self._place(whole_result)

            def code_tiles(tiles: list[Tile], canvas=canvas, blended=blended) -> None:
                parts = self.prepare(torch.cat([tile.cut(canvas, self.scale_in) for tile in tiles]))
                shares = [share_of(layout, tile) for tile in tiles]
                answers = whole.watch(call_tiles, copies.send(parts, self.device), shares, self.scale_in, self.compiled is not None)
                copies.receive(answers, blended.device, partial(self._blend, blended, layout, tiles))

            reduced = mosaic(canvas, reduced_cells, self.scale_in)
            self.runtime.before_call()
            whole.collect(call, reduced)
            group = run_in_groups(layout.tiles, group, code_tiles, self.runtime, update)
            for _ in range(1, 1 if reduced.is_whole else MAX_RUNS):
                if whole.off() <= TOLERANCE:
                    break
                copies.finish()
                blended.zero_()
                self.runtime.before_call()
                whole.correct(call, reduced)
                group = run_in_groups(layout.tiles, group, code_tiles, self.runtime, self.runtime.progress(len(layout.tiles)))
            copies.finish()
            if blended is not whole_result:
                whole_result.copy_(blended)

    def _code_whole(self, source, result: torch.Tensor, coded, group: int, copies: HostCopies) -> None:
        """Pictures that are one tile each go together."""

        def code(pictures: range) -> None:
            answers = coded(self.network, copies.send(self.prepare(torch.cat([source(i) for i in pictures])), self.device))
            copies.receive(answers, result.device, result[pictures.start : pictures.stop].copy_)

        run_in_groups(range(len(result)), group, code, self.runtime, self.runtime.progress(len(result)))
        copies.finish()

    def _blend(self, blended: torch.Tensor, layout: TileLayout, tiles: list[Tile], answers: torch.Tensor) -> None:
        for tile, answer in zip(tiles, answers.to(blended), strict=True):
            tile.cut(blended, self.scale_out).add_(answer * layout.window(tile, self.scale_out, blended.device))

    def _place(self, canvas: torch.Tensor) -> torch.Tensor:
        """``canvas`` on the network's device, or itself where it does not fit there."""
        return canvas.to(self.device) if self.runtime.has_room(canvas.nbytes, self.device) else canvas


def share_of(layout: TileLayout, tile: Tile) -> Share:
    """A tile's share of the picture, as a part of the tile."""
    share = layout.share(tile)
    top, left = share.top - tile.top, share.left - tile.left
    return slice(top, top + share.height), slice(left, left + share.width)


def even_tile(length: int, tile: int) -> int:
    """The smallest tile that covers ``length`` with no more tiles than ``tile`` does."""
    count = 1 if length <= tile else math.ceil((length - OVERLAP) / (tile - OVERLAP))
    return max(math.ceil((length + (count - 1) * OVERLAP) / count), MIN_TILE)
