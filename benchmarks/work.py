"""Work of both methods against the output's size, tiled as the nodes do it, whole, and as InvSR's own program chops it.

    python benchmarks/work.py            # a Markdown table; needs diffusers, no weights and no memory
    python benchmarks/work.py --plot docs/work.svg
    python benchmarks/work.py --methods --sizes 512        # a row for each method, whole images

Multiply-adds are counted on networks of the published sizes without computing anything. One step, CFG 1, the VAE in tiles of at most 1024 pixels, as on
the command line, the UNet in those of the Tiled Model node; what fits into one of the VAE's is not tiled at all.
"""

import argparse
import math
import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fewstep_sr.methods import METHODS  # noqa: E402
from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig  # noqa: E402
from fewstep_sr.tiling.predictor import OVERLAP, WINDOW  # noqa: E402
from fewstep_sr.tiling.tiles import TileLayout  # noqa: E402
from fewstep_sr.tiling.vae import MAX_MOSAIC, MIN_MOSAIC, even_tile  # noqa: E402
from fewstep_sr.tiling.vae import OVERLAP as VAE_OVERLAP  # noqa: E402
from fewstep_sr.tiling.whole_picture import MAX_KEYS  # noqa: E402

VAE = ("encode", "decode", "light decode")
UNET, VAE_TILE = (96, 24), 128
CHOPPED = 648  # InvSR's own program at 4096 x 4096 with its default patches of 128 low-quality pixels


@cache
def networks():
    import diffusers
    from diffusers.models.autoencoders.vae import Decoder

    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    light = Decoder(4, 3, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(64, 128, 256, 256), layers_per_block=2)
    unet = diffusers.UNet2DConditionModel(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
    return {
        "encode": lambda n: vae.encode(torch.empty(1, 3, 8 * n, 8 * n)),
        "decode": lambda n: vae.decode(torch.empty(1, 4, n, n)),
        "light decode": lambda n: light(torch.empty(1, 4, n, n)),
        "unet": lambda n: unet(torch.empty(1, 4, n, n), torch.empty(1), torch.empty(1, 77, 1024)),
        "predictor": lambda n, network=NoisePredictor(NoisePredictorConfig()): network(torch.empty(1, 3, 2 * n, 2 * n), 199),
    }


@cache
def tera_macs(network: str, cells: int) -> float:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        networks()[network](cells)
    return counter.get_total_flops() / 2e12


def tiled(network: str, cells: int, side: int, overlap: int) -> tuple[float, int]:
    """Multiply-adds in 10^12 and calls, of a square canvas; the VAE's with the mosaic's pass, and the attention to the rest."""
    tiles = len(TileLayout(cells, cells, side, overlap).tiles)
    work = tiles * tera_macs(network, min(side, cells))
    if tiles == 1 or network not in VAE:
        return work, tiles
    mosaic = max(side**2, min(max(MIN_MOSAIC, cells**2 // 2), MAX_MOSAIC))
    return work + tera_macs(network, math.isqrt(mosaic)) + tiles * 2 * side**2 * min(MAX_KEYS, mosaic) * 512 / 1e12, tiles + 1


def row(pixels: int) -> dict[str, float | int | str]:
    cells = pixels // 8
    vae = even_tile(cells, VAE_TILE), VAE_OVERLAP
    unet = UNET if cells > VAE_TILE else (cells, 0)
    parts = {**dict.fromkeys(VAE, vae), "unet": unet, "predictor": (WINDOW, OVERLAP)}
    work = {name: tiled(name, cells, *tile) for name, tile in parts.items()}
    whole = {name: tera_macs(name, cells) for name in parts}

    def total(work: dict[str, float], decoder: str, *others: str) -> float:
        return sum(work[name] for name in ("encode", decoder, "unet", *others))

    in_tiles = {name: macs for name, (macs, _) in work.items()}
    invsr = total(in_tiles, "decode", "predictor")
    return {
        "output": f"{pixels}²",
        **{f"{name} (calls)": f"{macs:.1f} ({calls})" for name, (macs, calls) in work.items()},
        "OSEDiff": total(in_tiles, "decode"),
        "light": total(in_tiles, "light decode"),
        "OSEDiff whole": total(whole, "decode"),
        "InvSR": invsr,
        "light ": total(in_tiles, "light decode", "predictor"),
        "InvSR whole": total(whole, "decode", "predictor"),
        "InvSR / chopped": f"{invsr / CHOPPED:.1%}" if pixels == 4096 else "",
    }


CALLS = {
    **{method.title: {"unet": 1 if method.cfg == 1 else 2} for method in METHODS.values() if method.one_step},
    "PiSA-SR, other knobs": {"unet": 2},
    "InvSR, 1 step": {"unet": 1, "predictor": 1},
    "InvSR, 5 steps": {"unet": 5, "predictor": 1},
}
"""Of the networks, besides the VAE's, at the published settings."""


def method_row(method: str, cells: int) -> dict[str, float | str]:
    """Of a whole image; the adapters' own multiply-adds, the text encoder and companions' networks are not counted."""
    work = sum(calls * tera_macs(name, cells) for name, calls in CALLS[method].items()) + tera_macs("encode", cells)
    calls = ", ".join(f"{name} {count}" for name, count in CALLS[method].items())
    return {
        "method": method,
        "calls": calls,
        "total": work + tera_macs("decode", cells),
        "with a light decoder": work + tera_macs("light decode", cells),
    }


def plot(rows: list[dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes = [int(r["output"][:-1]) for r in rows]
    for name, style in (("OSEDiff", "C0-"), ("OSEDiff whole", "C0--"), ("InvSR", "C1-"), ("InvSR whole", "C1--")):
        axes.plot(sizes, [r[name] for r in rows], style, marker="o", label=name if "whole" in name else f"{name} tiled")
    axes.plot([4096], [CHOPPED], "C1x", markersize=9, label="InvSR's own program")
    axes.set(xscale="log", yscale="log", xlabel="output, pixels a side", ylabel="multiply-adds, 10¹²", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--methods", action="store_true", help="a row for each method, whole images of the first size")
    parser.add_argument("--plot", help="write the plot here (needs matplotlib)")
    args = parser.parse_args()
    rows = [method_row(method, args.sizes[0] // 8) for method in CALLS] if args.methods else [row(size) for size in args.sizes]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for r in rows:
        print("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in r.values()) + " |")
    if args.plot:
        plot(rows, args.plot)
