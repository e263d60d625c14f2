"""Which images there are, and where their results go."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fewstep_sr.image.formats import FORMATS, WRITTEN, readable, unreadable
from fewstep_sr.video.formats import CONTAINERS, OTHERWISE, is_pattern, is_video

from .pictures import find_in_folder


@dataclass(frozen=True)
class Job:
    """An image, or a video, and its result. ``named``: the user named this one file, rather than a folder or pattern that it is in."""

    source: Path
    target: Path
    named: bool = False
    frames: tuple[Path, ...] = ()
    """Pictures that become one video, ``source`` among them as the first."""

    @property
    def is_video(self) -> bool:
        return bool(self.frames) or is_video(self.source)


@dataclass(frozen=True)
class _Source:
    path: Path
    relative: Path
    """Below the output folder."""
    named: bool = False


def list_jobs(inputs: Sequence[str], output: Path, suffix: str | None) -> list[Job]:
    """One job for each image in files, folders (with their subfolders, whose structure is kept) and globs.

    Also images of kinds that are not read (.heic and others) get one, which fails in words: nobody shall take them for done. Two links to one
    file are two images.

    Args:
        output: a folder, or a file where there is one image and the name ends like one.
        suffix: of the results, ``".png"`` and so on; None keeps each image's own.

    Raises:
        FileNotFoundError: an input is nowhere, or there is no image in any.
        ValueError: a result would replace its own source, two results would have one name, or the output's name is of no format that is written.
    """
    sources: dict[Path, _Source] = {}
    for text in inputs:
        for source in _sources(text, output):
            key = source.path.parent.resolve() / source.path.name
            if key not in sources or source.named:
                sources[key] = source
    if not sources:
        raise FileNotFoundError(f"no images found in {', '.join(inputs)}; expected {', '.join(sorted(readable()))}.")
    found = list(sources.values())
    if _is_video_name(output, found):
        files = tuple(source.path for source in sorted(found, key=lambda source: _natural(source.relative)) if not is_video(source.path))
        return [Job(files[0], output, False, files)] if files else [Job(found[0].path, output, True)]
    if is_pattern(output):
        return [_to_frames(found, output)]
    if _is_file_name(output, suffix, found):
        if len(found) > 1:
            raise ValueError(f"-o: found the file {output} for {len(found)} pictures, expected a folder.")
        jobs = [Job(source.path, output, source.named) for source in found]
    else:
        own = {source.relative for source in found if source.relative.suffix.lower() in WRITTEN}
        jobs = [Job(source.path, output / _target(source.relative, suffix, own), source.named) for source in found]
    taken: dict[Path, Path] = {}
    for job in jobs:
        target = job.target.resolve()
        if target == job.source.resolve():
            raise ValueError(f"{job.source}: the result would replace the picture itself. Give another folder with -o.")
        if target in taken:
            raise ValueError(f"{taken[target]} and {job.source} would both become {job.target}. Give them different folders, or leave out --format.")
        taken[target] = job.source
    return jobs


def _sources(text: str, output: Path) -> Iterable[_Source]:
    """Images that an input names."""
    path = _existing(text)
    suffixes = readable() | unreadable()
    if path.is_dir():
        if path.resolve() == output.resolve():
            raise ValueError(f"{text}: it is the output folder, too. Give another folder with -o.")
        inside = find_in_folder(path, suffixes)
        return [_Source(p, p.relative_to(path)) for p in inside if output.resolve() not in p.resolve().parents]
    if path.is_file():
        return [_Source(path, Path(path.name), named=True)]
    matches = [Path(match) for match in _glob(path)]
    return [_Source(p, Path(p.name)) for p in matches if p.is_file() and (p.suffix.lower() in suffixes or is_video(p))]


def _existing(text: str) -> Path:
    """The path or pattern that an input names.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is empty.
    """
    if not text.strip():
        raise ValueError("INPUT: found an empty name (a variable of the shell that is not set?), expected a file, a folder or a glob.")
    path = Path(text).expanduser()
    if not path.exists() and not _glob(path):
        raise FileNotFoundError(f"{text}: there is no such file or folder, and nothing matches it.")
    return path


def _glob(path: Path) -> list[str]:
    """Matches of a pattern. Leading folders that exist are themselves, brackets and all: ``trip [2024]/*.jpg``."""
    parts, fixed = path.parts, Path(path.anchor)
    rest = list(parts[1:] if path.anchor else parts)
    while rest and (fixed / rest[0]).is_dir():
        fixed /= rest.pop(0)
    pattern = os.path.join(glob.escape(str(fixed)), *rest) if str(fixed) != "." else os.path.join("", *rest)
    return sorted(glob.glob(pattern, recursive=True))


def _is_video_name(output: Path, found: Sequence[_Source]) -> bool:
    """Whether ``-o`` names a video: of one video, or of pictures as its frames."""
    own = output.suffix.lower()
    if output.is_dir() or not is_video(output):
        return False
    if own not in CONTAINERS:
        raise ValueError(f"-o: found {output.name}, but {own} is not written. Give a name that ends in {', '.join(CONTAINERS)}, or a folder.")
    videos = [source for source in found if is_video(source.path)]
    if videos and len(found) > 1:
        others = f"{len(videos)} videos" if len(videos) == len(found) else "videos and pictures"
        raise ValueError(f"-o: found the file {output} for {others}, expected a folder.")
    if videos and videos[0].path.resolve() == output.resolve():
        raise ValueError(f"{videos[0].path}: the result would replace the video itself. Give another name with -o.")
    return True


def _to_frames(found: Sequence[_Source], output: Path) -> Job:
    """One video's job whose results are pictures, ``frames/%06d.png``."""
    if len(found) != 1 or not is_video(found[0].path):
        raise ValueError(f"-o: found the pattern {output.name}, expected one video as INPUT, whose frames it names.")
    try:
        names = {output.name % 1, output.name % 2}
    except (TypeError, ValueError):
        names = set()
    if len(names) != 2 or output.suffix.lower() not in WRITTEN:
        raise ValueError(f"-o: found {output.name}, expected a pattern for the number of each frame, such as %06d.png.")
    return Job(found[0].path, output, True)


def _natural(path: Path) -> list:
    """Frames in the order in which they are counted: ``2.png`` before ``10.png``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _is_file_name(output: Path, suffix: str | None, found: Sequence[_Source]) -> bool:
    """Whether ``-o`` names a file rather than a folder, by its suffix where there is neither yet."""
    own = output.suffix.lower()
    if output.is_dir() or not own:
        return False
    if any(is_video(source.path) for source in found) and own in WRITTEN:
        raise ValueError(f"-o: found {output.name} for a video, expected a video's name, a folder, or a pattern such as {output.stem}_%06d{own}.")
    if own in WRITTEN:
        if suffix and WRITTEN[suffix] != WRITTEN[own]:
            raise ValueError(f"--format: found {suffix[1:]}, but -o names the file {output.name}. Leave out one or the other.")
        return True
    Image.init()
    if own in readable() | unreadable() or own in Image.registered_extensions():
        raise ValueError(f"-o: found {output.name}, but {own} is not written. Give a name that ends in {', '.join(sorted(FORMATS))}, or a folder.")
    return False


def _target(relative: Path, suffix: str | None, own: set[Path]) -> Path:
    """The result's name: the image's own, with ``.png`` for kinds that are not written; after the old suffix where ``cat.png`` is an image, too."""
    if is_video(relative):
        return relative if relative.suffix.lower() in CONTAINERS else relative.with_suffix(OTHERWISE)
    if suffix:
        return relative.with_suffix(suffix)
    if relative.suffix.lower() in WRITTEN:
        return relative
    renamed = relative.with_suffix(".png")
    return relative.with_name(relative.name + ".png") if renamed in own else renamed


def beside(inputs: Sequence[str], size: str, suffix: str | None) -> Path:
    """Where one image's result goes without ``-o``: beside it, with the result's ``size`` in its name, such as ``x4``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is not one image, but several or a folder.
    """
    path, *_ = [_existing(text) for text in inputs]
    if len(inputs) > 1 or not path.is_file():
        raise ValueError(f"-o: name a folder for the results of {', '.join(inputs)}. Only a single picture's result goes beside it.")
    if is_video(path):
        own = path.suffix if path.suffix.lower() in CONTAINERS else OTHERWISE
        return path.with_name(f"{path.stem}_{size}{own}")
    own = path.suffix if path.suffix.lower() in WRITTEN else ".png"
    return path.with_name(f"{path.stem}_{size}{suffix or own}")
