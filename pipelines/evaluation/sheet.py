"""A contact sheet as one image."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fewstep_sr.weights.strict import printable

_GAP, _TEXT, _LINE = 12, 15, 19
_PAPER, _INK, _PALE = (255, 255, 255), (20, 20, 20), (110, 110, 110)

Tile = tuple[str, list[str], Image.Image]
"""A label, lines below it, and the crop."""


def draw_sheet(title: str, rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """Rows of tiles, each with its label and lines below, under a title and the rows' names. Crops are not resampled."""
    font = ImageFont.load_default(_TEXT)
    width = max(tile[2].width for _, tiles in rows for tile in tiles)
    width = max(width, 170)
    columns = max(len(tiles) for _, tiles in rows)
    heights = [_LINE + max(image.height + _LINE * (1 + len(lines)) for _, lines, image in tiles) + 2 * _GAP for _, tiles in rows]
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), 2 * _GAP + _LINE + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _fitting(title, font, sheet.width - 2 * _GAP), _INK, font)
    top = 2 * _GAP + _LINE
    for (name, tiles), height in zip(rows, heights, strict=True):
        draw.text((_GAP, top), _fitting(name, font, sheet.width - 2 * _GAP), _PALE, font)
        for i, (label, lines, image) in enumerate(tiles):
            left = _GAP + i * (width + _GAP)
            sheet.paste(image, (left, top + _LINE))
            for j, text in enumerate([label, *lines]):
                draw.text((left, top + _LINE + image.height + 2 + j * _LINE), _fitting(text, font, width), _INK if j == 0 else _PALE, font)
        top += height
    return sheet


def _fitting(text: str, font, width: int) -> str:
    """The text in one line, cut to what the width holds."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
