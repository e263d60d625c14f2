"""Which images a training uses: folders, lists and files; what cannot be read, and what the run itself writes, is left out and named."""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep_sr.image.formats import readable

from ..pictures import UnreadableError, find_in_folder, read_size

_log = logging.getLogger(__name__)

_OWN_FOLDERS = ("samples", "logs", "checkpoint", "checkpoint.old", "checkpoint.part")
"""What a run writes below its output."""

_NAMED = 10


def parse_source(text: str) -> tuple[Path, float | None]:
    """``SOURCE[=SHARE]`` as a path and a share. What exists under the whole name is that, ``year=2020`` too.

    Raises:
        ValueError: there is neither such a path nor one with a share, or the share is no number above 0.
    """
    whole = Path(text).expanduser()
    name, separator, share = text.rpartition("=")
    if not text.strip() or whole.exists() or not separator:
        if not text.strip():
            raise ValueError("data: found an empty name, expected a folder of pictures, a text list of paths, or a picture.")
        return whole, None
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"data: found nothing at {text}, expected a folder of pictures, a text list of paths, or a picture.")
    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"data: found {text!r}, expected a number above 0 behind the =.")
    return path, number


def find_training_set(data: Sequence[str], output: Path) -> tuple[list[Path], list[float]]:
    """The images of ``--data`` and how often each is taken, relative to the others.

    Headers are looked at; what is no image is named and left out, in each run alike. What ``output`` holds of the run is never taken.

    Raises:
        ValueError: a source is missing, holds no image that can be read, or is where the run writes.
    """
    paths, weights = [], []
    for text in data:
        source, share = parse_source(text)
        found = without_unreadable(without_own_output(find_pictures([source]), source, output), source)
        paths += found
        weights += [1.0 if share is None else share / len(found)] * len(found)
    return paths, weights


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """Images of folders (with their subfolders), of text lists (a path on each line, relative to the list), and single files, in a fixed order.

    Raises:
        ValueError: a source is missing or holds no images.
    """
    found = []
    for source in sources:
        if source.is_dir():
            pictures = find_in_folder(source, readable())
        elif source.suffix.lower() in readable() and source.is_file():
            pictures = [source]
        elif source.is_file():
            pictures = [source.parent / Path(line).expanduser() for line in _read_list(source)]
        else:
            raise ValueError(f"data: found nothing at {source}, expected a folder of pictures, a text list of paths, or a picture.")
        missing = [path for path in pictures if not path.is_file()]
        if missing or not pictures:
            what = f"{missing[0]}, which is not there" if missing else "no pictures"
            raise ValueError(f"data: found {what} in {source}, expected {', '.join(sorted(readable()))}.")
        found += pictures
    return found


def _read_list(path: Path) -> list[str]:
    """Lines of a text list in UTF-8, or in UTF-16 where its byte order mark says so."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"data: found {path}, which is no text in UTF-8 (line {line}), expected a picture or a list of paths. Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"data: found {path}, which is no text, expected a folder, a picture or a list of paths.")
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def without_own_output(paths: list[Path], source: Path, output: Path) -> list[Path]:
    """Leave out what the run writes below ``output``: all of it, or, where the images lie in the output itself, the run's own folders.

    Raises:
        ValueError: the source is one of those folders.
    """
    output, source = output.resolve(), source.resolve()
    own = [output / name for name in _OWN_FOLDERS]
    if source.is_dir() and any(source == folder or folder in source.parents for folder in own):
        raise ValueError(f"data: found {source}, where the run writes its own samples. Give another --output, or take other pictures.")
    if output not in (source, *source.parents):
        own = [output]
    left = [path for path in paths if not any(folder in path.resolve().parents for folder in own)]
    if len(left) < len(paths):
        _log.warning("data: %d pictures in %s are left out: the run itself writes there.", len(paths) - len(left), output)
    if not left:
        raise ValueError(f"data: found only pictures in {source} that the run itself has written, expected others.")
    return left


def without_unreadable(paths: list[Path], source: Path) -> list[Path]:
    """Leave out and name the files whose headers are no image's.

    Raises:
        ValueError: none is left.
    """
    bad: dict[Path, str] = {}
    for path in paths:
        try:
            read_size(path)
        except (UnreadableError, OSError) as error:
            bad[path] = str(error)
    if bad and len(bad) == len(set(paths)):
        path, reason = next(iter(bad.items()))
        raise ValueError(f"data: found no picture in {source} that can be read; {path}: {reason}")
    for path, reason in list(bad.items())[:_NAMED]:
        _log.warning("data: %s is left out: %s", path, reason)
    if len(bad) > _NAMED:
        _log.warning("data: and %d more are left out.", len(bad) - _NAMED)
    return [path for path in paths if path not in bad]
