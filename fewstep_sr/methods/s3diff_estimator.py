"""S3Diff's degradation estimator as a file beside the adapter: what it is, where it is published, how it is written."""

from pathlib import Path

from ..networks.degradation import DegradationConfig, EstimatorWeights, parse_estimator
from ..weights.kinds import FileKind, has_key
from ..weights.save import save_safetensors
from .method import Companion, Source


def save_estimator(weights: EstimatorWeights, path: str | Path) -> None:
    """Write an estimator as safetensors under its published keys."""
    save_safetensors(weights.state_dict, path, {"family": "S3Diff degradation estimator"})


def _summary_estimator(weights: EstimatorWeights) -> list[str]:
    published = "as published" if weights.config == DegradationConfig() else "not the published dimensions"
    channels = f"{weights.config.channels} and {weights.config.out_channels} channels ({published})"
    return [f"  network: {channels}; blur and noise of an image, 0 to 1", "  fits: S3Diff (--estimator)"]


ESTIMATOR = Companion(
    option="estimator",
    weights=Source(
        what="S3Diff's degradation estimator",
        folder="s3diff",
        names=("de_net.safetensors", "de_net.pth"),
        licence="Apache-2.0, https://github.com/ArcticHare105/S3Diff",
        size="about 9 MB (computed from tensor shapes)",
        url="https://github.com/ArcticHare105/S3Diff/raw/main/assets/mm-realsr/de_net.pth",
    ),
    kind=FileKind("s3diff-estimator", "S3Diff's degradation estimator", has_key(r"^fc_degree\.0\.0\.")),
    contents="two small networks that estimate blur and noise",
    source="de_net.pth is at github.com/ArcticHare105/S3Diff, in assets/mm-realsr.",
    parse=parse_estimator,
    save=save_estimator,
    summary=_summary_estimator,
    replaced_by=("blur", "noise"),
)
