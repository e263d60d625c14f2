"""Containers and codecs of results. Without PyAV, so that ``--help`` and the listing of files need none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Suffixes of results, and FFmpeg's names of their containers. Each holds timestamps of variable rate."""

READ = frozenset((*CONTAINERS, *(".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".wmv", ".flv", ".3gp", ".ogv", ".y4m", ".mxf")))
"""Suffixes, in lower case, that name a video. Others are tried as pictures."""

OTHERWISE = ".mkv"
"""The result's suffix where the source's container is not written: Matroska holds every codec."""

PIXEL_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")


@dataclass(frozen=True)
class Codec:
    """An encoder.

    Args:
        encoder: FFmpeg's name.
        crf: the constant rate factor's default, lowest (best) and highest; None for an encoder without one.
        options: of the encoder.
        containers: FFmpeg's names of the containers that hold it.
        pixel_formats: that it takes.
        segments: FFmpeg's name of the container of the parts that a result is joined of: one that holds the codec, and timestamps in any time base.
    """

    encoder: str
    crf: tuple[float, float, float] | None
    options: Mapping[str, str] = field(default_factory=dict)
    containers: tuple[str, ...] = ("mp4", "mov", "matroska")
    pixel_formats: tuple[str, ...] = PIXEL_FORMATS
    segments: str = "nut"


CODECS = {
    "h264": Codec("libx264", (16, 0, 51), {"preset": "medium"}),
    "hevc": Codec("libx265", (18, 0, 51), {"preset": "medium", "x265-params": "log-level=error:repeat-headers=0"}),
    "av1": Codec("libsvtav1", (24, 1, 63), {"preset": "6"}, ("mp4", "matroska", "webm"), ("yuv420p", "yuv420p10le")),
    "vp9": Codec("libvpx-vp9", (24, 0, 63), {"b": "0", "row-mt": "1", "cpu-used": "2"}, ("mp4", "matroska", "webm")),
    "prores": Codec("prores_ks", None, {"profile": "hq"}, ("mov", "matroska"), ("yuv422p10le", "yuv444p10le"), "mov"),
    "ffv1": Codec("ffv1", None, {"level": "3"}, ("matroska",)),
}
"""``--codec``. The qualities are those at which encoding costs less than the eye sees: the frames were dear."""


def is_video(path: Path) -> bool:
    return path.suffix.lower() in READ


def is_pattern(path: Path) -> bool:
    """Whether a name stands for one file a frame, as FFmpeg writes it: ``frames/%06d.png``."""
    return "%" in path.name


def default_codec(container: str, deep: bool) -> str:
    """Plays everywhere; frames of more than 8 bits go to HEVC, since few players decode them in H.264."""
    return "av1" if container == "webm" else "hevc" if deep else "h264"


def default_pixel_format(codec: Codec, deep: bool) -> str:
    """4:2:0, of 10 bits where the source has more than 8: at twice the size it holds all the colour of a 4:4:4 source."""
    wanted = "yuv420p10le" if deep else "yuv420p"
    return wanted if wanted in codec.pixel_formats else codec.pixel_formats[0]


def require_video_options(target: Path, codec: str | None, crf: float | None, pixel_format: str | None) -> None:
    """Refuse what the result's container or codec does not take.

    Raises:
        ValueError: as said.
    """
    container = CONTAINERS[target.suffix.lower()]
    chosen = CODECS[codec] if codec else None
    if chosen and container not in chosen.containers:
        fitting = ", ".join(suffix for suffix, name in CONTAINERS.items() if name in chosen.containers)
        raise ValueError(
            f"--codec: found {codec} for {target.name}, expected a name that ends in {fitting}. Give another name with -o, or another codec."
        )
    if codec is None and container == "webm":
        codec, chosen = "av1", CODECS["av1"]
    if crf is not None:
        judged = chosen or CODECS["h264"]
        if judged.crf is None:
            raise ValueError(f"--crf: found {crf:g}, but {codec} has one quality. Leave it out, or choose another --codec.")
        _, low, high = judged.crf
        if not low <= crf <= high:
            raise ValueError(f"--crf: found {crf:g}, expected {low:g} (best) to {high:g} for {codec or 'h264'}.")
    if pixel_format and chosen and pixel_format not in chosen.pixel_formats:
        raise ValueError(f"--pixel-format: found {pixel_format}, expected {' or '.join(chosen.pixel_formats)} for {codec}.")
