"""Perceptual losses, whose weights must be at hand: nothing is fetched."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep_sr.weights.kinds import unwrap, without_wrappers
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.strict import require_weights

_log = logging.getLogger(__name__)

VGG_FILE = "vgg16-397923af.pth"

# VGG-16's convolutions by their place in torchvision's ``features``, with their widths, in the five groups whose ends are compared.
_VGG = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)


def load_lpips() -> nn.Module | None:
    """LPIPS on VGG-16 (Zhang et al., CVPR 2018), or None, said in the log, where the ``lpips`` package or VGG's weights are missing."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not find_spec("lpips"):
        missing = "the lpips package is not installed (pip install lpips)"
    elif not weights.is_file():
        missing = f"VGG's weights are not at {weights} (https://download.pytorch.org/models/{VGG_FILE})"
    else:
        from lpips import LPIPS

        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    _log.warning("the LPIPS loss, which the published training uses, is left out: %s.", missing)
    return None


class LatentLPIPS(nn.Module):
    """InvSR's LPIPS on latents: VGG-16 with four input channels and without its first three poolings, weights as ``vgg16_sdturbo_lpips.pth``."""

    def __init__(self):
        super().__init__()
        self.groups: Any = nn.ModuleList()
        width = 4
        for group in _VGG:
            layers = nn.ModuleList()
            for _, channels in group:
                layers.append(nn.Conv2d(width, channels, 3, padding=1))
                width = channels
            self.groups.append(layers)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(group[-1][1])) for group in _VGG)

    @classmethod
    def from_file(cls, path: str | Path) -> "LatentLPIPS":
        """Read InvSR's published file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else.
        """
        state, _ = read_weights(path)
        name = Path(path).name
        state = without_wrappers(unwrap(state) or state, name)
        network = cls()
        for i, group in enumerate(_VGG):
            for (place, _), layer in zip(group, network.groups[i], strict=True):
                for part in ("weight", "bias"):
                    _fill(getattr(layer, part), state, f"net.slice{i + 1}.{place}.{part}", name)
            _fill(network.weights[i], state, f"lin{i}.model.1.weight", name)
        return network.eval().requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distance of latents (B, 4, h, w), mean over the batch."""
        distance = a.new_zeros(())
        for i, (layers, weight) in enumerate(zip(self.groups, self.weights, strict=True)):
            if i == 4:  # the one pooling that is left
                a, b = (nn.functional.max_pool2d(x, 2) for x in (a, b))
            for layer in layers:
                a, b = layer(a).relu(), layer(b).relu()
            difference = (_unit(a) - _unit(b)) ** 2
            distance = distance + (difference * weight.view(1, -1, 1, 1)).sum(dim=1).mean()
        return distance


def _fill(parameter: nn.Parameter, state: Mapping, key: str, name: str) -> None:
    weight = state.get(key)
    if not isinstance(weight, torch.Tensor) or weight.squeeze().shape != parameter.shape:
        found = f"the shape {tuple(weight.shape[:8])}" if isinstance(weight, torch.Tensor) else "no tensor"
        raise ValueError(f"{name}: {key} has {found}, expected {tuple(parameter.shape)}: InvSR's latent LPIPS, vgg16_sdturbo_lpips.pth.")
    require_weights(weight, f"{name}: {key}")
    parameter.data.copy_(weight.squeeze())


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
