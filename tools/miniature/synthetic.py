"""Pictures that belong to nobody: dead leaves, textures, strokes, shapes and text.

Dead leaves (Lee, Mumford and Huang, IJCV 2001) are shapes that cover each other, with radii of density r^-3; they have the edges and the
scale invariance of photos. Here the leaves carry textures and shading, and hair, text and lines lie over some of them.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?&%-+"


def draw_picture(size: int, seed: int) -> Image.Image:
    """An RGB picture of ``size`` x ``size`` pixels, the same for the same seed. It is drawn at twice the size, for smooth edges."""
    rng = np.random.default_rng(seed)
    side = 2 * size
    palette = _palette(rng)
    picture = _surface(rng, palette, side, side)
    largest = side * rng.uniform(0.1, 0.5)
    smallest = rng.uniform(side / 256, side / 64)
    for _ in range(int(rng.integers(20, 300))):
        _leaf(picture, rng, palette, _radius(rng, smallest, largest))
    for draw, chance in ((_hair, 0.5), (_lines, 0.3), (_text, 0.3)):
        if rng.random() < chance:
            draw(picture, rng, palette)
    if rng.random() < 0.4:  # what is out of focus
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4)))
        for _ in range(int(rng.integers(3, 40))):
            _leaf(picture, rng, palette, _radius(rng, smallest, largest / 2))
    light = _noise(rng, side, side, exponent=2.5)[..., None] * rng.uniform(0, 0.25) + 1
    lit = np.asarray(picture, np.float32) * light
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)


def write_pictures(folder: Path, count: int, size: int, seed: int) -> None:
    """Draw ``count`` pictures into ``folder`` as PNG, picture i with the seed ``seed + i``. Those that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{seed + i:06d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            draw_picture(size, seed + i).save(part, format="PNG")
            part.rename(path)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """A few related colours (n, 3): steps along a line through colour space, as a scene's are, with some strays."""
    start, way = rng.uniform(0, 255, 3), rng.normal(0, 60, 3)
    steps = rng.uniform(-1.5, 1.5, (12, 1))
    colors = start + steps * way + rng.normal(0, 25, (12, 1)) + rng.normal(0, rng.uniform(2, 30), (12, 3))
    colors[rng.random(12) < 0.15] = rng.uniform(0, 255, 3)
    gray = colors.mean(1, keepdims=True)
    return (gray + rng.beta(2, 3) * (colors - gray)).clip(0, 255)  # photos are seldom as colourful as random colours


def _color(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    return (palette[rng.integers(len(palette))] + rng.normal(0, 8, 3)).clip(0, 255)


def _radius(rng: np.random.Generator, smallest: float, largest: float) -> float:
    """A draw from the density r^-3 between the two."""
    return 1 / math.sqrt(rng.uniform(1 / largest**2, 1 / smallest**2))


def _noise(rng: np.random.Generator, height: int, width: int, exponent: float) -> np.ndarray:
    """Noise with the power spectrum 1 / f^(2 exponent), mean 0, deviation 1."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns * rng.uniform(0.5, 2))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**exponent
    noise = np.fft.irfft2(spectrum, s=(height, width))
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def _surface(rng: np.random.Generator, palette: np.ndarray, height: int, width: int) -> Image.Image:
    """A plain, shaded, striped, checked, marbled or grainy surface."""
    first, second = _color(rng, palette), _color(rng, palette)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.random()
    if kind < 0.3:
        mix = (along - along.min()) / (np.ptp(along) + 1) * rng.uniform(0, 0.6)
    elif kind < 0.5:
        mix = 0.5 + rng.uniform(0.05, 0.3) * _noise(rng, height, width, rng.uniform(0.5, 1.8))
    elif kind < 0.65:
        mix = 0.5 + rng.uniform(0.03, 0.15) * _noise(rng, height, width, rng.uniform(0.0, 0.6))
    else:
        period = rng.uniform(6, 48)
        wave = along + rng.uniform(0, 0.5) * period * _noise(rng, height, width, 2.0)
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * wave / period)
        if kind > 0.8:
            across = y * math.cos(angle) - x * math.sin(angle)
            mix = mix * (0.5 + 0.5 * np.sin(2 * math.pi * across / period / rng.uniform(0.5, 2)))
        if rng.random() < 0.5:
            mix = (mix > 0.5).astype(np.float32)
        mix *= rng.uniform(0.2, 1)
    colors = first + mix[..., None].clip(-0.5, 1.5) * (second - first)
    return Image.fromarray(colors.clip(0, 255).astype(np.uint8))


def _leaf(picture: Image.Image, rng: np.random.Generator, palette: np.ndarray, radius: float) -> None:
    """Lay a round, many-sided or branching shape with its own surface onto the picture."""
    corners = int(rng.choice([3, 4, 5, 6, 8, 40]))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners)) if corners < 40 else np.linspace(0, 2 * math.pi, corners, endpoint=False)
    wobble = 1 + (rng.uniform(0, 0.4) * np.sin(angles * rng.integers(1, 6) + rng.uniform(0, 6)) if corners == 40 else 0)
    stretch, turn = rng.uniform(0.3, 1), rng.uniform(0, math.pi)
    x, y = radius * wobble * np.cos(angles), radius * wobble * np.sin(angles) * stretch
    outline = np.stack([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)], 1)
    side = math.ceil(2 * np.abs(outline).max()) + 2
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in outline + side / 2], fill=255)
    left, top = (int(v) for v in rng.uniform(-side / 2, np.array(picture.size) - side / 2))
    if rng.random() < 0.3:  # a shadow
        shadow = mask.filter(ImageFilter.GaussianBlur(max(1, radius / 8))).point(lambda v: v * 0.5)
        picture.paste((0, 0, 0), (left + round(radius / 8), top + round(radius / 8)), shadow)
    picture.paste(_surface(rng, palette, side, side), (left, top), mask)


def _hair(picture: Image.Image, rng: np.random.Generator, palette: np.ndarray) -> None:
    """Many strokes that follow one flow, over a part of the picture: fur, grass, hair, brushwork."""
    side = picture.size[0]
    flow = math.pi * _noise(rng, side // 8, side // 8, 2.0) * rng.uniform(0.1, 0.6) + rng.uniform(0, 2 * math.pi)
    draw = ImageDraw.Draw(picture)
    center, spread = rng.uniform(0, side, 2), side * rng.uniform(0.1, 0.4)
    length, width = int(rng.integers(3, 12)), int(rng.integers(1, 5))
    base, other = _color(rng, palette), _color(rng, palette)
    for point in rng.normal(center, spread, (int(rng.integers(300, 3000)), 2)):
        color = base + rng.uniform(0, 1) * (other - base) + rng.normal(0, 15)
        stroke = [tuple(point)]
        for _ in range(length):
            column, row = (int(v) for v in (point / 8).clip(0, side // 8 - 1))
            point = point + 6 * np.array([math.cos(flow[row, column]), math.sin(flow[row, column])])
            stroke.append(tuple(point))
        draw.line(stroke, fill=tuple(int(v) for v in color.clip(0, 255)), width=width)


def _lines(picture: Image.Image, rng: np.random.Generator, palette: np.ndarray) -> None:
    """Wires, window bars, arcs."""
    draw, side = ImageDraw.Draw(picture), picture.size[0]
    for _ in range(int(rng.integers(1, 20))):
        color, width = tuple(int(v) for v in _color(rng, palette)), int(rng.integers(1, 10))
        start, end = rng.uniform(0, side, 2), rng.uniform(0, side, 2)
        if rng.random() < 0.3:
            draw.arc([*np.minimum(start, end), *np.maximum(start, end)], *rng.uniform(0, 360, 2), fill=color, width=width)
        else:
            draw.line([tuple(start), tuple(end)], fill=color, width=width)


def _text(picture: Image.Image, rng: np.random.Generator, palette: np.ndarray) -> None:
    draw, side = ImageDraw.Draw(picture), picture.size[0]
    for _ in range(int(rng.integers(1, 12))):
        words = "".join(rng.choice(list(_LETTERS), int(rng.integers(3, 24))))
        font = ImageFont.load_default(size=float(rng.uniform(16, 120)))
        draw.text(tuple(rng.uniform(-0.1, 0.9, 2) * side), words, fill=tuple(int(v) for v in _color(rng, palette)), font=font)
