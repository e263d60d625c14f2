"""Numbers on a training's command line, refused by the parser where they cannot be meant."""

import argparse
import math
from collections.abc import Callable

MOST = 2**31 - 1


def whole(low: int, high: int = MOST, multiple: int = 1) -> Callable[[str], int]:
    """An argparse type: whole numbers from ``low`` to ``high``, multiples of ``multiple`` alone."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high or number % multiple:
            kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
            raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected {kind}, {f'{low} to {high}' if high < MOST else f'{low} or more'}.")
        return number

    return read


def real(low: float, high: float = math.inf, *, above: bool = False, below: bool = False, infinite: bool = False) -> Callable[[str], float]:
    """An argparse type: numbers from ``low`` to ``high``; ``above`` and ``below`` leave out the ends themselves. Infinity only where it has a meaning."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        low_fits = number > low if above else number >= low
        high_fits = number < high if below else number <= high
        if not (low_fits and high_fits and (infinite or math.isfinite(number))):
            ends = [f"{'above' if above else 'at least'} {low:g}"] + ([f"{'below' if below else 'at most'} {high:g}"] if high < math.inf else [])
            raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a number {' and '.join(ends)}{' or inf' if infinite else ''}.")
        return number

    return read


WEIGHT = real(0)
"""Of a loss."""
