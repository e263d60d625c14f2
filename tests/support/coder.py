"""A coder with small networks of a VAE's shape, which keeps what they are called with."""

import math

import torch
from memory import Memory
from torch import nn

from fewstep_sr.tiling.vae import TiledCoder


class Mean(nn.Module):
    """Attention to all cells alike, in whole pictures."""

    def forward(self, x):
        return x.mean((-2, -1), keepdim=True).expand_as(x)


class SharedMean(nn.Module):
    """Likewise in tiles of a larger picture."""

    def __init__(self, block, whole):
        super().__init__()
        self.block, self.whole = block, whole

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.whole.attend(self.block, torch.zeros_like(tokens), torch.zeros_like(tokens), tokens).mT.reshape(x.shape)


def share_mean(copied, block, whole):
    copied._modules.update({name: SharedMean(child, whole) for name, child in block._modules.items() if isinstance(child, Mean)})


class Coder:
    """A coder of ``scale_in`` to ``scale_out`` that keeps what its network is called with, and has memory for ``most`` elements."""

    def __init__(self, scale_in=1, scale_out=1, fits=1, most=math.inf, network=None, runtime=None):
        self.calls, self.asked, self.pictures = [], [], []
        self.network, self.runtime, self.most = network or nn.Sequential(nn.Identity()), runtime or Memory(), most
        self.scale_in, self.scale_out = scale_in, scale_out
        self.coder = TiledCoder(self.network, self.call, share_mean, scale_in, scale_out, lambda *size: self.asked.append(size) or fits, self.runtime)

    def call(self, network, part):
        self.calls.append((network is self.network, tuple(part.shape)))
        if part.numel() > self.most:
            raise MemoryError
        part = part[..., :: self.scale_in, :: self.scale_in].double()
        return network(part).repeat_interleave(self.scale_out, -1).repeat_interleave(self.scale_out, -2)

    def run(self, pictures: torch.Tensor, tile: int) -> torch.Tensor:
        sides = [side // self.scale_in * self.scale_out for side in pictures.shape[-2:]]
        result = torch.zeros(len(pictures), pictures.shape[1], *sides)
        self.coder.run(lambda i: self.pictures.append(i) or pictures[i : i + 1], result, tile)
        return result
