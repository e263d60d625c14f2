"""The seam meter: what tiles did to a picture, by the distance to their borders.

It compares with the untiled result, so that it means something for any network: a picture's own edges are in both.

    python benchmarks/seams.py                       # VAE, UNet and noise predictor
    python benchmarks/seams.py --vae PATH --unet PATH --photo FILE ...
    python benchmarks/seams.py --only results --base miniature --predictor miniature/noise_predictor.safetensors
    python benchmarks/seams.py --only results --base miniature --random pisasr hypir --tile 384

Without paths the networks have random weights; the methods' results want trained ones.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


@dataclass(frozen=True)
class Seams:
    """``error_by_distance``: root mean square error relative to the untiled picture's deviation, in eighths of the way from a border to a tile's middle.

    ``gradient_ratio``: over all rows and columns at a border, the worst mean gradient relative to the untiled picture's in the same place, over what it
    is in most of the picture; 1 is no seam. ``elsewhere``: the same of the worst twentieth of all other rows and columns, where there is no border.
    ``gradient_ratio`` also rises where tiles changed all of a neighbourhood, border or not; ``beside_neighbours`` is over what it is in the 32 rows or
    columns to either side, so that only a line counts.
    """

    error_by_distance: list[float]
    gradient_ratio: float
    elsewhere: float
    beside_neighbours: float


def measure(tiled: torch.Tensor, whole: torch.Tensor, rows: list[int], columns: list[int]) -> Seams:
    """Compare pictures or latents (B, C, H, W); ``rows`` and ``columns`` are where tiles begin and end inside the canvas.

    Gradients are means over a whole line of all B pictures: with more of them what chance does to a line averages out, and a fainter seam is seen.
    """
    error = (tiled - whole).double().square().mean(dim=(0, 1))
    distance = torch.minimum(_distance(whole.shape[-2], rows)[:, None], _distance(whole.shape[-1], columns)[None])
    bins = (distance / (distance.max() + 1) * 8).long()
    by_distance = [(error[bins == i].mean().sqrt() / whole.double().std()).item() for i in range(8) if (bins == i).any()]
    found = [_ratios(tiled, whole, dim, b) for dim, b in ((-2, rows), (-1, columns))]
    at_borders, elsewhere, beside = (torch.cat(ratios) for ratios in zip(*found, strict=True))
    return Seams(by_distance, at_borders.max().item(), elsewhere.quantile(0.95).item(), beside.max().item())


def _distance(length: int, borders: list[int]) -> torch.Tensor:
    positions = torch.arange(length) + 0.5
    return torch.stack([(positions - border).abs() for border in borders] or [torch.full((length,), float(length))]).amin(0)


NEIGHBOURS = 32


def _ratios(tiled: torch.Tensor, whole: torch.Tensor, dim: int, borders: list[int]) -> tuple[torch.Tensor, ...]:
    """Mean gradient across each border over the untiled picture's, relative to the same in the rest of the picture; of the rest; and relative to the neighbours."""
    across = [t.double().diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1) for t in (tiled, whole)]
    ratio = across[0] / (across[1] + 1e-3 * across[1].mean())
    inside = torch.ones(len(ratio), dtype=torch.bool)
    inside[[b - 1 for b in borders]] = False
    ratio = ratio / ratio[inside].median()
    beside = []
    for border in borders:
        near = torch.zeros_like(inside)
        near[max(0, border - 1 - NEIGHBOURS) : border + NEIGHBOURS] = True
        beside.append(ratio[border - 1] / ratio[near & inside].median())
    return ratio[~inside], ratio[inside], torch.stack(beside) if beside else ratio.new_zeros(0)


def borders(layout, scale: int = 1) -> tuple[list[int], list[int]]:
    """Rows and columns at which a :class:`fewstep_sr.tiling.tiles.TileLayout`'s tiles begin and end, the canvas's own borders left out."""
    tile = layout.tiles[0]
    return tuple(
        sorted({edge * scale for start in starts for edge in (start, start + side)} - {0, length * scale})
        for starts, side, length in ((layout.tops, tile.height, layout.height), (layout.lefts, tile.width, layout.width))
    )


def report(name: str, tiled: torch.Tensor, whole: torch.Tensor, layout, scale: int = 1) -> None:
    report_at(name, tiled, whole, *borders(layout, scale))


