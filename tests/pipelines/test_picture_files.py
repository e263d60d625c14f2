"""Image files as people have them: broken and oversized descriptions, large scans, wrong names; and how results are written."""

import errno
import io
import os
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import chunk, write_png
from PIL import Image, PngImagePlugin

from fewstep_sr import files
from pipelines.pictures import OutputError, Picture, Pixels, UnreadableError, read_picture, read_size, require_place, require_writable, write_picture
from pipelines.pictures.metadata import EXIF_IFD, Metadata
from pipelines.pictures.record import RECORD_TAG, make_record, read_record

GRAY = Image.new("RGB", (16, 12), "gray")
RNG = np.random.default_rng(0)
SUFFIXES = pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])


def jpeg(path: Path, *segments: tuple[int, bytes]) -> Path:
    plain = io.BytesIO()
    GRAY.save(plain, "JPEG")
    data = plain.getvalue()
    extra = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    path.write_bytes(data[:2] + extra + data[2:])
    return path


def png(path: Path, before: bytes = b"", after: bytes = b"") -> Path:
    write_png(path, np.full((12, 16, 3), 128, np.uint8), 8, before=before, after=after)
    return path


def written(picture: Picture, path: Path, **kwargs) -> tuple[Image.Image, list[str]]:
    notes = write_picture(picture.pixels.tensor(), picture, path, 95, **kwargs)
    opened = Image.open(path)
    opened.load()
    return opened, notes


def entry(tag: int, kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0")


def exif_with(pointer: int, tag: int, kind: int, count: int, data: bytes) -> bytes:
    second = 8 + 2 + 12 + 4
    value = data if len(data) <= 4 else struct.pack("<I", second + 2 + 12 + 4)
    first = b"II*\0" + struct.pack("<IH", 8, 1) + entry(pointer, 4, 1, struct.pack("<I", second)) + bytes(4)
    return b"Exif\0\0" + first + struct.pack("<H", 1) + entry(tag, kind, count, value) + bytes(4) + data


BROKEN_EXIF = {
    "garbage": b"Exif\0\0" + b"\xff" * 64,
    "cut": b"Exif\0\0II*\0\x08\0\0\0\xff\x7f" + b"\x01" * 30,
    "latitude as text": exif_with(0x8825, 2, 2, 6, b"48.1N\0"),
    "version as float": exif_with(0x8769, 0x9000, 12, 1, struct.pack("<d", 2.3)),
    "pointer into nowhere": b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry(0x8769, 4, 1, struct.pack("<I", 2**31)) + bytes(4),
    "a rational by zero": exif_with(0x8769, 0x829A, 5, 1, struct.pack("<II", 1, 0)),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_broken_exif_costs_no_picture(tmp_path, name, kind):
    exif, path = BROKEN_EXIF[name], tmp_path / f"in.{kind}"
    if kind == "jpg":
        jpeg(path, (0xE1, exif))
    elif kind == "png":
        png(path, before=chunk(b"eXIf", exif[6:]))
    else:
        GRAY.save(path, lossless=True, exif=exif)
    picture = read_picture(path)
    assert picture.pixels.size == (16, 12)
    if name in ("garbage", "latitude as text", "version as float"):
        assert "left out" in picture.metadata.notes[0]
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        assert written(picture, tmp_path / f"out{suffix}")[0].size == (16, 12)


@pytest.mark.parametrize(
    ("name", "before", "after", "kept"),
    [
        ("a long text", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)), b"", True),
        ("a long text at the end", b"", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)), True),
        ("a bomb", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000)), b"", False),
        ("a bomb at the end", b"", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000)), False),
        ("a wrong checksum", chunk(b"tEXt", b"Comment\0x")[:-1] + b"?", b"", False),
        ("a broken international text", chunk(b"iTXt", b"Comment\0\x01\0\0\0no zlib"), b"", None),
    ],
)
def test_png_texts_that_pillow_refuses(tmp_path, name, before, after, kept):
    picture = read_picture(png(tmp_path / "in.png", before, after))
    assert picture.pixels.size == read_size(tmp_path / "in.png") == (16, 12) and picture.pixels.values.min() == 128
    if kept is not None:
        assert (len(picture.metadata.text.get("Comment", "")) == 3_000_000) == kept
        assert kept or "left out" in picture.metadata.notes[0]
    assert written(picture, tmp_path / "out.png")[0].size == (16, 12)


def test_a_profile_larger_than_pillows_limit(tmp_path):
    profile = bytes(16) + b"RGB " + RNG.bytes(3_000_000)
    GRAY.save(tmp_path / "in.png", icc_profile=profile)
    picture = read_picture(tmp_path / "in.png")
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        assert write_picture(picture.pixels.tensor(), picture, tmp_path / f"out{suffix}", 95) == []
        assert read_picture(tmp_path / f"out{suffix}").metadata.icc_profile == profile
    strange = replace(picture, metadata=Metadata(icc_profile=bytes(16) + b"\x1b[2J" + bytes(100)))
    assert written(strange, tmp_path / "strange.png")[1] == ["its colour profile is of no colours and is left out"]
    huge = replace(picture, metadata=Metadata(icc_profile=bytes(16) + b"RGB " + bytes(17_000_000)))
    assert "too long for JPEG" in written(huge, tmp_path / "huge.jpg")[1][0]


