"""What the tiles of a VAE are normalised with: ways to get it, measured against the untiled picture.

    python benchmarks/reduced_pass.py                     # random weights
    python benchmarks/reduced_pass.py --vae PATH --size 768 --tile 256 --photo FILE ...

- own: each tile by itself.
- exact, recorded: the untiled picture's, for which it must run untiled once; what an exact way can reach at most.
- exact, in step: all tiles at once, waiting for each other at every normalisation, so that all their activations are kept.
- bicubic: a reduced picture's. matched: one that has the picture's mean and deviation in every channel again.
- mosaic: blocks from all over the picture at full resolution, matched, too; of 6 and of 8 cells, of which all count alike.
- counted: the mosaic of 6 in which edges do not count, and borders by their share.

Error is relative to the untiled result's deviation; tone is what is left of it in squares of 4 cells.
"""

import argparse
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import networks
import seams
import torch
import torch.nn.functional as F
from run import forget_peak, machine, resident

from fewstep_sr.tiling import mosaic as mosaics
from fewstep_sr.tiling.mosaic import Mosaic, mosaic
from fewstep_sr.tiling.tiles import Tile, TileLayout
from fewstep_sr.tiling.vae import MAX_MOSAIC, MIN_MOSAIC, OVERLAP
from fewstep_sr.tiling.whole_picture import WholePicture, share_whole_picture
from pipelines.tiling import _share_attention


