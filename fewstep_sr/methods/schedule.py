"""Few-step schedules: published timesteps, or a user's own, as indices of the noise schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from reprlib import repr as shorten


@dataclass(frozen=True)
class Schedule:
    """At which timesteps a method calls the diffusion model, counted as its authors publish them.

    Args:
        start: the first timestep where nothing else is said, and the largest that is allowed.
        origin: what the method's count begins with: 1 where its 200 is index 199, 0 where its 999 is index 999.
        published: timesteps by the number of steps.
        reason: why ``start`` is the largest.
        fixed_start: why every schedule begins with ``start``, where that is so.
    """

    start: int
    origin: int
    reason: str
    published: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    fixed_start: str | None = None

    def indices(self, steps: int, timesteps: Sequence[int] = ()) -> list[int]:
        """Indices of the noise schedule, descending.

        Args:
            steps: number of model calls; those that are not published are spaced evenly from ``start``.
            timesteps: in place of the published ones, counted as the method does; ``steps`` is ignored then.

        Raises:
            ValueError: no steps, timesteps out of range or not strictly descending.
        """
        if isinstance(timesteps, Integral) or not all(isinstance(timestep, Integral) for timestep in timesteps):
            raise ValueError(f"timesteps: found {shorten(timesteps)}, expected a list of whole numbers.")
        if not timesteps and (not isinstance(steps, Integral) or steps < 1):
            raise ValueError(f"steps: found {steps!r}, expected a whole number, 1 or more.")
        chosen = list(timesteps or self.published.get(steps) or self._evenly(steps))
        if max(chosen) > self.start or min(chosen) < self.origin:
            raise ValueError(f"timesteps: found {shorten(chosen)}, expected values from {self.start} down to {self.origin}: {self.reason}.")
        if any(a <= b for a, b in pairwise(chosen)):
            raise ValueError(f"timesteps: found {shorten(chosen)}, expected each smaller than the one before it.")
        if self.fixed_start and chosen[0] != self.start:
            raise ValueError(f"timesteps: found {shorten(chosen)}, expected {self.start} first: {self.fixed_start}")
        return [timestep - self.origin for timestep in chosen]

    def _evenly(self, steps: int) -> list[int]:
        """``steps`` whole timesteps from ``start`` towards 0, 0 itself left out."""
        if steps > self.start:
            raise ValueError(f"steps: found {steps}, expected at most {self.start}: there are only that many timesteps below the start.")
        return [self.start - self.start * i // steps for i in range(steps)]


def parse_timesteps(text: str) -> list[int]:
    """Timesteps written as ``"250, 200, 100"`` (commas, semicolons or spaces). Empty text gives an empty list.

    Raises ValueError for anything that is not a whole number.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(f"timesteps: found {text[:80]!r}, expected whole numbers such as '250, 200, 150, 100, 50'.") from None