def test_exif_too_long_for_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "workflow:" + "x" * 90_000, "Camera"
    GRAY.save(tmp_path / "in.webp", exif=exif)
    picture = read_picture(tmp_path / "in.webp")
    opened, notes = written(picture, tmp_path / "out.jpg", record=make_record({"scale": 4}, tmp_path / "in.webp"))
    assert opened.getexif()[0x0110] == "Camera" and 0x010F not in opened.getexif() and read_record(tmp_path / "out.jpg")
    assert len(notes) == 1 and "0x010f" in notes[0] and "too long for JPEG" in notes[0]
    assert len(written(picture, tmp_path / "out.png")[0].getexif()[0x010F]) == 90_009


@SUFFIXES
def test_descriptions_are_kept(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 6
    exif[EXIF_IFD] = {0x829A: 0.5, 0x9003: "2020:01:02 03:04:05", 0xA002: 16}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6" dc:title="Hut" exif:PixelXDimension="16"/></x:xmpmeta>'
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "Hütte")
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    GRAY.save(tmp_path / "in.png", exif=exif, dpi=(300, 300), pnginfo=text)
    opened, notes = written(read_picture(tmp_path / "in.png"), tmp_path / f"out{suffix}")
    assert notes == [] and opened.size == (12, 16)
    found = opened.getexif()
    assert found[0x010F] == "Camera" and 0x0112 not in found
    assert found.get_ifd(EXIF_IFD)[0x9003] == "2020:01:02 03:04:05" and 0xA002 not in found.get_ifd(EXIF_IFD)
    if suffix == ".webp":
        assert float(found[0x011A]) == pytest.approx(300, abs=0.02) and found[0x0128] == 2
    else:
        assert opened.info["dpi"] == pytest.approx((300, 300), abs=0.02)
    kept = read_picture(tmp_path / f"out{suffix}").metadata
    assert b'dc:title="Hut"' in kept.xmp and b"Orientation" not in kept.xmp and b"PixelX" not in kept.xmp
    assert kept.text == ({"Title": "Hütte"} if suffix == ".png" else {})


