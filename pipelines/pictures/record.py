"""How a result was made, kept in its own file: settings are part of what done means."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin

from fewstep_sr.image.formats import readers

RECORD_TAG = 0x000B
"""EXIF's ProcessingSoftware, which PNG, JPEG, WebP and TIFF all hold, and which cameras leave alone."""

_NAME = "ComfyUI-FewStepSR"
_LONGEST = 4000


def make_record(settings: Mapping[str, Any], source: Path) -> str:
    """A line for the result's file: the settings for people to read, and a digest of them and of the source to compare by.

    The source counts by its name and size. Of other files, too, settings should hold names alone: results are passed on.
    """
    settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
    counted = {"settings": settings, "source": source.name, "bytes": source.stat().st_size}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:32]
    line = f"{_NAME} {digest} {json.dumps(settings, sort_keys=True)}"
    return line if len(line) <= _LONGEST else f"{_NAME} {digest}"  # a prompt may be a book


def read_record(path: Path) -> str | None:
    """The record of a result, from its header; None of a file that is not one, or that another program has written since."""
    try:
        with Image.open(path, formats=readers(path.suffix)) as image:
            line = image.tag_v2.get(RECORD_TAG) if isinstance(image, TiffImagePlugin.TiffImageFile) else _in_exif(image.info.get("exif"))
    except Exception:  # whatever lies there
        return None
    return line.rstrip("\0") if isinstance(line, str) and line.startswith(_NAME) else None


def read_video_record(path: Path) -> str | None:
    """The record of a video that is a result: the last line of its comment."""
    try:
        import av

        with av.open(str(path), metadata_errors="replace") as container:
            lines = next(value for key, value in container.metadata.items() if key.lower() == "comment").splitlines()
    except Exception:  # whatever lies there
        return None
    return lines[-1] if lines and lines[-1].startswith(_NAME) else None


def _in_exif(data: bytes | None) -> Any:
    exif = Image.Exif()
    exif.load(data or b"")
    return exif.get(RECORD_TAG)


def same_result(record: str, other: str) -> bool:
    return record.split(" ", 2)[:2] == other.split(" ", 2)[:2]


def recorded_settings(record: str) -> dict[str, Any]:
    """The settings in words; empty where they were too long to keep, or are no longer what was written."""
    words = record.split(" ", 2)
    try:
        settings = json.loads(words[2]) if len(words) == 3 else {}
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
