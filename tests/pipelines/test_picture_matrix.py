"""Every mode, format, orientation, profile and kind of transparency against the pixels that it stands for: read, and written again."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_png, write_tiff
from PIL import Image, ImageCms, ImageOps

from pipelines.inputs import to_batch
from pipelines.pictures import UnreadableError, from_pil, read_picture, read_pixels, write_picture
from pipelines.training.data import TrainingPictures

WIDTH, HEIGHT = 9, 6
RGB = np.stack(np.meshgrid(np.arange(WIDTH) * 28, np.arange(HEIGHT) * 50), -1)
RGB = np.concatenate([RGB, 255 - RGB[..., :1]], -1).astype(np.uint8)
GRAY = RGB[..., 0]
ALPHA = np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 5 == 0, 0, 160 + GRAY // 3).astype(np.uint8)
DEEP = RGB.astype(np.uint16) * 257 ^ 0x5A
"""Sixteen bits of which the lower eight are not the upper."""
DEEP_ALPHA = np.where(ALPHA > 0, ALPHA.astype(np.uint16) * 250 + 17, 0).astype(np.uint16)


def image(mode: str) -> Image.Image:
    colours = Image.fromarray(RGB)
    if mode in ("L", "LA", "La"):
        made = Image.fromarray(GRAY)
    elif mode == "1":
        made = Image.fromarray(GRAY).point(lambda v: 255 if v > 100 else 0).convert("1")
    elif mode in ("P", "PA"):
        made = colours.quantize(64)
    else:
        made = colours.convert(mode) if mode not in ("RGBA", "RGBa", "RGBX") else colours
    if mode in ("LA", "RGBA"):
        made.putalpha(Image.fromarray(ALPHA))
    return made


def visible(values: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    return values if alpha is None else values[alpha > 0]


def check(path: Path, values: np.ndarray, alpha: np.ndarray | None = None, tolerance: int = 0) -> None:
    """Whichever way the file is read, it holds these values; and written again it still does."""
    picture = read_picture(path)
    for pixels in (picture.pixels, read_pixels(path), from_pil(Image.open(path))):
        assert pixels.values.dtype == values.dtype and pixels.size == (values.shape[1], values.shape[0])
        assert np.abs(visible(pixels.values, alpha).astype(int) - visible(values, alpha)).max() <= tolerance
        assert (pixels.alpha is None) == (alpha is None) and (alpha is None or np.array_equal(pixels.alpha, alpha))
    batch = to_batch(Image.open(path))
    expected = torch.from_numpy(values / np.iinfo(values.dtype).max).movedim(-1, 0).expand(3, -1, -1).float()
    mask = np.ones(values.shape[:2], bool) if alpha is None else alpha > 0
    assert (batch[0] - expected)[:, torch.from_numpy(mask)].abs().max() <= tolerance / 255 + 1e-6
    sample = TrainingPictures([path], min(batch.shape[-2:]), 4)[0]["hq"]
    assert sample.min() >= batch.min() and sample.max() <= batch.max()
    for suffix in (".png", ".tif"):
        again = path.with_name(f"again{suffix}")
        write_picture(picture.pixels.tensor(), picture, again, 95)
        written = read_pixels(again)
        assert written.values.dtype == values.dtype and np.array_equal(written.values[..., :1], picture.pixels.values[..., :1])
        assert (written.values[..., 1:] == picture.pixels.values[..., 1:]).all()
        assert alpha is None or np.array_equal(written.alpha, alpha)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".bmp", ".gif", ".ppm", ".tga", ".jp2"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bits(tmp_path, mode, suffix):
    made, path = image(mode), tmp_path / f"in{suffix}"
    options = {".webp": {"lossless": True, "exact": True}, ".jp2": {"irreversible": False}}.get(suffix, {})
    try:
        made.save(path, **options)
    except (OSError, KeyError) as error:
        pytest.skip(f"Pillow writes no {suffix} of mode {mode}: {error}")
    with Image.open(path) as stored:
        kept = stored.convert("RGBA").getextrema()[3][0] < 255  # GIF and others have no such alpha
        lossy = suffix == ".gif" and mode not in ("1", "P")
    if lossy or (mode in ("LA", "RGBA") and not kept):
        pytest.skip(f"{suffix} holds no {mode} without loss")
    alpha = ALPHA if mode in ("LA", "RGBA") else None
    gray = mode in ("1", "L", "LA")
    values = np.asarray(made.convert("L" if gray else "RGB"))
    values = values[..., None] if gray else values
    if read_pixels(path).values.shape[-1] > values.shape[-1]:  # formats that store grey as colour
        values = values.repeat(3, -1)
    elif read_pixels(path).values.shape[-1] < values.shape[-1]:
        values = values[..., :1]
    check(path, values, alpha)


@pytest.mark.parametrize("suffix", [".jpg", ".jfif", ".webp", ".avif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy(tmp_path, mode, suffix):
    path = tmp_path / f"in{suffix}"
    try:
        image(mode).resize((90, 60), Image.Resampling.BICUBIC).save(
            path, {".jfif": "JPEG"}.get(suffix), quality=100, **({"subsampling": 0} if suffix[1] == "j" else {})
        )
    except (OSError, KeyError, ValueError) as error:  # an older Pillow does not know the suffix
        pytest.skip(str(error))
    pixels, expected = read_pixels(path), np.asarray(image(mode).resize((90, 60), Image.Resampling.BICUBIC).convert("RGB")).astype(int)
    assert np.abs(pixels.values.astype(int) - expected).mean() < 4


def test_cmyk_and_lab(tmp_path):
    for mode, suffix in (("CMYK", ".tif"), ("CMYK", ".jpg"), ("LAB", ".tif")):
        path = tmp_path / f"{mode}{suffix}"
        source = (
            Image.fromarray(RGB).convert("CMYK")
            if mode == "CMYK"
            else ImageCms.profileToProfile(Image.fromarray(RGB), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
        )
        source.save(path, **({"quality": 100} if suffix == ".jpg" else {}))
        difference = np.abs(read_pixels(path).values.astype(int) - RGB)
        assert difference.mean() < (4 if mode == "CMYK" else 8), (mode, suffix)
        assert read_pixels(path).colors_converted


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png(tmp_path, channels):
    values = DEEP[..., :1] if channels <= 2 else DEEP
    alpha = DEEP_ALPHA if channels in (2, 4) else None
    write_png(tmp_path / "in.png", values if alpha is None else np.concatenate([values, alpha[..., None]], -1))
    if channels == 2:  # in TIFF it comes back as colours: see the writer
        picture = read_picture(tmp_path / "in.png")
        assert np.array_equal(visible(picture.pixels.values, alpha), visible(values, alpha)) and np.array_equal(picture.pixels.alpha, alpha)
        write_picture(picture.pixels.tensor(), picture, tmp_path / "out.tif", 95)
        assert np.array_equal(read_pixels(tmp_path / "out.tif").values, picture.pixels.values.repeat(3, -1))
        write_picture(picture.pixels.tensor(), picture, tmp_path / "out.png", 95)
        assert np.array_equal(read_pixels(tmp_path / "out.png").values, picture.pixels.values)
    else:
        check(tmp_path / "in.png", values, alpha)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_tiff(tmp_path, channels, order):
    values = DEEP[..., :1] if channels == 1 else DEEP
    alpha = DEEP_ALPHA if channels == 4 else None
    write_tiff(tmp_path / "in.tif", values if alpha is None else np.concatenate([values, alpha[..., None]], -1), order)
    check(tmp_path / "in.tif", values, alpha)


def test_sixteen_bit_tiff_with_alpha_multiplied_in(tmp_path):
    weight = DEEP_ALPHA[..., None] / 65535
    write_tiff(tmp_path / "in.tif", np.concatenate([(DEEP * weight).round().astype(np.uint16), DEEP_ALPHA[..., None]], -1), alpha=1)
    pixels = read_pixels(tmp_path / "in.tif")
    assert np.array_equal(pixels.alpha, DEEP_ALPHA)
    assert np.abs(visible(pixels.values, DEEP_ALPHA).astype(int) - visible(DEEP, DEEP_ALPHA)).max() <= 2


def test_white_is_zero(tmp_path):
    """TIFF's greys that count from white: Pillow turns those of 8 bits around, and no others."""
    write_tiff(tmp_path / "8.tif", 255 - GRAY[..., None], white_is_zero=True)
    write_tiff(tmp_path / "16.tif", 65535 - DEEP[..., :1], white_is_zero=True)
    check(tmp_path / "8.tif", GRAY[..., None])
    check(tmp_path / "16.tif", DEEP[..., :1])