def test_resolutions_that_nobody_gave(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    for suffix in (".jpg", ".tif", ".png", ".webp"):
        GRAY.save(tmp_path / f"in{suffix}", exif=exif)
        assert read_picture(tmp_path / f"in{suffix}").metadata.dpi is None


@SUFFIXES
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_text_in_exif_is_kept_byte_by_byte(tmp_path, suffix, encoding):
    text = "Hütte\0".encode(encoding)
    jpeg(
        tmp_path / "in.jpg",
        (0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry(0x010E, 2, len(text), struct.pack("<I", 26)) + bytes(4) + text),
    )
    opened, notes = written(read_picture(tmp_path / "in.jpg"), tmp_path / f"out{suffix}")
    assert notes == [] and opened.getexif()[0x010E].encode("latin-1") == text[:-1]
    jpeg(tmp_path / "in.jpg", (0xE1, exif_with(0x8769, 0xA433, 2, len(text), text)))
    opened, notes = written(read_picture(tmp_path / "in.jpg"), tmp_path / f"out{suffix}")
    assert notes == [] and opened.getexif().get_ifd(EXIF_IFD)[0xA433].encode("latin-1") == text[:-1]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.png", b"", "the file is empty"),
        ("text.jpg", b"no picture", "cannot identify"),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "cannot identify"),
        ("script.tga", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "cannot identify"),
        ("phone.heic", b"\0\0\0\x18ftypheic", ".heic files are not read here"),
        ("._cat.jpg", b"\0\5\x16\7", "cannot identify"),
    ],
)
def test_what_is_no_picture(tmp_path, monkeypatch, name, data, words):
    monkeypatch.setattr("subprocess.Popen", None)  # an interpreter would be started with it
    (tmp_path / name).write_bytes(data)
    for read in (read_picture, read_size):
        with pytest.raises(UnreadableError, match=words):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_every_cut_is_a_sentence(tmp_path, kind):
    """Cut anywhere, a file is a picture or an UnreadableError; nothing else comes out."""
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"in.{kind}")
    data, refused = (tmp_path / f"in.{kind}").read_bytes(), 0
    for end in range(1, len(data), max(1, len(data) // 40)):
        (tmp_path / f"cut.{kind}").write_bytes(data[:end])
        try:
            assert read_picture(tmp_path / f"cut.{kind}").pixels.size == (40, 40)
        except UnreadableError as error:
            refused += 1
            assert str(error)
    assert refused > 20


def test_scans_are_work(tmp_path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "scan.png")
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    assert read_size(tmp_path / "scan.png") == (14_000, 14_000)
    assert limits == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    (tmp_path / "claims.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(UnreadableError, match="it claims 200000 x 200000 pixels"):
        read_picture(tmp_path / "claims.png")


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_animations_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (16, 12), (i * 50, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / f"moving.{kind}", save_all=True, append_images=frames[1:])
    for read in (read_picture, read_size):
        with pytest.raises(UnreadableError, match="3 frames or pages, expected one"):
            read(tmp_path / f"moving.{kind}")


@SUFFIXES
def test_a_record_is_in_the_file(tmp_path, suffix):
    (tmp_path / "in.png").write_bytes(b"x")
    settings = {"method": "invsr", "prompt": "a hut, „Hütte“", "options": (1, 2)}
    record = make_record(settings, tmp_path / "in.png")
    picture = Picture(Pixels(np.full((12, 16, 3), 100, np.uint8)))
    written(picture, tmp_path / f"out{suffix}", record=record)
    assert read_record(tmp_path / f"out{suffix}") == record and '"method": "invsr"' in record and record.isascii()
    again = read_picture(tmp_path / f"out{suffix}")
    assert RECORD_TAG not in again.metadata.exif.get(0, {})  # a result of this result has a record of its own
    written(again, tmp_path / f"plain{suffix}")
    assert read_record(tmp_path / f"plain{suffix}") is None
    assert len(make_record({"prompt": "x" * 100_000}, tmp_path / "in.png")) < 100


def picture(height=12, width=16) -> Picture:
    return Picture(Pixels(np.full((height, width, 3), 100, np.uint8)))


def test_formats_limits_are_known_before(tmp_path):
    clear = Picture(Pixels(np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 9, np.uint8)))
    with pytest.raises(ValueError, match="transparency, which JPEG cannot hold"):
        require_writable(clear, (4, 4), tmp_path / "a.jpg")
    for suffix, side in ((".jpg", 65501), (".webp", 16384)):
        with pytest.raises(ValueError, match=f"would be {side} x 10"):
            require_writable(picture(), (side, 10), tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="TIFF holds 4 GiB"):
        require_writable(picture(), (40_000, 40_000), tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "日" * 83 + ".tiff", "b" * 250 + ".webp"])
def test_names_as_long_as_the_disk_takes(tmp_path, name):
    require_place(tmp_path / name, (16, 12))
    written(picture(), tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(ValueError, match="bytes long, but its folder takes 255"):
        require_place(tmp_path / f"x{'y' * 4}{name}", (16, 12))


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a file is where a folder is needed"):
        require_place(tmp_path / "file" / "out" / "a.png", (1, 1))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match=r"a.png is a folder, expected a file"):
        require_place(tmp_path / "a.png", (1, 1))
    require_place(tmp_path / "new" / "deep" / "b.png", (1, 1))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "file"]  # no folder is made, no trial is left
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: files.shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OutputError, match="No space left on device"):
        require_place(tmp_path / "b.png", (8000, 8000))


def test_a_place_without_room_is_named(tmp_path, monkeypatch):
    """Writing, unlike opening, says no name."""
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left on device") as raised:
        files.require_room(tmp_path / "a.png")
    assert raised.value.errno == errno.ENOSPC and str(tmp_path) in str(raised.value)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OutputError, match="a.png cannot be written: No space left") as raised:
        written(picture(), tmp_path / "a.png")
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_text() == "old"


def test_two_runs_share_no_temporary_file(tmp_path, monkeypatch):
    """B stops half way through its file while A renames its own: what lies under the name is whole at each moment."""
    target, real = tmp_path / "a.png", Path.write_bytes
    half, renamed = threading.Event(), threading.Event()

    def write(path, data):
        if threading.current_thread().name != "B":
            return real(path, data)
        with open(path, "wb") as file:
            file.write(bytes(data)[: len(data) // 2])
            file.flush()
            half.set()
            assert renamed.wait(30)
            Image.open(target).load()
            return file.write(bytes(data)[len(data) // 2 :])

    monkeypatch.setattr(Path, "write_bytes", write)
    noise = torch.rand(1, 3, 64, 64)
    failures = []

    def run():
        try:
            write_picture(noise, picture(64, 64), target, 95)
        except Exception as error:
            failures.append(error)

    second = threading.Thread(target=run, name="B")
    second.start()
    assert half.wait(30)
    run()
    renamed.set()
    second.join()
    assert not failures and os.listdir(tmp_path) == ["a.png"]
    Image.open(target).load()


def test_leftovers_of_killed_runs_go(tmp_path):
    old, new, other = (tmp_path / name for name in (".fewstepsr-1.part", ".fewstepsr-2.part", ".mine.part"))
    for path in (old, new, other):
        path.write_text("x")
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    files.remove_stale(tmp_path)
    assert not old.exists() and new.exists() and other.exists()
