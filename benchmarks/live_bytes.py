"""Bytes that tensors have on a device at the same time, counted under PyTorch's fake tensors: no device is needed."""

import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on ``device`` that operations make and that are still referenced. Views count as what they look at."""

    def __init__(self, device: torch.device = DEVICE):
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._made: set[int] = set()
        self._given: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._given |= {storage._cdata for storage in self._storages((args, kwargs))} - self._made
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._made and key not in self._given:
                self._made.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._made.discard(key)
        self.now -= size

    def _storages(self, tree) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device.type:
                yield leaf.untyped_storage()


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel has it in memory: the answer alone, no matrix of queries by keys."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that ``run`` has on the device at most, above what was there before."""
    live = LiveBytes()
    with torch.no_grad(), live, FusedAttention():
        run()
    return live.peak
