"""Networks compiled with torch.compile, so that images of all sizes and their tiles share the graphs."""

import copy
from collections.abc import Callable
from typing import Any

import torch


class Compiler:
    """Calls functions as torch.compile has made them, each compiled when it is first called.

    Height and width of an image are kept open, so that another size needs no new graph; its number of images is not.

    Args:
        backend: torch.compile's.
    """

    def __init__(self, backend: str | Callable = "inductor"):
        self.backend = backend
        self._compiled: dict[Callable, Callable] = {}
        self._unets: dict[torch.nn.Module, torch.nn.Module] = {}

    def unet(self, network: torch.nn.Module) -> torch.nn.Module:
        """diffusers' UNet, the same for all sizes: it asks whether sides are multiples of 8, of which it then makes two or three graphs.

        The copy, which shares everything with the network, takes no side for one, and hands sizes on to its upsampling, which gives the same.
        """
        if network not in self._unets:
            self._unets[network] = copied = copy.copy(network)
            copied.num_upsamplers = 24  # type: ignore[assignment]
        return self._unets[network]

    def __call__(self, function: Callable, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``function(image, *args, **kwargs)`` with an image (B, C, h, w)."""
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, backend=self.backend)
        for dim in (2, 3):
            torch._dynamo.maybe_mark_dynamic(image, dim)
        return self._compiled[function](image, *args, **kwargs)


def call_plainly(function: Callable, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a :class:`Compiler` does, without compiling."""
    return function(image, *args, **kwargs)
