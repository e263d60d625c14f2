"""The command line, ``python -m pipelines`` in a checkout and ``fewstep-sr`` where the package is installed: upscale,
evaluate, compare, verify, convert, info, train.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from fewstep_sr.image.formats import FORMATS
from fewstep_sr.methods import METHODS

from .evaluation.cli import add_commands as add_evaluation
from .files import convert, describe_file
from .options import add_machine, add_method, add_weights
from .settings import Settings
from .training.cli import add_commands as add_training
from .training.cli import where_it_went

PROG = "fewstep-sr" if __package__.startswith("fewstep_sr.") else "python -m pipelines"

_UPSCALE = f"""\
examples:
  {PROG} upscale miniature/photo.png --demo
  {PROG} upscale photos -o restored --method invsr --download
  {PROG} upscale cat.png -o cat_x4.png --method osediff --prompt "cat, fur, whiskers" --comfyui ~/ComfyUI
  accelerate launch --multi_gpu --num_processes 4 -m {__package__} upscale photos -o restored --method invsr      (GPUs share the folder)

A run that was cut goes on where it stopped: pictures whose results exist, made with the same settings, are not done again. One bad
file does not stop the others; it is reported at the end, and the exit status is 1.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 where pictures failed, 2 where nothing could be begun."""
    argv = sys.argv[1:] if argv is None else argv
    if moved := where_it_went(argv):
        print(f"error: {moved}", file=sys.stderr)
        return 2
    return run_command(_parser().parse_args(argv))


def run_command(arguments: argparse.Namespace) -> int:
    """Run what a parser chose, ``arguments.run``: errors become a sentence, unless ``arguments.verbose``. Returns the exit status."""
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"Stopped. {getattr(arguments, 'stopped', 'Give the same command again to go on.')}", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        if arguments.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Few-step diffusion super-resolution without ComfyUI: OSEDiff and InvSR.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say more, and show where an error comes from")
    _add_upscale(commands.add_parser("upscale", parents=[common], help="restore and enlarge pictures", epilog=_UPSCALE, **_RAW))

    command = commands.add_parser("convert", parents=[common], help="turn .pkl, .pth and .pt weights into safetensors", **_RAW)
    command.add_argument(
        "input", type=Path, metavar="INPUT", help="OSEDiff's adapter (osediff.pkl), InvSR's noise predictor (.pth), or RAM's tagger (.pth)"
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the new file (default: the same name with .safetensors)")
    command.add_argument("--dape", type=Path, help="for a tagger: DAPE.pth, to be merged into it")
    command.add_argument("--overwrite", action="store_true", help="write over a file that exists")
    command.set_defaults(run=_convert)

    command = commands.add_parser("info", parents=[common], help="say what a weight file is, its rank, its size, and what it fits", **_RAW)
    command.add_argument("file", type=Path, nargs="+", metavar="FILE")
    command.set_defaults(run=_info)
    add_evaluation(commands, common)
    add_training(commands, common)
    return parser


_RAW: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_upscale(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_upscale)
    command.add_argument("input", nargs="+", metavar="INPUT", help="pictures, folders (with their subfolders) and globs")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder for the results, or a file for one picture (default: beside it, cat_x4.png)"
    )

    add_method(command, METHODS)
    add_weights(command)
    add_machine(command)

    files = command.add_argument_group("files")
    files.add_argument("--format", choices=sorted({suffix[1:] for suffix in FORMATS}), help="of the results (default: each picture's own)")
    files.add_argument("--quality", type=int, default=95, help="of JPEG and WebP (default: %(default)s)")
    files.add_argument("--overwrite", action="store_true", help="do pictures again whose results exist")


def _upscale(arguments: argparse.Namespace) -> int:
    from .upscale import upscale  # torch and diffusers take seconds that --help need not

    return upscale(Settings.from_arguments(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    print(convert(arguments.input, arguments.output, arguments.overwrite, arguments.dape))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    for path in arguments.file:
        print(describe_file(path))
    return 0
