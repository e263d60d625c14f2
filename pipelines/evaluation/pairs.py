"""Which image belongs to which original, by their names."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep_sr.image.formats import readable, unreadable
from fewstep_sr.weights.strict import printable

from ..pictures import find_in_folder

LOW_QUALITY, ORIGINALS = ("test_LR", "LR", "lq"), ("test_HR", "HR", "hq", "gt")
"""Names of a benchmark's two folders; the first are the published ones."""

_MARK = re.compile(r"(?:[_.-](?:LR|LQ|HR|HQ|GT|SR)(?:x?\d)?|(?:[_.-]|(?<=\d))x\d)+$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """An image, low-quality or restored, and its original, if there is one. ``name`` is the image's, without suffix."""

    name: str
    image: Path
    original: Path | None


def base_name(name: str) -> str:
    """A name without what benchmarks mark low-quality images, originals and enlargements with: ``Canon_001_LR4`` and ``Canon_001_HR`` are ``Canon_001``."""
    return _MARK.sub("", name) or name


def find_folders(data: Path | None, lq: Path | None, hq: Path | None) -> tuple[Path | None, Path | None]:
    """The folders of low-quality images and of originals. A folder ``data`` without such subfolders is one of low-quality images alone.

    Raises:
        FileNotFoundError: a folder that was named is not there.
        ValueError: none was named.
    """
    for name, folder in (("--data", data), ("--lq", lq), ("--hq", hq)):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(
                f"{name}: there is no folder {folder}. Give one of images, or a benchmark's with {LOW_QUALITY[0]} and {ORIGINALS[0]}."
            )
    if data is None:
        if lq is None and hq is None:
            raise ValueError(f"--data: found none, expected a folder with {LOW_QUALITY[0]} and {ORIGINALS[0]}, or --lq and --hq.")
        return lq, hq
    found_lq, found_hq = (next((data / name for name in names if (data / name).is_dir()), None) for names in (LOW_QUALITY, ORIGINALS))
    if not (found_lq or found_hq or lq or hq):
        return data, None
    return lq or found_lq, hq or found_hq


def images_in(folder: Path, what: str) -> list[Path]:
    """The images directly in a folder, sorted; also those of kinds that are not read, which then fail in words.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path for path in find_in_folder(folder, readable() | unreadable()) if path.parent == folder]
    if not found:
        raise FileNotFoundError(f"{what}: there are no images in {folder}; expected {', '.join(sorted(readable()))}.")
    return found


def pair(images: Sequence[Path], originals: Sequence[Path] | None) -> tuple[list[Pair], list[Path]]:
    """Pairs in the images' order, and the images and originals that have no other half.

    Equal names belong together first; what is left goes by :func:`base_name`. Without originals every image is a pair of its own.

    Raises:
        ValueError: there is no pair at all, or two images could be one's other half.
    """
    require_single(images, lambda path: path.stem)
    if originals is None:
        return [Pair(path.stem, path, None) for path in images], []
    require_single(originals, lambda path: path.stem)
    exact = {path.stem: path for path in originals}
    found = {path: exact[path.stem] for path in images if path.stem in exact}
    rest = [path for path in images if path not in found]
    taken = set(found.values())
    free = [path for path in originals if path not in taken]
    require_single(rest, lambda path: base_name(path.stem))
    require_single(free, lambda path: base_name(path.stem))
    by_base = {base_name(path.stem): path for path in free}
    found |= {path: by_base[base_name(path.stem)] for path in rest if base_name(path.stem) in by_base}
    unpaired = [path for path in images if path not in found] + [path for path in originals if path not in set(found.values())]
    if not found:
        raise ValueError(
            f"no image has its original: found {listed(images)} in {images[0].parent} and {listed(originals)} in {originals[0].parent}, "
            "expected equal names, or such as x_LR4.png and x_HR.png. Rename one side."
        )
    return [Pair(path.stem, path, found[path]) for path in images if path in found], unpaired


def require_single(paths: Sequence[Path], key: Callable[[Path], str]) -> None:
    """Refuse two images that go by one name.

    Raises:
        ValueError: there are two.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        if (other := seen.setdefault(key(path), path)) is not path:
            raise ValueError(f"{path.parent}: found {other.name} and {path.name}, which could both be {key(path)}. Move one of them away.")


def listed(paths: Iterable[Path], most: int = 5) -> str:
    """Names for a message, of bounded length."""
    names = [printable(path.name) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
