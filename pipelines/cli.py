"""The command line, ``python -m pipelines`` in a checkout and ``fewstep-sr`` where the package is installed: upscale,
evaluate, compare, verify, convert, info, train.

Each command imports what it needs when it is asked for, and the methods' records import torch at its first use: it takes a second that ``--help``
need not. Where diffusers, peft, accelerate or transformers are broken, all commands work that restore or train nothing.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path

from .evaluation.cli import add_compare, add_evaluate, add_verify
from .options import a_path
from .parser import Parser, bounded
from .training.cli import add_trainings, where_it_went

PROG = "fewstep-sr" if __package__.startswith("fewstep_sr.") else "python -m pipelines"

_UPSCALE = f"""\
examples:
  {PROG} upscale miniature/photo.png --demo
  {PROG} upscale photos -o restored --method invsr --download
  {PROG} upscale photos -o restored --long-side 2048
  {PROG} upscale cat.png -o cat_x4.png --method osediff --prompt "cat, fur, whiskers" --comfyui ~/ComfyUI
  {PROG} upscale photos.txt -o s3://bucket/restored --ray
  {PROG} upscale --watch inbox -o outbox
  {PROG} upscale clip.mp4 -o clip_x2.mp4 --scale 2
  accelerate launch --multi_gpu --num_processes 4 -m {__package__} upscale photos -o restored --method invsr      (GPUs share the folder)

A run that was interrupted continues where it stopped: pictures whose results exist, made with the same settings, are not done again. One
bad file does not stop the others; it is reported at the end, and the exit status is 1. Each result holds its settings: {PROG} info RESULT.
"""

_EXIT = """\
exit status: 0 all done; 1 some files failed, the others are done; 2 nothing was started (a wrong option, a missing file); 130 stopped by Ctrl+C
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 where pictures failed, 2 where nothing could be begun, 130 after Ctrl+C."""
    argv = sys.argv[1:] if argv is None else argv
    if moved := where_it_went(argv):
        print(f"error: {moved}", file=sys.stderr)
        return 2
    return run_command(make_parser(argv).parse_args(argv))


def use_huge_pages() -> None:
    """Let PyTorch put tensors of a CPU on Linux into pages of 2 MiB, unless its environment variable says otherwise: a network's activations come and go, and
    the kernel hands out each of the 4 KiB pages anew. PyTorch reads the variable at its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run_command(arguments: argparse.Namespace) -> int:
    """Run what a parser chose, ``arguments.run``: errors become a sentence, unless ``arguments.verbose``. Returns the exit status."""
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    try:
        if getattr(arguments, "needs_packages", True):
            use_huge_pages()
            require_packages()
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"Stopped. {getattr(arguments, 'stopped', 'Give the same command again to continue.')}", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        if arguments.verbose:
            raise
        print(f"error: {bounded(str(error))}", file=sys.stderr)
        return 2


def require_packages() -> None:
    """Raises RuntimeError where a package that pipelines and trainings are built on is missing, or fails to import, in whatever way."""
    for name in ("accelerate", "diffusers", "peft", "transformers"):
        try:
            import_module(name)
        except Exception as error:
            if name == "peft" and isinstance(error, ModuleNotFoundError) and error.name == name:  # which only adapters need
                continue
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise RuntimeError(f"{name} cannot be imported ({what}). Install versions that fit each other: pip install -U {name}.") from error


class _PrintCompletion(argparse.Action):
    """Print a completion script, made by shtab, and leave."""

    def __call__(self, parser, namespace, shell, option_string=None):
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion: shtab is not installed. Install it: pip install shtab.")
        whole = make_parser([], every=True)
        whole.prog = "fewstep-sr"
        print(shtab.complete(whole, shell))
        parser.exit()


def make_parser(argv: Sequence[str], every: bool = False) -> argparse.ArgumentParser:
    """All commands by name, of which the one that ``argv`` asks for, or every one, knows its arguments."""
    description = f"Few-step diffusion super-resolution without ComfyUI. The methods: {PROG} upscale --help."
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=description, epilog=f"{_EXIT}{PROG} COMMAND --help lists its options.", formatter_class=shape)
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print a tab-completion script of fewstep-sr for this shell",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (words, add_arguments) in _COMMANDS.items():
        parents = [] if name == "train" else [_common()]
        described = f"{words[0].upper()}{words[1:]}."
        command = commands.add_parser(name, parents=parents, help=words, description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(needs_packages=name in ("upscale", "verify", "train"))
        if every or name == chosen:
            add_arguments(command)
    return parser


def _common() -> Parser:
    """What every command understands."""
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="more messages, and tracebacks of errors")
    return common