def report_at(name: str, tiled: torch.Tensor, whole: torch.Tensor, rows: list[int], columns: list[int]) -> None:
    found = measure(tiled, whole, rows, columns)
    in_one = max(measure(*pair, rows, columns).beside_neighbours for pair in zip(tiled.split(1), whole.split(1), strict=True))
    error = ((tiled - whole).norm() / (whole - whole.mean()).norm()).item()
    by_distance = ", ".join(f"{e:.3f}" for e in found.error_by_distance)
    print(f"| {name} | {found.gradient_ratio:.3f} | {found.elsewhere:.3f} | {in_one:.3f} | {error:.3f} | {by_distance} |", flush=True)


def vae_seams(vae, pictures: dict[str, torch.Tensor], tile: int) -> None:
    """Encoder and decoder in tiles of ``tile`` pixels."""
    from fewstep_sr.tiling.tiles import TileLayout
    from fewstep_sr.tiling.vae import OVERLAP
    from pipelines.runtime import PipelineRuntime
    from pipelines.tiling import Tiling

    for name, picture in pictures.items():
        cells = picture.shape[-1] // 8
        layout, cpu = TileLayout(cells, cells, tile // 8, OVERLAP), torch.device("cpu")
        whole, tiled = (coding.encode(vae, picture, cpu, PipelineRuntime()) for coding in (Tiling(), Tiling(tile // 8)))
        report(f"VAE encoder, {name}", tiled, whole, layout)
        latents = whole[:, :4]
        whole, tiled = (coding.decode(vae, latents, cpu, PipelineRuntime()) for coding in (Tiling(), Tiling(tile // 8)))
        report(f"VAE decoder, {name}", tiled, whole, layout, 8)


def unet_seams(unet, drawn, tile: int, overlaps: list[int]) -> None:
    """One prediction at the methods' timesteps, on 2 x 2 tiles that overlap by that much; ``drawn(size)`` gives the pictures."""
    from fewstep_sr.tiling.tiles import TileLayout
    from pipelines.runtime import PipelineRuntime
    from pipelines.tiling import Tiling

    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))

    def network(timestep, tiles, owners):
        return unet(tiles, timestep, encoder_hidden_states=text.expand(len(tiles), -1, -1)).sample

    for timestep in (199, 999):
        for overlap in overlaps:
            for name, picture in drawn(2 * tile - overlap).items():
                state = _state(picture)
                predict = partial(network, timestep)
                tiled, layout = Tiling(tile, overlap).predict(predict, state, PipelineRuntime()), TileLayout(*state.shape[-2:], tile, overlap)
                report(f"UNet at {timestep}, overlap {overlap}, {name}", tiled, predict(state, [0]), layout)


def _state(picture: torch.Tensor) -> torch.Tensor:
    """A state (1, 4, h, w) in place of an encoded picture (1, 3, h, w): its deviation is 1, and a little of it is noise."""
    state = torch.cat([picture, picture.mean(1, keepdim=True)], dim=1)
    state = (state - state.mean((2, 3), keepdim=True)) / state.std((2, 3), keepdim=True)
    return state + 0.5 * torch.randn(state.shape, generator=torch.Generator().manual_seed(0))


def predictor_seams(predictor, drawn, overlaps: list[int]) -> None:
    """The expected noise map, on 2 x 2 windows that overlap by that much."""
    from fewstep_sr.tiling.predictor import WINDOW
    from fewstep_sr.tiling.tiles import TileLayout

    for overlap in overlaps:
        for name, picture in drawn(2 * (2 * WINDOW - overlap)).items():
            whole = predictor(picture * 2 - 1, 199).mean
            layout, tiled = TileLayout(*whole.shape[-2:], WINDOW, overlap), torch.zeros_like(whole)
            for tile in layout.tiles:
                tile.cut(tiled).add_(predictor(tile.cut(picture, 2) * 2 - 1, 199).mean * layout.window(tile))
            report(f"noise predictor, overlap {overlap}, {name}", tiled, whole, layout)


def result_seams(base: str, weights: dict[str, str | Path], drawn, tile: int) -> None:
    """The methods' whole results, four times as large as the pictures, where VAE, UNet and predictor meet 2 x 2 tiles of ``tile`` pixels and more.

    For comparison, what the meter says where there are seams: quarters restored each by itself and put together. ``weights`` are files by method.
    """
    import networks

    from fewstep_sr.methods import METHODS
    from fewstep_sr.tiling import predictor as tiled_noise
    from fewstep_sr.tiling import vae as tiled_coder
    from fewstep_sr.tiling.tiles import TileLayout
    from pipelines import pipeline_class

    cells = tile // 8
    canvas = 2 * cells - cells // 4
    layouts = [TileLayout(canvas, canvas, cells, overlap) for overlap in (cells // 4, tiled_coder.OVERLAP)]
    windows = TileLayout(canvas, canvas, tiled_noise.WINDOW, tiled_noise.OVERLAP)
    for key, file in weights.items():
        met = [*layouts, windows] if METHODS[key].one_step is None else layouts
        method = METHODS[key].title
        pipeline, embeds = networks.pipeline(base, pipeline_class(METHODS[key]), file)
        found = [borders(layout, 8) for layout in met]
        rows, columns = (sorted({edge for edges in found for edge in edges[axis]}) for axis in (0, 1))
        for name, pictures in drawn(canvas * 2).items():
            whole = _results(pipeline, pictures, embeds, canvas, None)
            report_at(f"{method}, in tiles, {name}", _results(pipeline, pictures, embeds, tiled_noise.WINDOW, tile), whole, rows, columns)
            halves = [part.chunk(2, -1) for part in pictures.chunk(2, -2)]
            quarters = [torch.cat([_results(pipeline, part, embeds, canvas, None) for part in row], -1) for row in halves]
            report_at(f"{method}, in separate quarters, {name}", torch.cat(quarters, -2), whole, [canvas * 4], [canvas * 4])


def _results(pipeline, pictures: torch.Tensor, embeds: torch.Tensor, window: int, tile: int | None) -> torch.Tensor:
    """Each picture's with noise of its own, the predictor in windows of ``window`` cells and the other networks in tiles of ``tile`` pixels, or whole."""
    import random_adapters

    from fewstep_sr.tiling import predictor as tiled_noise

    pipeline.enable_tiling(tile) if tile else pipeline.disable_tiling()
    own = random_adapters.own_settings(pipeline.method.key, embeds)
    published, tiled_noise.WINDOW = tiled_noise.WINDOW, window
    try:
        return torch.cat(
            [
                pipeline(picture[None], prompt_embeds=embeds, generator=torch.Generator().manual_seed(seed), output_type="pt", **own).images
                for seed, picture in enumerate(pictures)
            ]
        )
    finally:
        tiled_noise.WINDOW = published


def main() -> None:
    import networks  # which puts the tests' support on the path
    import random_adapters

    parser = argparse.ArgumentParser(description="What tiles do to pictures, against the same network without tiles.")
    parser.add_argument("--vae", help="folder of an AutoencoderKL")
    parser.add_argument("--unet", help="folder of a UNet2DConditionModel")
    parser.add_argument("--predictor", help="file of a noise predictor")
    parser.add_argument("--base", help="folder of a base without text encoder, for --only results")
    parser.add_argument("--osediff", help="file of an OSEDiff adapter for that base")
    parser.add_argument("--pisasr", help="likewise of a PiSA-SR adapter")
    parser.add_argument("--random", nargs="+", default=[], choices=random_adapters.METHODS, help="methods with random adapters for that base")
    parser.add_argument("--photo", nargs="*", default=[], help="pictures besides the drawn ones")
    parser.add_argument("--pictures", type=int, default=1, help="drawn of each kind, measured together (default: %(default)s)")
    parser.add_argument("--size", type=int, default=768, help="of the VAE's pictures, in pixels (default: %(default)s)")
    parser.add_argument("--tile", type=int, help="in pixels (default: 256 of the VAE, 768 of results)")
    parser.add_argument("--only", choices=["vae", "unet", "predictor", "results"])
    arguments = parser.parse_args()

    def pictures(size):
        drawn = {
            draw.__name__: torch.cat([draw(size, networks.SEED + i) for i in range(arguments.pictures)])
            for draw in (networks.smooth, networks.textured)
        }
        return drawn | {path: networks.photo(path, size) for path in arguments.photo}

    print("| | seam | elsewhere | beside neighbours, worst picture | error | error from the border to the tile's middle |\n|---|---|---|---|---|---|")
    with torch.no_grad():
        if arguments.only in (None, "vae"):
            vae_seams(networks.diffusers_vae(arguments.vae), pictures(arguments.size), arguments.tile or 256)
        if arguments.only in (None, "unet"):
            unet_seams(networks.diffusers_unet(arguments.unet), pictures, 96, [8, 16, 24, 32])
        if arguments.only in (None, "predictor"):
            predictor_seams(networks.noise_predictor(arguments.predictor), pictures, [8, 16])
        if arguments.only == "results":
            given = {"osediff": arguments.osediff, "invsr": arguments.predictor, "pisasr": arguments.pisasr}
            with TemporaryDirectory() as folder:
                drawn = {
                    key: random_adapters.write_random_adapter(arguments.base, key, Path(folder, f"{key}.safetensors")) for key in arguments.random
                }
                result_seams(arguments.base, {key: file for key, file in given.items() if file} | drawn, pictures, arguments.tile or 768)


if __name__ == "__main__":
    main()
