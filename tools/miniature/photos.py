"""Photos to train on, each with its author and licence in ``photos.json``, out of Debian packages, PyPI packages and two repositories.

They are fetched with apt-get, pip and git, which a machine's own settings point to mirrors, and made smaller: what was compressed with loss is sharp and clean then.
"""

import io
import json
import logging
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fewstep_sr.image.formats import readers
from pipelines.pictures import from_pil

PHOTOS = Path(__file__).with_name("photos.json")
"""A list of ``source``, ``path`` in it (for a Qt resource file, that file, a colon and the path in it), ``author``, ``licence`` and, where known, ``page``."""

REPOSITORIES = {
    "budgie-backgrounds": "https://github.com/BuddiesOfBudgie/budgie-backgrounds",
    "pop-wallpapers": "https://github.com/pop-os/wallpapers",
}
WHEELS = {"scikit-image": "scikit-image==0.26.0", "scikit-learn": "scikit-learn==1.9.1"}

_LARGE = 1400
"""Photos whose shorter side is longer than this have detail of two scales to give."""

_log = logging.getLogger(__name__)


def collect_photos(folder: Path, cache: Path) -> int:
    """Write the listed photos into ``folder``, in a folder for each source, as PNG, and return how many there are.

    ``cache`` keeps what was fetched. A photo that a source no longer has is named and left out.

    Raises:
        RuntimeError: apt-get, dpkg-deb, pip or git is missing, or failed.
    """
    photos = json.loads(PHOTOS.read_text(encoding="utf-8"))
    found = 0
    for source in dict.fromkeys(photo["source"] for photo in photos):
        root = _fetch(source, cache)
        for path in (photo["path"] for photo in photos if photo["source"] == source):
            try:
                image = _open(_read(root, path))
            except (OSError, KeyError, ValueError) as error:
                _log.warning("%s: can't read %s (%s); left out.", source, path, error)
                continue
            found += 1
            for i, version in enumerate(versions(image, lossless=path.endswith(".png"))):
                target = folder / source / f"{Path(path).parent.name}-{Path(path).stem}-{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                version.save(target)
    return found


def versions(image: Image.Image, lossless: bool = False) -> Iterator[Image.Image]:
    """What is trained on of a photo: of large ones the whole with a shorter side of 1080 pixels, and the middle 1024 x 1024 as the camera saw them; others at
    half the size, or two thirds of it below 1000 pixels, or unchanged where they were never compressed with loss.
    """
    short = min(image.size)
    if short > _LARGE:
        yield _reduced(image, short / 1080)
        left, top = ((side - 1024) // 2 for side in image.size)
        yield image.crop((left, top, left + 1024, top + 1024))
    else:
        yield image if lossless else _reduced(image, 2 if short >= 1000 else 1.5)


def read_resources(path: Path) -> dict[str, bytes]:
    """The files in a Qt resource file (rcc's binary format), by their paths; those that are compressed with zstd are left out."""
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise RuntimeError(f"{path}: found a file that begins with {data[:4]!r}, expected a Qt resource file, b'qres'.")
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    node = 22 if version >= 2 else 14
    files = {}

    def walk(number: int, folder: str) -> None:
        name, flags = struct.unpack_from(">IH", data, tree + node * number)
        length = struct.unpack_from(">H", data, names + name)[0]
        here = folder + (data[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be") if number else "")
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", data, tree + node * number + 6)
            for child in range(first, first + count):
                walk(child, here + "/")
        elif not flags & 4:
            start = contents + struct.unpack_from(">I", data, tree + node * number + 10)[0]
            content = data[start + 4 : start + 4 + struct.unpack_from(">I", data, start)[0]]
            files[here] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return files


def _open(data: bytes) -> Image.Image:
    """A photo as all pictures are read here: upright, of known formats alone, in 8 bits."""
    with Image.open(io.BytesIO(data), formats=readers("")) as image:
        values = (from_pil(image).tensor()[0] * 255).round().byte()
    return Image.fromarray(values.movedim(0, -1).contiguous().numpy())


def _reduced(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width / factor), round(image.height / factor)), Image.Resampling.LANCZOS)


def _fetch(source: str, cache: Path) -> Path:
    """The folder of a source's files, fetched where the cache has none."""
    root = cache / source
    if root.exists():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{source}.part"
    shutil.rmtree(part, ignore_errors=True)
    if source in REPOSITORIES:
        _run(["git", "clone", "--quiet", "--depth", "1", REPOSITORIES[source], str(part)], cache)
    elif source in WHEELS:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(part), WHEELS[source]], cache)
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            wheel.extractall(part)
    else:
        part.mkdir()
        _run(["apt-get", "download", source], part)
        _run(["dpkg-deb", "-x", str(next(part.glob("*.deb"))), str(part)], cache)
    part.rename(root)
    return root


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"photos: {command[0]} is missing. Install it, or make the cache's folder for its package by hand.") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"photos: '{' '.join(command)}' failed: {error.stderr.strip()}") from error


_resources: dict[Path, dict[str, bytes]] = {}


def _read(root: Path, path: str) -> bytes:
    file, _, inside = path.partition(":")
    if not inside:
        return (root / file).read_bytes()
    resource = root / "usr/share/gcompris-qt/rcc" / file
    if resource not in _resources:
        _resources[resource] = read_resources(resource)
    return _resources[resource][inside]
