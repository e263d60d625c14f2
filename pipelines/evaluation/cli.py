"""``evaluate``, ``compare`` and ``verify`` on the command line."""

import argparse
import copy
from pathlib import Path
from typing import Any

from fewstep_sr.methods import METHODS

from ..options import add_machine, add_method, add_weights
from ..settings import Settings
from .published import BENCHMARKS, PUBLISHED

_RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}


def add_commands(commands, common: argparse.ArgumentParser) -> None:
    """Add them to the command line's parser."""
    _add_evaluate(commands.add_parser("evaluate", parents=[common], help="measure a method, or results, on a benchmark", **_RAW))


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    prog = command.prog
    sets = "\n".join(f"  {b.title} ({b.key}; {b.images} images, {b.what}): {b.where}" for b in BENCHMARKS.values())
    command.epilog = (
        f"examples:\n  {prog} --data benchmark_realsr --results benchmark_realsr/results_osediff --expect osediff\n"
        f"  {prog} --data benchmark_realsr --method osediff --demo --json osediff.json\n\n"
        f"known benchmarks, and where they are published:\n{sets}\n\n"
        "A run that was cut goes on where it stopped. Exit status: 0; 1 where images failed or have no other half; 2 where nothing could be measured."
    )
    command.set_defaults(run=_evaluate)
    data = command.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="FOLDER", help="a benchmark, with test_LR and test_HR in it; or low-quality images without originals")
    data.add_argument("--lq", type=Path, metavar="FOLDER", help="low-quality images")
    data.add_argument("--hq", type=Path, metavar="FOLDER", help="originals; names are paired: x.png with x.png, x_LR4.png with x_HR.png")
    data.add_argument("--results", type=Path, metavar="DIR", help="measure these results instead of restoring")
    data.add_argument("--benchmark", choices=list(BENCHMARKS), help="which one it is, where the images' names do not tell")
    figures = command.add_argument_group("figures")
    figures.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim", "gmsd"],
        metavar="NAME",
        help="psnr ssim gmsd (default; these need nothing), and through pyiqa lpips dists fid niqe musiq maniqa-pipal clipiqa; or all. "
        "pyiqa is optional (pip install pyiqa), for non-commercial use, and fetches a metric's weights at its first use",
    )
    figures.add_argument("--pyiqa", action="store_true", help="psnr, ssim and gmsd through pyiqa, too (the same values)")
    figures.add_argument("--expect", choices=sorted({published.method for published in PUBLISHED}), help="show this method's published figures beside ours")
    files = command.add_argument_group("files")
    files.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder for the restored images and their report (default: results_METHOD in the current folder)"
    )
    files.add_argument("--json", type=Path, metavar="FILE", help="everything: mean, pictures, settings, versions, file hashes, seconds, memory")
    files.add_argument("--csv", type=Path, metavar="FILE", help="the table")
    files.add_argument("--markdown", type=Path, metavar="FILE", help="the means and the table")
    files.add_argument("--overwrite", action="store_true", help="restore images again whose results exist")
    add_method(command, [*METHODS, "bicubic"], "the method to restore with; bicubic enlarges alone")
    add_weights(command)
    add_machine(command)


def _evaluate(arguments: argparse.Namespace) -> int:
    if (arguments.method is None) == (arguments.results is None):
        found = "neither --method nor --results" if arguments.method is None else "--method and --results"
        raise ValueError(f"evaluate: found {found}, expected one of them: a method restores the images, results exist already.")
    bicubic = arguments.method == "bicubic"
    output = None if arguments.results else arguments.output or Path(f"results_{arguments.method}{'_demo' if arguments.demo else ''}")
    restoration = None if arguments.results or bicubic else _restoration(arguments, output)

    from .evaluate import Evaluation, evaluate, parse_metrics  # torch and diffusers take seconds that --help need not

    return evaluate(
        Evaluation(
            metrics=parse_metrics(arguments.metrics),
            data=arguments.data,
            lq=arguments.lq,
            hq=arguments.hq,
            results=arguments.results,
            restoration=restoration,
            scale=arguments.scale,
            output=output,
            expect=arguments.expect,
            benchmark=arguments.benchmark,
            json=arguments.json,
            csv=arguments.csv,
            markdown=arguments.markdown,
            device=arguments.device,
            through_pyiqa=arguments.pyiqa,
            overwrite=arguments.overwrite,
        )
    )


def _restoration(arguments: argparse.Namespace, output: Path | None) -> Settings:
    """Settings of the restoration: of ``upscale``'s, those that a benchmark has."""
    arguments = copy.copy(arguments)
    arguments.input, arguments.output, arguments.format, arguments.quality = [], output, "png", 95
    return Settings.from_arguments(arguments)
