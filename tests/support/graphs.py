"""What ``torch.compile`` makes: its graphs, counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Graphs(list):
    """A backend that computes graphs as they are and keeps them."""

    def __call__(self, graph: torch.fx.GraphModule, inputs) -> torch.nn.Module:
        self.append(graph)
        return graph


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before and after, without oneDNN, before which PyTorch asks of each convolution on a CPU whether its input is small: a graph for each answer."""
    torch._dynamo.reset()
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch._dynamo.reset()
