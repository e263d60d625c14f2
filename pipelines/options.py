"""Options of the commands that restore images: the method and its own, weights, and the machine."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def a_path(text: str) -> Path:
    """An argparse type: a path. An empty one, as of a variable of the shell that is not set, would be the current folder."""
    return Path(a_name(text))


def a_name(text: str) -> str:
    """An argparse type: text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty name (a variable of the shell that is not set?). Give one, or leave the option out.")
    return text


class Once(argparse.Action):
    """An option that must not come twice, where the first would be lost without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        if (before := getattr(namespace, self.dest)) is not None:
            raise argparse.ArgumentError(self, f"found {before} and {values}, expected one. Run the command once for each.")
        setattr(namespace, self.dest, values)


def add_method(
    command: argparse.ArgumentParser,
    others: Sequence[str] = (),
    what: str | None = None,
    targets: bool = False,
    action: str | type[argparse.Action] = "store",
) -> None:
    """``--method``, of METHODS and ``others``, with the size, prompts, seed and the methods' own options. ``what`` is its help; ``targets`` adds the
    sizes that results may have in place of a factor; ``action`` is what argparse does with ``--method``.
    """
    from fewstep_sr.image.color import COLOR_FIXES
    from fewstep_sr.methods import METHODS
    from fewstep_sr.miniature import COLOR_FIX as DEMO_COLOR_FIX

    from .settings import DEFAULT, DEMO_DEFAULT, every_option

    method = command.add_argument_group("method")
    method.add_argument("--method", action=action, choices=[*METHODS, *others], help=what or f"default: {DEFAULT}, {DEMO_DEFAULT} with --demo")
    method.add_argument("--prompt", help="what the pictures show, or the style of the results (default: the method's own)")
    method.add_argument("--negative-prompt", help="what to avoid; used where --cfg is not 1")
    guided = "".join(f", {record.cfg:g} with {record.key}" for record in METHODS.values() if record.cfg != 1)
    method.add_argument("--cfg", type=float, help=f"guidance; 1 is twice as fast as other values (default, as published: 1{guided})")
    method.add_argument("--seed", type=int, default=12345, help="random seed, the same for each picture (default: %(default)s)")
    published = ", ".join(f"{record.color_fix or 'none'} with {record.key}" for record in METHODS.values())
    method.add_argument("--color-fix", choices=[*COLOR_FIXES, "none"], help=f"default, as published: {published}; {DEMO_COLOR_FIX} with --demo")

    size = command.add_argument_group("size of the results").add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, default=4.0, metavar="FACTOR", help="upscale by this factor (default: %(default)g)")
    if targets:
        size.add_argument("--long-side", type=int, metavar="PIXELS", help="longest side of each result")
        size.add_argument("--short-side", type=int, metavar="PIXELS", help="shortest side of each result")
        size.add_argument("--megapixels", type=float, metavar="N", help="area of each result; 1 is 1024 x 1024 pixels, as in ComfyUI's nodes")

    single = command.add_argument_group("options of single methods")
    for name, owners in every_option().items():
        option = owners[0][1]
        titles = " and ".join(owner.title for owner, _ in owners)
        default = "" if option.default in (None, ()) else f" (default: {option.default})"
        single.add_argument(
            f"--{name.replace('_', '-')}",
            type=_in_words(option.parse),
            nargs="+" if option.many else None,
            metavar=option.metavar,
            help=f"{titles}: {option.help}{default}",
        )


def _in_words(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` with its own words where it refuses a value; argparse has others for a ValueError, which name the function."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse if isinstance(parse, type) else parsed


def add_weights(command: argparse.ArgumentParser) -> None:
    """Where weights are, or that the miniature is used."""
    weights = command.add_argument_group("weights", "Looked for at the paths given, in a ComfyUI's models folder, in the hub's cache.")
    weights.add_argument("--demo", action="store_true", help="use the miniature that comes with this package: seconds on a CPU, no download")
    weights.add_argument("--base", type=a_name, help="Stable Diffusion: a .safetensors or .ckpt file, a diffusers folder, or a hub id")
    weights.add_argument("--weights", type=a_name, help="the method's own weights: its adapter, or InvSR's noise predictor")
    weights.add_argument(
        "--decoder", type=a_path, help="another decoder for the base's VAE: AdcSR's, VOSR's, or that of a VAE file (default: the base's)"
    )
    weights.add_argument("--comfyui", type=a_path, default=os.environ.get("COMFYUI_PATH") or None, help="a ComfyUI folder (default: COMFYUI_PATH)")
    weights.add_argument("--download", action="store_true", help="download what is missing; the licences are shown")


def add_machine(command: argparse.ArgumentParser) -> None:
    """Device, precision and tiles."""
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best one)")
    machine.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="default: float16 on a GPU; on a CPU float32, or with upscale bfloat16 if that is measured to be much faster",
    )
    machine.add_argument("--tile", type=int, default=1024, help="tile size in pixels for larger results; 0: no tiles (default: %(default)s)")
    machine.add_argument("--compile", action="store_true", help="compile the networks: takes minutes, pays off for many images of any size")
    machine.add_argument("--offload", action="store_true", help="keep only the active network on the GPU")
