"""S3Diff's degradation estimator: a low-quality image in, how blurred and how noisy it is out, each as a score from 0 to 1.

Two small networks of one shape, one for each score, without normalisation (MM-RealSR, Mou et al., ECCV 2022). Module names are those of the
published weights, so that a state dict loads as it is. The adapter's weights follow the scores closely: compute it in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..weights.kinds import without_wrappers
from ..weights.strict import own_copies
from .indices import dimension

SCORES = ("blur", "noise")
"""What the networks estimate, in their order."""

BLOCKS = (6, 2)
"""Residual blocks before and after the strided convolution; not the file's to choose, since its stride is in no shape."""

HALO = 24
"""Pixels around a strip that its features depend on (22), up to an even number."""

STRIP = 1 << 20
"""Pixels that go through at once, about: 64 channels of them take 256 MiB."""


@dataclass(frozen=True)
class DegradationConfig:
    """Dimensions of an estimator, all of them visible in its weights' shapes."""

    channels: int = 64
    out_channels: int = 128
    hidden: int = 512

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor]) -> "DegradationConfig":
        """Read the dimensions off ``state_dict``. Raises ValueError where a tensor is missing or of another number of axes."""
        return cls(
            channels=dimension(state_dict, "conv_first.0.weight", 0, ndim=4),
            out_channels=dimension(state_dict, f"body.0.{BLOCKS[0]}.weight", 0, ndim=4),
            hidden=dimension(state_dict, "fc_degree.0.0.weight", 0, ndim=2),
        )


class DegradationEstimator(nn.Module):
    """The network. ``operations`` supplies Linear and Conv2d: ``torch.nn``, or ``comfy.ops`` under ComfyUI's memory management."""

    def __init__(self, config: DegradationConfig, dtype: torch.dtype | None = None, device=None, operations=nn):
        super().__init__()
        self.config = config
        kw = {"dtype": dtype, "device": device}
        channels, out_channels = config.channels, config.out_channels
        self.conv_first = nn.ModuleList(operations.Conv2d(3, channels, 3, padding=1, **kw) for _ in SCORES)
        self.body = nn.ModuleList(
            nn.Sequential(
                *(ResidualBlock(channels, operations, **kw) for _ in range(BLOCKS[0])),
                operations.Conv2d(channels, out_channels, 3, stride=2, padding=1, **kw),
                *(ResidualBlock(out_channels, operations, **kw) for _ in range(BLOCKS[1])),
            )
            for _ in SCORES
        )
        self.fc_degree = nn.ModuleList(
            nn.Sequential(operations.Linear(out_channels, config.hidden, **kw), nn.ReLU(), operations.Linear(config.hidden, 1, **kw), nn.Sigmoid())
            for _ in SCORES
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores (B, 2), blur and noise, 0 to 1.

        Args:
            image: the low-quality images (B, 3, h, w) at their own size, not upscaled and not padded, RGB in [0, 1].
        """
        return torch.cat([self.fc_degree[i](self._mean_features(i, image)) for i in range(len(SCORES))], dim=1)

    def _mean_features(self, i: int, image: torch.Tensor) -> torch.Tensor:
        """The mean over the image of network i's features, (B, channels): in strips of rows, which overlap so far that they change nothing."""
        height, width = image.shape[-2:]
        rows = max(2 * HALO, STRIP // (width * len(image)) // 2 * 2)
        totals, cells = [], 0
        for top in range(0, height, rows):
            above = min(HALO, top)
            features = self.body[i](self.conv_first[i](image[..., top - above : top + rows + HALO, :]))
            own = features[..., above // 2 : (above + min(rows, height - top) + 1) // 2, :]
            totals.append(own.sum(dim=(-2, -1)))
            cells += own.shape[-2] * own.shape[-1]
            del features, own  # before the next strip's are made
        return torch.stack(totals).sum(dim=0) / cells


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, operations, **kw):
        super().__init__()
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1, **kw)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1, **kw)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(F.relu(self.conv1(hidden)))


@dataclass(frozen=True)
class EstimatorWeights:
    """A degradation estimator's weights under the keys of :class:`DegradationEstimator`."""

    config: DegradationConfig
    state_dict: dict[str, torch.Tensor]

    def network(self) -> DegradationEstimator:
        """The network in float32 on the CPU."""
        network = DegradationEstimator(self.config)
        network.load_state_dict(self.state_dict)
        return network.float().eval().requires_grad_(False)


def parse_estimator(state: Mapping, metadata: Mapping[str, str], name: str) -> EstimatorWeights:
    """The published file is a bare state dict, and so is the safetensors form."""
    weights = {key: tensor for key, tensor in without_wrappers(state, name).items() if isinstance(tensor, torch.Tensor)}
    try:
        config = DegradationConfig.from_state_dict(weights)
        expected = {key: tuple(tensor.shape) for key, tensor in DegradationEstimator(config, device="meta").state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except RuntimeError:  # a product of its dimensions is beyond 64 bits
        raise ValueError(f"{name}: found an estimator of dimensions that no network has; the file is damaged.") from None
    for key, shape in expected.items():
        found = tuple(weights[key].shape[:8]) if key in weights else None
        if found != shape:
            raise ValueError(f"{name}: {key} has {f'shape {found}' if found else 'no tensor'}, expected {shape}; the file is incomplete or damaged.")
    if surplus := sorted(set(weights) - set(expected)):
        raise ValueError(f"{name}: {surplus[0]} is no part of the network ({len(surplus)} such tensors); the file is of another network.")
    return EstimatorWeights(config, {key: tensor.float() for key, tensor in own_copies(weights, name).items()})


def require_scores(scores: torch.Tensor, images: int | None = None) -> torch.Tensor:
    """Degradation scores (B, 2), float32 on the CPU.

    Raises:
        ValueError: another shape, not as many as ``images``, or values outside 0 to 1.
    """
    if scores.ndim != 2 or scores.shape[1] != 2 or not len(scores):
        raise ValueError(f"scores: found shape {tuple(scores.shape[:8])}, expected (batch, 2): blur and noise of each image.")
    if images is not None and len(scores) != images:
        raise ValueError(
            f"scores: found those of {len(scores)} images, expected {images}, as many as images: each has an adapter of its own. "
            "Repeat a row where several shall have the same."
        )
    scores = scores.detach().float().cpu()
    if not (scores.amin() >= 0 and scores.amax() <= 1):  # NaN is neither
        raise ValueError(f"scores: found values from {scores.amin():.4g} to {scores.amax():.4g}, expected 0 (none) to 1.")
    return scores


def overrule(scores: torch.Tensor, blur: float | None, noise: float | None) -> torch.Tensor:
    """The scores (B, 2) with those that are given in place of what was estimated, in every image."""
    scores = scores.clone()
    for column, value in enumerate((blur, noise)):
        if value is not None:
            scores[:, column] = value
    return scores