def test_twelve_bit_tiff(tmp_path):
    write_tiff(tmp_path / "in.tif", DEEP[..., :1] >> 4, bits=12)
    check(tmp_path / "in.tif", ((DEEP[..., :1] >> 4) * (65535 / 4095)).round().astype(np.uint16))


def test_jpeg_2000_of_more_than_8_bits(tmp_path):
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "grey.jp2", irreversible=False)
    check(tmp_path / "grey.jp2", DEEP[..., :1])
    for mode in ("LA", "RGB", "RGBA"):
        image(mode).save(tmp_path / "in.jp2", irreversible=False)
        data = bytearray((tmp_path / "in.jp2").read_bytes())
        data[data.index(b"\xff\x4f\xff\x51") + 42] = 11  # the first channel's bits, less one
        (tmp_path / "in.jp2").write_bytes(data)
        with pytest.raises(UnreadableError, match="it has 12 bits a channel, of which Pillow makes black where it is white"):
            read_picture(tmp_path / "in.jp2")
        with pytest.raises(ValueError, match="image: it has 12 bits a channel"):
            to_batch(Image.open(tmp_path / "in.jp2"))


def test_an_opened_image_is_itself(tmp_path):
    """Its 16 bits are read from the file that was opened, whatever has the name by now."""
    write_png(tmp_path / "in.png", DEEP)
    in_memory = Image.open(BytesIO((tmp_path / "in.png").read_bytes()))
    opened, closed = Image.open(tmp_path / "in.png"), Image.open(tmp_path / "in.png")
    closed.close()
    (tmp_path / "in.png").rename(tmp_path / "other.png")
    write_png(tmp_path / "in.png", 65535 - DEEP)
    for made in (in_memory, opened, opened):
        assert np.array_equal(from_pil(made).values, DEEP)
    assert opened.load()[2, 1] == tuple(DEEP[1, 2] >> 8)
    with pytest.raises(ValueError, match="it was closed before its pixels were read"):
        from_pil(closed)


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_pillow_takes_for_other_numbers_is_refused(tmp_path, order):
    write_tiff(tmp_path / "in.tif", RGB, order, planar=True)  # planes of 8 bits are read
    check(tmp_path / "in.tif", RGB)
    signed = (DEEP[..., :1] >> 1).astype(np.int16)
    for values, planar, words in (
        (DEEP, True, "16 bits a channel, each channel in a plane"),
        (signed, False, "signed numbers of 16 bits"),
        ((signed >> 8).astype(np.int8), False, "signed numbers of 8 bits"),
    ):
        write_tiff(tmp_path / "in.tif", values, order, planar=planar)
        with pytest.raises(UnreadableError, match=words):
            read_picture(tmp_path / "in.tif")
        with pytest.raises(ValueError, match=f"image: it has {words}"):
            to_batch(Image.open(tmp_path / "in.tif"))


