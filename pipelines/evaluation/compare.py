"""``compare``: the same crops by several methods or settings on one sheet, HTML with a zoom or a PNG."""

import html
import json
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fewstep_sr.files import require_room, written_whole
from fewstep_sr.image import quality
from fewstep_sr.weights.strict import printable

from ..pictures import UnreadableError, read_pixels
from .evaluate import REPORT
from .journal import known, read_report
from .machine import sha256
from .metrics import METRICS
from .pairs import base_name, find_folders, images_in, listed, require_single
from .report import write_text
from .sheet import draw_sheet

TEMPLATE = Path(__file__).with_name("sheet.html")
SHOWN = 6
"""Pictures where none are named."""

MOST_PIXELS = 1 << 28
"""Of all crops of a sheet together: 800 MB, which a browser still opens."""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` was asked for.

    Args:
        folders: results, each ``FOLDER`` or ``LABEL=FOLDER``.
        output: ends in .html or .png.
        pictures: names, with or without the benchmarks' marks; none for some, evenly spread.
        at: left and top of the crop in pixels of the results; None for where the original has the most detail.
        size: of the crop's sides; 0 for whole images.
    """

    folders: Sequence[str]
    output: Path
    data: Path | None = None
    lq: Path | None = None
    hq: Path | None = None
    pictures: Sequence[str] = ()
    at: tuple[int, int] | None = None
    size: int = 256


@dataclass(frozen=True)
class Column:
    """A folder of results: its label, its images by base name, and what evaluate measured of them, by name."""

    label: str
    images: dict[str, Path]
    measured: dict[str, dict] = field(default_factory=dict)
    enlarged: bool = False


@dataclass(frozen=True)
class Tile:
    """A crop and what stands below it."""

    label: str
    image: Image.Image
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def lines(self) -> list[str]:
        named = [f"{name.upper()} {value:.{2 if name == 'psnr' else 4}f}" for name, value in self.figures.items()]
        return [*named, *([f"{self.seconds:.2f} s"] if self.seconds is not None else [])]


@dataclass(frozen=True)
class Line:
    """A picture by every method."""

    name: str
    tiles: list[Tile]


def compare(wanted: Comparison) -> int:
    """Write the sheet. Returns 1 where pictures had to be left out, else 0.

    Raises:
        FileNotFoundError, ValueError: there is nothing to compare, or the sheet has no name that it could have.
    """
    if wanted.output.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"-o: found {wanted.output.name}, expected a name that ends in .html or .png.")
    require_room(wanted.output)
    lq, hq = find_folders(wanted.data, wanted.lq, wanted.hq) if wanted.data or wanted.lq or wanted.hq else (None, None)
    columns = [_column(text) for text in wanted.folders]
    _require_labels(columns)
    if lq:
        columns.insert(0, Column("low quality, bicubic", _by_base(lq, "--lq"), enlarged=True))
    originals = _by_base(hq, "--hq") if hq else {}
    names = _names(wanted, columns, originals)
    lines, failed = [], {}
    for name in names:
        try:
            lines.append(_line(name, columns, originals, wanted))
        except (OSError, ValueError) as error:
            failed[name] = str(error)
            print(f"{printable(name)} is left out: {error}", file=sys.stderr)
        pixels = sum(tile.image.width * tile.image.height for line in lines for tile in line.tiles)
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"--size: found crops of more than {MOST_PIXELS >> 20} megapixels after {len(lines)} of {len(names)} pictures, expected less on one sheet. "
                "Give a smaller --size, or fewer --pictures."
            )
    if not lines:
        raise ValueError(f"no picture could be put on the sheet: {next(iter(failed.values()))}")
    title = "Comparison: " + ", ".join(tile.label for tile in lines[0].tiles)
    if wanted.output.suffix.lower() == ".png":
        wanted.output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(wanted.output) as partial:
            draw_sheet(title, [(line.name, [(tile.label, tile.lines, tile.image) for tile in line.tiles]) for line in lines]).save(partial, "PNG")
    else:
        write_text(wanted.output, _html(title, lines))
    many, versions = len(lines), len(lines[0].tiles)
    print(f"{wanted.output}: {many} {'image' if many == 1 else 'images'} in {versions} {'version' if versions == 1 else 'versions'}")
    return 1 if failed else 0


def _column(text: str) -> Column:
    label, _, path = text.rpartition("=")
    folder = Path(path).expanduser()
    if not folder.is_dir() and Path(text).expanduser().is_dir():  # a folder whose name has the sign in it
        label, folder = "", Path(text).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"FOLDER: {folder} is a file, expected a folder of results. Images of the same name in each folder are compared.")
    if not folder.is_dir():
        raise FileNotFoundError(f"FOLDER: there is no folder {folder}. Give one of results, or LABEL=FOLDER.")
    measured = {}
    if (folder / REPORT).is_file():
        try:
            report = read_report(folder / REPORT)
            measured = {row["name"]: {**row, "metrics": list(report["metrics"])} for row in report["pictures"]}
        except (FileExistsError, KeyError, TypeError):
            print(f"{folder / REPORT} is no report of evaluate and is passed over.", file=sys.stderr)
    return Column(label.strip() or folder.resolve().name, _by_base(folder, "FOLDER"), measured)


def _require_labels(columns: Sequence[Column]) -> None:
    labels = [column.label for column in columns]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"FOLDER: found the label {double} twice. Name them apart, such as {double}-2=FOLDER.")


def _by_base(folder: Path, what: str) -> dict[str, Path]:
    images = images_in(folder, what)
    require_single(images, lambda path: base_name(path.stem))
    return {base_name(path.stem): path for path in images}


def _names(wanted: Comparison, columns: Sequence[Column], originals: dict[str, Path]) -> list[str]:
    sides = [column.images for column in columns] + ([originals] if originals else [])
    common = [name for name in sides[0] if all(name in side for side in sides)]
    if not common:
        raise ValueError(
            f"no picture is in every folder: found {', '.join(listed(side.values(), 2) for side in sides)}. Give results of the same pictures."
        )
    if some := sorted({name for side in sides for name in side} - set(common)):
        verb = "is not in every folder and is" if len(some) == 1 else "are not in every folder and are"
        print(f"{len(some)} {verb} left out: {listed(map(Path, some))}. (Subfolders are not looked into.)", file=sys.stderr)
    if wanted.pictures:
        names = [base_name(Path(name).stem) if Path(name).suffix else base_name(name) for name in wanted.pictures]
        if missing := [name for name in names if name not in common]:
            raise ValueError(f"--pictures: found {missing[0]}, expected names that are in every folder, such as {', '.join(common[:5])}.")
        return names
    step = max(1, len(common) // SHOWN)
    return common[::step][:SHOWN]


def _line(name: str, columns: Sequence[Column], originals: dict[str, Path], wanted: Comparison) -> Line:
    results = [column for column in columns if not column.enlarged]
    pixels = {column.label: _read(column.images[name]) for column in columns}
    original = _read(originals[name]) if originals else None
    height, width = (original if original is not None else pixels[results[0].label]).shape[-2:]
    for column in columns:
        if column.enlarged:
            image = F.interpolate(pixels[column.label], size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
            pixels[column.label] = image
        elif pixels[column.label].shape[-2:] != (height, width):
            found = pixels[column.label].shape
            raise ValueError(
                f"{printable(str(column.images[name]))}: found {found[-1]} x {found[-2]} pixels, expected {width} x {height}, as the others of this picture have."
            )
    box = _box(original if original is not None else pixels[results[0].label], wanted)
    tiles = [_tile(column, name, pixels[column.label], original, box) for column in columns]
    if original is not None:
        tiles.append(Tile("original", _crop(original, box)))
    return Line(name, tiles)


def _read(path: Path) -> torch.Tensor:
    try:
        return read_pixels(path).tensor()
    except UnreadableError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from error


def _tile(column: Column, name: str, image: torch.Tensor, original: torch.Tensor | None, box: tuple[int, int, int, int]) -> Tile:
    path, figures, seconds = column.images[name], {}, None
    row = column.measured.get(path.stem)
    if row and not column.enlarged and row.get("files", {}).get("image") == sha256(path):
        figures, seconds = {metric: row[metric] for metric in row["metrics"] if metric in row}, row.get("seconds")
    if original is not None and not figures.keys() >= quality.METRICS.keys():
        figures = {metric: value.item() for metric, value in quality.compare(image, original).items()} | figures
    return Tile(column.label, _crop(image, box), known(METRICS, figures), seconds)


def _box(image: torch.Tensor, wanted: Comparison) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the crop."""
    height, width = image.shape[-2:]
    across, down = (min(wanted.size or side, side) for side in (width, height))
    if wanted.at is not None:
        left, top = wanted.at
        if not (0 <= left <= width - across and 0 <= top <= height - down):
            raise ValueError(
                f"--at: found {left} {top}, expected 0 to {width - across} and 0 to {height - down} for {across} x {down} of {width} x {height}."
            )
    else:
        left, top = _most_detailed(image, across, down)
    return left, top, left + across, top + down


def _most_detailed(image: torch.Tensor, across: int, down: int) -> tuple[int, int]:
    """Left and top of the window in which neighbouring pixels differ the most."""
    gray = image.mean(1, keepdim=True)
    detail = torch.zeros_like(gray)
    detail[..., 1:] += (gray[..., 1:] - gray[..., :-1]).abs()
    detail[..., 1:, :] += (gray[..., 1:, :] - gray[..., :-1, :]).abs()
    sums = F.pad(detail.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0))[0, 0]
    windows = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    place = int(windows.argmax())
    return place % windows.shape[1], place // windows.shape[1]


def _crop(image: torch.Tensor, box: tuple[int, int, int, int]) -> Image.Image:
    left, top, right, bottom = box
    values = (image[0, :, top:bottom, left:right].clamp(0, 1) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))


def means(lines: Sequence[Line]) -> list[list[str]]:
    """A table of the means over the sheet's pictures."""
    labels = [tile.label for tile in lines[0].tiles]
    columns = [[line.tiles[i] for line in lines] for i in range(len(labels))]
    names = [name for name in METRICS if any(name in tile.figures for tiles in columns for tile in tiles)]
    head = ["mean of these", *names, "seconds"]
    rows = []
    for label, tiles in zip(labels, columns, strict=True):
        values = [[tile.figures[name] for tile in tiles if name in tile.figures] for name in names]
        seconds = [tile.seconds for tile in tiles if tile.seconds is not None]
        rows.append([label, *(f"{fmean(v):.4f}" if len(v) == len(tiles) else "-" for v in values), f"{fmean(seconds):.2f}" if seconds else "-"])
    return [head, *rows]


def _html(title: str, lines: Sequence[Line]) -> str:
    rows = [
        {
            "name": line.name,
            "width": line.tiles[0].image.width,
            "height": line.tiles[0].image.height,
            "tiles": [{"label": tile.label, "lines": tile.lines, "src": _data_url(tile.image)} for tile in line.tiles],
        }
        for line in lines
    ]
    notes = "Figures are of whole images, the crops are as they are: no resampling, lossless."
    data = json.dumps({"title": title, "notes": notes, "means": means(lines), "rows": rows}, ensure_ascii=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data)  # first, since a title may have the mark in it
    return page.replace("<title>Comparison</title>", f"<title>{html.escape(title)}</title>")


def _data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
