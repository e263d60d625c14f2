"""``python -m pipelines train``, and where the commands went that only the miniature's making needs."""

import argparse
import shlex
from collections.abc import Sequence

from .methods import add_methods

_MOVED = {("synthesize",): "synthesize", ("train", "vae"): "vae", ("train", "base"): "base", ("train", "pack"): "pack"}


def add_trainings(command: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    add_methods(command.add_subparsers(required=True, metavar="WHAT"), common)


def where_it_went(argv: Sequence[str]) -> str | None:
    """What to type instead of a command that moved to the miniature's workshop; None for all others."""
    for old, new in _MOVED.items():
        if tuple(argv[: len(old)]) == old:
            command = shlex.join(["python", "-m", "tools.miniature", new, *argv[len(old) :]])
            return f"'{' '.join(old)}' is among the miniature's own tools now. In a checkout of the repository: {command}"
    return None