def test_floats(tmp_path):
    ramp = np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
    Image.fromarray(ramp).save(tmp_path / "in.tif")
    check(tmp_path / "in.tif", (ramp.astype(np.float64) * 65535).round().astype(np.uint16)[..., None])
    for values, words in ((ramp * 255, "from 0 to 255, expected \\[0, 1\\]"), (ramp - 0.5, "from -0.5 to 0.5"), (ramp * np.nan, "from nan to nan")):
        Image.fromarray(values).save(tmp_path / "bad.tif")
        with pytest.raises(UnreadableError, match=f"floating-point pixels {words}"):
            read_picture(tmp_path / "bad.tif")
        with pytest.raises(ValueError, match=f"image: it has floating-point pixels {words}"):
            to_batch(Image.fromarray(values))


def test_integers():
    deep = Image.fromarray(DEEP[..., 0].astype(np.int32))
    assert deep.mode == "I" and np.array_equal(from_pil(deep).values[..., 0], DEEP[..., 0])
    for values, words in (
        (GRAY.astype(np.int32), "of 8 or of 16 bits"),
        (DEEP[..., 0].astype(np.int32) * 2, "from 180 to"),
        (-DEEP[..., 0].astype(np.int32), "without sign"),
    ):
        with pytest.raises(ValueError, match=words):
            from_pil(Image.fromarray(values))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey(tmp_path, bits):
    most = 2**bits - 1
    stored = (np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 7919 % (most + 1)).astype(np.uint16)
    write_png(tmp_path / "in.png", stored[..., None] if bits > 8 else stored.astype(np.uint8)[..., None], bits, key=(int(stored[2, 3]),))
    full = np.uint16(65535) if bits == 16 else np.uint8(255)
    values = (stored.astype(int) * int(full) // most).astype(full.dtype)
    alpha = np.where(stored == stored[2, 3], 0, full).astype(full.dtype)
    for pixels in (read_pixels(tmp_path / "in.png"), from_pil(Image.open(tmp_path / "in.png"))):
        assert np.array_equal(pixels.alpha, alpha) and np.array_equal(visible(pixels.values[..., 0], alpha), visible(values, alpha))


@pytest.mark.parametrize("bits", [8, 16])
def test_one_transparent_colour(tmp_path, bits):
    values = DEEP if bits == 16 else RGB
    write_png(tmp_path / "in.png", values, bits, key=tuple(int(v) for v in values[2, 3]))
    full = 65535 if bits == 16 else 255
    alpha = np.where((values == values[2, 3]).all(-1), 0, full).astype(values.dtype)
    assert (alpha == 0).sum() == 1
    for pixels in (read_pixels(tmp_path / "in.png"), from_pil(Image.open(tmp_path / "in.png"))):
        assert np.array_equal(pixels.alpha, alpha) and np.array_equal(visible(pixels.values, alpha), visible(values, alpha))
    loaded = Image.open(tmp_path / "in.png")
    loaded.load()
    assert from_pil(loaded).alpha[2, 3] == 0


@pytest.mark.parametrize("table", [bytes([0, 128]), bytes([255] * 10 + [0])])
def test_palette_with_alpha(tmp_path, table):
    made = image("P")
    made.save(tmp_path / "in.png", transparency=table)
    expected = np.frombuffer(table.ljust(256, b"\xff"), np.uint8)[np.asarray(made)]
    pixels = read_pixels(tmp_path / "in.png")
    assert np.array_equal(pixels.alpha, expected)
    assert np.array_equal(visible(pixels.values, expected), visible(np.asarray(made.convert("RGB")), expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "deep.png", "deep.tif", "grey16.png", "clear.png"])
def test_orientations(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"in.{kind}"
    if kind == "deep.png":
        from image_files import chunk

        write_png(path, DEEP, after=chunk(b"eXIf", exif.tobytes()[6:]))  # behind the pixels, as the specification lets it
    elif kind == "deep.tif":
        write_tiff(path, DEEP, orientation=orientation)
    else:
        made = Image.fromarray(DEEP[..., 0]) if kind == "grey16.png" else image("RGBA" if kind == "clear.png" else "RGB")
        made.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {"quality": 100, "subsampling": 0} if kind == "jpg" else {}))
    stored = DEEP if kind.startswith("deep") else DEEP[..., :1] if kind == "grey16.png" else RGB
    turn = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH))
    turned = turn.copy()
    turned.getexif()[0x0112] = orientation
    places = np.asarray(ImageOps.exif_transpose(turned))
    expected = stored.reshape(-1, stored.shape[-1])[places]
    alpha = ALPHA.ravel()[places] if kind == "clear.png" else None
    check(path, expected, alpha, tolerance=6 if kind == "jpg" else 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profiles(tmp_path, suffix):
    """The colours stay in the file's own profile, which the result gets; one of another kind of colours is left out and named."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray_profile = profile[:16] + b"GRAY" + profile[20:]
    image("RGB").save(tmp_path / f"in{suffix}", icc_profile=profile)
    picture = read_picture(tmp_path / f"in{suffix}")
    assert write_picture(picture.pixels.tensor(), picture, tmp_path / f"out{suffix}", 95) == []
    assert Image.open(tmp_path / f"out{suffix}").info["icc_profile"] == profile
    image("L").save(tmp_path / f"grey{suffix}", icc_profile=gray_profile)
    picture = read_picture(tmp_path / f"grey{suffix}")
    notes = write_picture(picture.pixels.tensor(), picture, tmp_path / f"grey_out{suffix}", 95)
    kept = Image.open(tmp_path / f"grey_out{suffix}").info.get("icc_profile")
    assert (kept, notes) == ((None, ["its colour profile is of GRAY colours and is left out"]) if suffix == ".webp" else (gray_profile, []))


@pytest.mark.parametrize("hidden", [(0, 0, 0), (0, 255, 0)])
def test_what_is_hidden_is_not_seen(tmp_path, hidden):
    colour = np.uint8([220, 60, 40])
    alpha = np.asarray(Image.radial_gradient("L").resize((40, 40))).astype(int)
    alpha = (255 - alpha * 2).clip(0, 255).astype(np.uint8)
    rgb = np.where(alpha[..., None] > 0, colour, np.uint8(hidden))
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "in.png")
    assert (alpha == 0).any() and np.abs(read_pixels(tmp_path / "in.png").values.astype(int) - colour).max() <= 1
    batch = to_batch(Image.open(tmp_path / "in.png"))
    assert (batch[0].movedim(0, -1) - torch.from_numpy(colour / 255).float()).abs().max() < 0.01


def test_grey_stored_as_colour_is_known(tmp_path):
    gray = Image.fromarray(GRAY)
    gray.convert("RGB").save(tmp_path / "rgb.png")
    gray.quantize(64).save(tmp_path / "palette.png")
    gray.save(tmp_path / "grey.jpg")
    cut_out = np.dstack([np.where(ALPHA[..., None] > 0, GRAY[..., None], np.uint8([9, 200, 30])), ALPHA])
    Image.fromarray(cut_out).save(tmp_path / "cut.png")  # with colours where nobody sees them
    for name in ("rgb.png", "palette.png", "grey.jpg", "cut.png"):
        picture = read_picture(tmp_path / name)
        assert picture.pixels.is_gray, name
        tinted = picture.pixels.tensor() * torch.tensor([1.0, 0.9, 0.8]).view(3, 1, 1)
        write_picture(tinted, picture, tmp_path / "out.png", 95)
        written = Image.open(tmp_path / "out.png")
        assert written.mode == {"rgb.png": "RGB", "palette.png": "RGB", "grey.jpg": "L", "cut.png": "RGBA"}[name]
        values = np.asarray(written.convert("RGB")).astype(int)
        assert (values.max(-1) - values.min(-1)).max() == 0
    assert not read_picture_of(tmp_path, RGB).pixels.is_gray


def read_picture_of(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "colours.png")
    return read_picture(tmp_path / "colours.png")


def test_the_users_own_image_is_left_alone(tmp_path):
    write_png(tmp_path / "in.png", np.concatenate([DEEP[..., :1], DEEP_ALPHA[..., None]], -1))
    opened = Image.open(tmp_path / "in.png")
    from_pil(opened)
    assert opened.mode == "RGBA" and np.array_equal(np.asarray(opened)[..., 0], DEEP[..., 0] >> 8)