def _add_upscale(command: argparse.ArgumentParser) -> None:
    from fewstep_sr.image.formats import FORMATS
    from fewstep_sr.video.formats import CODECS, PIXEL_FORMATS

    from .options import add_machine, add_method, add_weights

    command.set_defaults(run=_upscale)
    command.epilog = _UPSCALE
    command.add_argument("input", nargs="+", metavar="INPUT", help="pictures, folders (with their subfolders) and globs; videos by their names")
    command.add_argument(
        "-o",
        "--output",
        type=_place,
        metavar="OUT",
        help="folder for the results, or a file for one picture or video (default: beside it, cat_x4.png)",
    )

    add_method(command, targets=True)
    add_weights(command)
    add_machine(command)

    files = command.add_argument_group("files")
    files.add_argument("--format", choices=sorted({suffix[1:] for suffix in FORMATS}), help="format of the results (default: each picture's own)")
    files.add_argument("--quality", type=int, default=95, help="JPEG and WebP quality (default: %(default)s)")
    files.add_argument("--overwrite", action="store_true", help="redo pictures whose results exist")
    files.add_argument(
        "--watch", action="store_true", help="INPUT is a folder: restore its pictures, then new ones as they arrive, until Ctrl+C or SIGTERM"
    )
    files.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="distribute the work over a Ray cluster (default: the current one, otherwise this machine); INPUT and OUT may be addresses such as s3://bucket/photos",
    )

    video = command.add_argument_group(
        "video", "With a video file as INPUT or OUT: frames are restored one after another; sound and other streams are kept. Needs PyAV."
    )
    video.add_argument("--codec", choices=CODECS, help="default: h264; hevc for more than 8 bits; av1 for .webm")
    defaults = ", ".join(f"{codec.crf[0]:g} with {name}" for name, codec in CODECS.items() if codec.crf)
    video.add_argument("--crf", type=float, help=f"quality, a smaller number is better (default: {defaults})")
    video.add_argument("--pixel-format", choices=PIXEL_FORMATS, help="default: yuv420p, or yuv420p10le for more than 8 bits")
    video.add_argument(
        "--fps", type=_fraction, default=Fraction(24), help="frame rate of a video made of pictures, such as 25 or 30000/1001 (default: %(default)s)"
    )
    video.add_argument("--steady", action="store_true", help="average grain over time before frames are restored, which lowers flicker")
    video.add_argument("--segment", type=int, default=120, metavar="FRAMES", help="an interrupted run loses at most this many (default: %(default)s)")


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"found {text[:40]}, expected a number such as 25 or 30000/1001.") from None


def _place(text: str) -> Path | str:
    """A path, or an address that names its file system."""
    return text if "://" in text else a_path(text)


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_convert)
    command.epilog = f"examples:\n  {PROG} convert osediff.pkl\n  {PROG} convert ram_swin_large_14m.pth --dape DAPE.pth -o tagger.safetensors\n"
    command.add_argument(
        "input",
        type=a_path,
        nargs="+",
        metavar="INPUT",
        help="a method's weights or a file beside them (osediff.pkl, noise_predictor.pth and so on), RAM's tagger (.pth), or AdcSR's or VOSR's decoder (.ckpt, .pth)",
    )
    command.add_argument(
        "-o", "--output", type=a_path, metavar="OUT", help="the new file of a single INPUT (default: the same name with .safetensors)"
    )
    command.add_argument("--dape", type=a_path, help="for a tagger: DAPE.pth, to be merged into it")
    command.add_argument(
        "--vae", type=a_path, metavar="BASE", help="for a light decoder: its base's VAE, as a VAE file, a whole checkpoint or a diffusers folder"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_info(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_info)
    command.epilog = f"examples:\n  {PROG} info osediff.pkl noise_predictor_sd_turbo_v5.pth\n  {PROG} info restored/cat_x4.png\n"
    command.add_argument("file", type=a_path, nargs="+", metavar="FILE")


def _add_train(command: argparse.ArgumentParser) -> None:
    add_trainings(command, _common())


def _upscale(arguments: argparse.Namespace) -> int:
    from .settings import Settings
    from .upscale import upscale
    from .watch import watch

    settings = Settings.from_arguments(arguments)
    if settings.ray is not None:
        from .cluster.run import upscale_on_cluster

        return upscale_on_cluster(settings)
    return watch(settings) if settings.watch else upscale(settings)


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
    "upscale": ("restore and upscale pictures", _add_upscale),
    "evaluate": ("measure a method, or existing results, on a benchmark", add_evaluate),
    "compare": ("show the same crops of several results on one sheet", add_compare),
    "verify": ("check every stage on this machine with your files, and print a report", add_verify),
    "convert": ("turn .pkl, .pth and .pt weights into safetensors", _add_convert),
    "info": ("describe a weight file and what it fits, or how a result was made", _add_info),
    "train": ("train a method", _add_train),
}