class InStep(WholePicture):
    """Statistics of all tiles, of which each runs in a thread of its own and waits for the others; overlaps count by their windows."""

    def __init__(self, layout: TileLayout):
        super().__init__()
        self.layout, self.local, self.parts = layout, threading.local(), {}
        self.barrier = threading.Barrier(len(layout.tiles))

    def exchange(self, key, part):
        """All tiles' parts, as soon as all are there."""
        self.parts.setdefault(key, {})[self.local.tile] = part
        self.barrier.wait()
        parts = self.parts[key]
        self.barrier.wait()
        self.parts.pop(key, None)
        return [parts[tile] for tile in self.layout.tiles]

    def normalize(self, norm, x: torch.Tensor) -> torch.Tensor:
        tile = self.local.tile
        scale = math.isqrt(math.prod(x.shape[2:]) // (tile.height * tile.width))
        weight = self.layout.window(tile, scale).flatten()
        groups = x.reshape(norm.num_groups, -1, weight.numel()).double()
        moments = torch.stack([(groups**power * weight).sum((1, 2)) for power in (0, 1, 2)])
        count, total, squares = sum(self.exchange(norm, moments))
        mean = total / count
        self._statistics[norm] = mean.float(), (squares / count - mean**2).float()
        return super().normalize(norm, x)

    def attend(self, block, q, k, v) -> torch.Tensor:
        parts = self.exchange(block, (k[:, ::4], v[:, ::4]))
        keys, values = (torch.cat(t, 1) for t in zip(*parts, strict=True))
        self._keys[block] = keys, values, keys.new_full((keys.shape[1],), -math.log(keys.shape[1]))
        self._cells = self.layout.height * self.layout.width
        return super().attend(block, q, k, v)


def matched(reduced: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    (mean, std), (whole_mean, whole_std) = ((t.mean((2, 3), keepdim=True), t.std((2, 3), keepdim=True)) for t in (reduced, picture))
    return (reduced - mean) / std * whole_std + whole_mean


def bicubic(picture: torch.Tensor, cells: int, scale: int) -> torch.Tensor:
    ratio = math.sqrt(cells / math.prod(side // scale for side in picture.shape[2:]))
    size = [round(side // scale * ratio) * scale for side in picture.shape[2:]]
    return F.interpolate(picture, size=size, mode="bicubic", antialias=True)


def blocks(side: int, picture: torch.Tensor, cells: int, scale: int) -> Mosaic:
    """A mosaic of blocks of ``side`` cells that all count alike."""
    before, mosaics.BLOCK = mosaics.BLOCK, side
    try:
        found = mosaic(picture, cells, scale)
    finally:
        mosaics.BLOCK = before
    return alike(matched(found.picture, picture), picture, scale)


def alike(reduced: torch.Tensor, picture: torch.Tensor, scale: int) -> Mosaic:
    """A reduced picture of which all cells count."""
    return Mosaic(reduced, *(torch.full((side // scale,), whole / side) for side, whole in zip(reduced.shape[2:], picture.shape[2:], strict=True)))


REDUCED = {
    "exact, recorded": lambda picture, cells, scale: Mosaic.whole(picture, scale),
    "bicubic": lambda picture, cells, scale: alike(bicubic(picture, cells, scale), picture, scale),
    "bicubic, matched": lambda picture, cells, scale: alike(matched(bicubic(picture, cells, scale), picture), picture, scale),
    "mosaic of 6": partial(blocks, 6),
    "mosaic of 8": partial(blocks, 8),
    "counted": mosaic,
}


def tiles(way: str, vae, call, source: torch.Tensor, result: torch.Tensor, layout: TileLayout, into: int, out_of: int, cells: int) -> None:
    """Add the tiles' answers to ``result``; ``call(vae, part)`` gives one."""
    whole = InStep(layout) if way == "exact, in step" else WholePicture()
    network = vae if way == "own" else share_whole_picture(vae, whole, _share_attention)
    if way in REDUCED:
        whole.collect(partial(call, network), REDUCED[way](source, cells, into))

    def run(tile: Tile) -> torch.Tensor:
        with torch.no_grad():
            if isinstance(whole, InStep):
                whole.local.tile = tile
            return call(network, tile.cut(source, into))

    with ThreadPoolExecutor(len(layout.tiles)) if isinstance(whole, InStep) else nullcontext() as pool:
        for tile, answer in zip(layout.tiles, pool.map(run, layout.tiles) if pool else map(run, layout.tiles), strict=True):
            tile.cut(result, out_of).add_(answer * layout.window(tile, out_of))


def compare(vae, name: str, picture: torch.Tensor, tile: int, ways: list[str]) -> None:
    side = picture.shape[-1] // 8
    cells = min(max(MIN_MOSAIC, side**2 // 2), MAX_MOSAIC)
    layout = TileLayout(side, side, tile // 8, OVERLAP)
    encode, decode = (lambda vae, x: vae.encode(x).latent_dist.parameters), (lambda vae, x: vae.decode(x).sample)
    latents = encode(vae, picture * 2 - 1)[:, :4]
    for method, call, source, into, out_of in (("decoder", decode, latents, 1, 8), ("encoder", encode, picture * 2 - 1, 8, 1)):
        whole = call(vae, source)
        for way in ways:
            tiled = torch.zeros_like(whole)
            before, start = forget_peak(), time.perf_counter()
            tiles(way, vae, call, source, tiled, layout, into, out_of, cells)
            seconds, memory = time.perf_counter() - start, resident(peak=True) - before
            error = (tiled - whole).norm() / (whole - whole.mean()).norm()
            tone = F.avg_pool2d(tiled - whole, 4 * out_of).square().mean().sqrt() / whole.std()
            ratio = seams.measure(tiled, whole, *seams.borders(layout, out_of)).gradient_ratio
            print(f"| {method}, {name} | {way} | {error:.3f} | {tone:.3f} | {ratio:.3f} | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", help="folder of an AutoencoderKL")
    parser.add_argument("--photo", nargs="*", default=[], help="pictures besides the two drawn ones")
    parser.add_argument("--size", type=int, default=768, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--tile", type=int, default=256, help="in pixels (default: %(default)s)")
    parser.add_argument("--ways", nargs="*", default=["own", "exact, in step", *REDUCED])
    arguments = parser.parse_args()
    drawn = {"smooth": networks.smooth(arguments.size), "textured": networks.textured(arguments.size)}
    pictures = drawn | {path.rsplit("/", 1)[-1]: networks.photo(path, arguments.size) for path in arguments.photo}
    print(machine())
    print("| | statistics from | error | tone | seam | s | peak MiB |\n" + "|---" * 7 + "|")
    with torch.no_grad():
        vae = networks.diffusers_vae(arguments.vae)
        for name, picture in pictures.items():
            compare(vae, name, picture, arguments.tile, arguments.ways)
