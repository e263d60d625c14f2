"""The command line, ``python -m pipelines`` in a checkout and ``fewstep-sr`` where the package is installed: upscale, convert, info, train.

Each command imports what it needs when it is asked for: torch takes a second that ``--help`` need not, and where diffusers, peft, accelerate or
transformers are broken, all commands but upscale and train work.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from .training.cli import add_trainings, where_it_went

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
    return run_command(make_parser(argv).parse_args(argv))


def run_command(arguments: argparse.Namespace) -> int:
    """Run what a parser chose, ``arguments.run``: errors become a sentence, unless ``arguments.verbose``. Returns the exit status."""
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    try:
        if getattr(arguments, "needs_packages", True):
            _require_packages()
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"Stopped. {getattr(arguments, 'stopped', 'Give the same command again to go on.')}", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        if arguments.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _require_packages() -> None:
    """Raises RuntimeError where a package that pipelines and trainings are built on is missing, or fails to import, in whatever way."""
    for name in ("accelerate", "diffusers", "peft", "transformers"):
        try:
            import_module(name)
        except Exception as error:
            if name == "peft" and isinstance(error, ModuleNotFoundError) and error.name == name:  # which only adapters need
                continue
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise RuntimeError(f"{name} cannot be imported ({what}). Install versions that fit each other: pip install -U {name}.") from error


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands by name, of which the one that ``argv`` asks for knows its arguments."""
    parser = argparse.ArgumentParser(prog=PROG, description="Few-step diffusion super-resolution without ComfyUI: OSEDiff and InvSR.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (words, add_arguments) in _COMMANDS.items():
        parents = [] if name == "train" else [_common()]
        command = commands.add_parser(name, parents=parents, help=words, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(needs_packages=name in ("upscale", "train"))
        if name == chosen:
            add_arguments(command)
    return parser


def _common() -> argparse.ArgumentParser:
    """What every command understands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say more, and show where an error comes from")
    return common


def _add_upscale(command: argparse.ArgumentParser) -> None:
    from fewstep_sr.image.color import COLOR_FIXES
    from fewstep_sr.image.formats import FORMATS
    from fewstep_sr.methods import METHODS

    from .settings import DEFAULT, DEMO_DEFAULT, every_option

    command.set_defaults(run=_upscale)
    command.epilog = _UPSCALE
    command.add_argument("input", nargs="+", metavar="INPUT", help="pictures, folders (with their subfolders) and globs")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder for the results, or a file for one picture (default: beside it, cat_x4.png)"
    )

    method = command.add_argument_group("method")
    method.add_argument("--method", choices=list(METHODS), help=f"default: {DEFAULT}, {DEMO_DEFAULT} with --demo")
    method.add_argument("--scale", type=float, default=4.0, help="how much larger the results are (default: %(default)g)")
    method.add_argument("--prompt", help="what is in the pictures, or how they shall look (default: the method's own)")
    method.add_argument("--negative-prompt", help="what they shall not show; used where --cfg is not 1")
    guided = "".join(f", {record.cfg:g} with {record.key}" for record in METHODS.values() if record.cfg != 1)
    method.add_argument("--cfg", type=float, help=f"guidance; 1 is twice as fast as others (default, as published: 1{guided})")
    method.add_argument("--seed", type=int, default=12345, help="every picture is drawn with this seed (default: %(default)s)")
    method.add_argument("--color-fix", choices=[*COLOR_FIXES, "none"], help="default: adain for OSEDiff, none for InvSR, wavelet with --demo")

    for name, owners in every_option().items():
        option = owners[0][1]
        titles = " and ".join(owner.title for owner, _ in owners)
        default = "" if option.default in (None, ()) else f" (default: {option.default})"
        method.add_argument(
            f"--{name.replace('_', '-')}",
            type=option.parse,
            nargs="+" if option.many else None,
            metavar=option.metavar,
            help=f"{titles}: {option.help}{default}",
        )

    weights = command.add_argument_group("weights", "Looked for at the paths given, in a ComfyUI's models folder, in the hub's cache.")
    weights.add_argument("--demo", action="store_true", help="the miniature that comes with this package: seconds on a CPU, no download")
    weights.add_argument("--base", help="Stable Diffusion: a .safetensors or .ckpt file, a diffusers folder, or a hub id")
    weights.add_argument("--weights", help="the method's own weights: OSEDiff's adapter or InvSR's noise predictor")
    weights.add_argument(
        "--decoder", type=Path, help="another decoder for the base's VAE: AdcSR's, VOSR's, or the one in a VAE file (default: the base's)"
    )
    weights.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH") or None, help="a ComfyUI folder (default: COMFYUI_PATH)")
    weights.add_argument("--download", action="store_true", help="fetch what is missing; the licences are shown")

    machine = command.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best one)")
    machine.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16 on a GPU, float32 on a CPU")
    machine.add_argument("--tile", type=int, default=1024, help="larger results are made in tiles of so many pixels; 0: whole (default: %(default)s)")
    machine.add_argument("--offload", action="store_true", help="keep on the GPU only the network that is at work")

    files = command.add_argument_group("files")
    files.add_argument("--format", choices=sorted({suffix[1:] for suffix in FORMATS}), help="of the results (default: each picture's own)")
    files.add_argument("--quality", type=int, default=95, help="of JPEG and WebP (default: %(default)s)")
    files.add_argument("--overwrite", action="store_true", help="do pictures again whose results exist")


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_convert)
    command.add_argument(
        "input",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="a method's weights (osediff.pkl, noise_predictor.pth, s3diff.pkl, de_net.pth and so on), RAM's tagger (.pth), or AdcSR's or VOSR's decoder (.ckpt, .pth)",
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the new file of a single INPUT (default: the same name with .safetensors)")
    command.add_argument("--dape", type=Path, help="for a tagger: DAPE.pth, to be merged into it")
    command.add_argument(
        "--vae", type=Path, metavar="BASE", help="for a light decoder: its base's VAE, a file, a whole checkpoint or a diffusers folder"
    )
    command.add_argument("--overwrite", action="store_true", help="write over a file that exists")


def _add_info(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_info)
    command.add_argument("file", type=Path, nargs="+", metavar="FILE")


def _add_train(command: argparse.ArgumentParser) -> None:
    add_trainings(command, _common())


def _upscale(arguments: argparse.Namespace) -> int:
    from .settings import Settings
    from .upscale import upscale

    return upscale(Settings.from_arguments(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    from .files import convert

    files = arguments.input
    if arguments.output and len(files) > 1:
        raise ValueError(f"-o: found one name for {len(files)} files. Convert one at a time, or leave it out: each result then lies beside its file.")
    return _each(files, lambda path: convert(path, arguments.output, arguments.overwrite, arguments.dape, arguments.vae), arguments.verbose)


def _info(arguments: argparse.Namespace) -> int:
    from .files import describe_file

    return _each(arguments.file, describe_file, arguments.verbose)


def _each(files: list[Path], work: Callable[[Path], str], verbose: bool) -> int:
    """Print what ``work`` says of each file; among several, one that is refused does not stop the others. Returns the exit status."""
    refused = 0
    for path in files:
        try:
            print(work(path))
        except (OSError, ValueError, RuntimeError) as error:
            if verbose or len(files) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            refused += 1
    return 0 if not refused else 2 if refused == len(files) else 1


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "upscale": ("restore and enlarge pictures", _add_upscale),
    "convert": ("turn .pkl, .pth and .pt weights into safetensors", _add_convert),
    "info": ("say what a weight file is, its rank, its size, and what it fits", _add_info),
    "train": ("train a method", _add_train),
}
