"""Copies between a device and the host, counted on a machine that has only the host."""

from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("cuda")


class Transfers(TorchDispatchMode):
    """Counts what crosses between the CPU and the device: ``to device``, ``to host``, and ``waits`` for a number that the host needs.

    Operations that take tensors of both kinds count as a copy to the device; single numbers on the CPU go along with the call. ``queued`` of the copies are
    between the device and page-locked memory, and the host does not wait for them.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._locked = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (_devices(tree) for tree in ((args, kwargs), out))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts["waits"] += DEVICE.type in given
        elif func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            target = _devices(args[0]) if func is torch.ops.aten.copy_.default else made
            source = _devices(args[1]) if func is torch.ops.aten.copy_.default else given
            self.counts["to device"] += source == {"cpu"} and DEVICE.type in target
            self.counts["to host"] += DEVICE.type in source and target == {"cpu"}
            non_blocking = (kwargs or {}).get("non_blocking") or args[2:] == (True,)
            self.counts["queued"] += bool(source != target and non_blocking and any(t in self._locked for t in args[:2]))
        else:
            self.counts["to device"] += given == {"cpu", DEVICE.type}
        if (kwargs or {}).get("pin_memory"):
            self._locked[out] = None
        return out


def _devices(tree) -> set[str]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {t.device.type for t in tensors if t.ndim or t.device.type != "cpu" or len(tensors) == 1}


def count(build: Callable[[], Callable[[], object]]) -> dict[str, int]:
    """Run what ``build`` returns, with fake tensors for both."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        run = build()
        with Transfers() as transfers:
            run()
    return dict(+transfers.counts)
