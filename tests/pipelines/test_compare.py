"""``compare``: the same crop of every image, its figures, and the sheet in a real browser."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep_sr.image.quality import compare
from pipelines.cli import main
from pipelines.pictures import read_pixels

SIZE = (96, 64)


@pytest.fixture
def folders(tmp_path) -> Path:
    """Three pictures, flat but for a square of noise whose place is known; results that are lighter, and darker."""
    for name in ("test_LR", "test_HR", "lighter", "darker"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        values = np.full((SIZE[1], SIZE[0], 3), 100, np.uint8)
        values[24:48, 40:64] = rng.integers(0, 200, (24, 24, 3))
        original = Image.fromarray(values)
        original.save(tmp_path / "test_HR" / f"p{i}_HR.png")
        original.resize((24, 16)).save(tmp_path / "test_LR" / f"p{i}_LR4.png")
        for name, step in (("lighter", 20), ("darker", -20)):
            Image.fromarray((values.astype(int) + step).clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"p{i}_LR4.png")
    return tmp_path


def run(folders: Path, *words, output="sheet.html") -> int:
    return main(["compare", f"A={folders / 'lighter'}", str(folders / "darker"), "-o", str(folders / output), *map(str, words)])


def data(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def pixels(tile: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(tile["src"].partition(",")[2]))))


def test_the_sheet_holds_the_same_crop_of_each(folders):
    assert run(folders, "--data", folders, "--size", 24) == 0
    sheet = data(folders / "sheet.html")
    assert [row["name"] for row in sheet["rows"]] == ["p0", "p1", "p2"]
    for row in sheet["rows"]:
        assert [tile["label"] for tile in row["tiles"]] == ["low quality, bicubic", "A", "darker", "original"]
        original = np.asarray(Image.open(folders / "test_HR" / f"{row['name']}_HR.png"))
        assert np.array_equal(pixels(row["tiles"][3]), original[24:48, 40:64])  # where the detail is
        lighter = np.asarray(Image.open(folders / "lighter" / f"{row['name']}_LR4.png"))
        assert np.array_equal(pixels(row["tiles"][1]), lighter[24:48, 40:64])
        figures = compare(*(read_pixels(folders / name).tensor() for name in (f"lighter/{row['name']}_LR4.png", f"test_HR/{row['name']}_HR.png")))
        assert row["tiles"][1]["lines"] == [
            f"PSNR {figures['psnr'].item():.2f}",
            f"SSIM {figures['ssim'].item():.4f}",
            f"GMSD {figures['gmsd'].item():.4f}",
        ]
    text = (folders / "sheet.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text  # self-contained


def test_pictures_place_and_size_are_chosen(folders):
    assert run(folders, "--hq", folders / "test_HR", "--pictures", "p2", "p0_LR4.png", "--at", 5, 7, "--size", 20) == 0
    sheet = data(folders / "sheet.html")
    assert [row["name"] for row in sheet["rows"]] == ["p2", "p0"]
    darker = np.asarray(Image.open(folders / "darker" / "p2_LR4.png"))
    assert np.array_equal(pixels(sheet["rows"][0]["tiles"][1]), darker[7:27, 5:25])
    assert run(folders, "--size", 0) == 0
    assert (data(folders / "sheet.html")["rows"][0]["width"], data(folders / "sheet.html")["rows"][0]["height"]) == SIZE


def test_seconds_and_figures_are_those_that_evaluate_left(folders):
    assert main(["evaluate", "--data", str(folders), "--method", "bicubic", "-o", str(folders / "out")]) == 0
    report = json.loads((folders / "out" / "evaluation.json").read_text())
    assert main(["compare", str(folders / "out"), "-o", str(folders / "sheet.html"), "--hq", str(folders / "test_HR")]) == 0
    tile = data(folders / "sheet.html")["rows"][1]["tiles"][0]
    assert tile["lines"][-1] == f"{report['pictures'][1]['seconds']:.2f} s" and tile["lines"][0] == f"PSNR {report['pictures'][1]['psnr']:.2f}"
    shutil.copy(folders / "lighter" / "p1_LR4.png", folders / "out" / "p1_LR4.png")  # no longer what was measured
    assert main(["compare", str(folders / "out"), "-o", str(folders / "sheet.html"), "--hq", str(folders / "test_HR")]) == 0
    assert not data(folders / "sheet.html")["rows"][1]["tiles"][0]["lines"][-1].endswith(" s")


def test_metrics_that_evaluate_was_not_asked_for_are_computed(folders):
    assert main(["evaluate", "--data", str(folders), "--method", "bicubic", "-o", str(folders / "out"), "--metrics", "psnr"]) == 0
    assert main(["compare", str(folders / "out"), "-o", str(folders / "sheet.html"), "--hq", str(folders / "test_HR")]) == 0
    lines = data(folders / "sheet.html")["rows"][1]["tiles"][0]["lines"]
    assert [line.split()[0] for line in lines[:3]] == ["PSNR", "SSIM", "GMSD"] and lines[3].endswith(" s")


def test_what_is_not_in_every_folder_is_named(folders, capsys):
    (folders / "lighter" / "p1_LR4.png").unlink()
    assert run(folders) == 0
    assert "1 is not in every folder and is left out: p1. (Subfolders" in capsys.readouterr().err


def test_a_png(folders):
    assert run(folders, "--data", folders, "--size", 24, "--pictures", "p1", output="sheet.png") == 0
    sheet = np.asarray(Image.open(folders / "sheet.png").convert("RGB"))
    crop = np.asarray(Image.open(folders / "darker" / "p1_LR4.png"))[24:48, 40:64]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (24, 24, 3))[:, :, 0]
    assert (windows[..., :1, :1, :] == crop[:1, :1]).all((-1, -2, -3)).any()
    assert any(np.array_equal(window, crop) for window in windows[(windows[..., 0, 0, :] == crop[0, 0]).all(-1)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "p9"], "--pictures: found p9, expected names that are in every folder, such as p0, p1, p2"),
        (["--at", "90", "0", "--size", "24"], "--at: found 90 0, expected 0 to 72 and 0 to 40"),
        (["--size", "3"], "--size: found 3, expected 16 or more"),
        (["--data", "nowhere"], "--data: there is no folder nowhere"),
    ],
)
def test_what_makes_no_sheet(folders, capsys, words, message):
    assert run(folders, *words) == 2
    assert message in capsys.readouterr().err
    assert not (folders / "sheet.html").exists()


def test_folders_that_make_no_sheet(folders, capsys):
    for words, message in (
        ([str(folders / "lighter"), str(folders / "lighter")], "found the label lighter twice"),
        ([str(folders / "nowhere")], "there is no folder"),
        ([str(folders / "lighter" / "p0_LR4.png")], "p0_LR4.png is a file, expected a folder of results"),
        ([str(folders / "lighter"), "-o", str(folders / "sheet.jpg")], "expected a name that ends in .html or .png"),
        ([str(folders / "empty")], "there are no images in"),
        ([str(folders / "lighter"), str(folders / "others")], "no picture is in every folder"),
    ):
        (folders / "empty").mkdir(exist_ok=True)
        (folders / "others").mkdir(exist_ok=True)
        Image.new("RGB", SIZE).save(folders / "others" / "q.png")
        assert main(["compare", "-o", str(folders / "sheet.html"), *words]) == 2
        assert message in capsys.readouterr().err
    Image.new("RGB", SIZE).save(folders / "others" / "q_x4.png")
    assert main(["compare", "-o", str(folders / "sheet.html"), str(folders / "others")]) == 2
    assert "found q.png and q_x4.png, which could both be q" in capsys.readouterr().err
    Image.new("RGB", (50, 50)).save(folders / "darker" / "p1_LR4.png")
    assert run(folders) == 1  # the other pictures are on the sheet
    assert "found 50 x 50 pixels, expected 96 x 64" in capsys.readouterr().err
    assert [row["name"] for row in data(folders / "sheet.html")["rows"]] == ["p0", "p2"]


def test_names_cannot_break_the_page(folders):
    name = "</script><b>&"
    assert main(["compare", f"{name}={folders / 'lighter'}", "-o", str(folders / "sheet.html")]) == 0
    assert data(folders / "sheet.html")["rows"][0]["tiles"][0]["label"] == name
    assert (folders / "sheet.html").read_text().count("</script>") == 2


@pytest.mark.parametrize("label", ["", "=", " ="])
def test_without_a_label_it_is_the_folders_name(folders, label, capsys):
    words = ["--hq", str(folders / "test_HR"), "--pictures", "p1", "-o", str(folders / "sheet.html")]
    assert main(["compare", f"{label}{folders / 'lighter'}", *words]) == 0
    assert data(folders / "sheet.html")["rows"][0]["tiles"][0]["label"] == "lighter"
    assert "sheet.html: 1 image in 2 versions" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows' names have no such characters")
@pytest.mark.parametrize("output", ["sheet.html", "sheet.png"])
def test_names_that_are_no_line_of_text(folders, output):
    """A line break, and bytes of another encoding; a label that is the template's own mark."""
    for path in (folders / "lighter" / "p1_LR4.png", folders / "test_HR" / "p1_HR.png"):
        shutil.copy(path, path.with_name(os.fsdecode(b"a\n\xff") + path.name))
    words = [f"@DATA@={folders / 'lighter'}", "--hq", str(folders / "test_HR"), "-o", str(folders / output)]
    assert main(["compare", *words]) == 0
    if output == "sheet.html":
        sheet = data(folders / output)
        assert [row["name"] for row in sheet["rows"]] == [os.fsdecode(b"a\n\xffp1"), "p0", "p1", "p2"] and sheet["rows"][0]["tiles"][0][
            "label"
        ] == "@DATA@"
        assert "<title>Comparison: @DATA@, original</title>" in (folders / output).read_text()


def test_a_sheet_too_large_is_refused(folders, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.evaluation.compare.MOST_PIXELS", 4 * SIZE[0] * SIZE[1])
    assert run(folders, "--size", 0) == 2
    assert "--size: found crops of more than 0 megapixels after 3 of 3 pictures" in capsys.readouterr().err
    assert not (folders / "sheet.html").exists()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox", "--disable-gpu"]
            )
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start (apt install chromium, or playwright install chromium): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def looks(page, selector: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


@pytest.mark.slow
def test_in_a_browser(browser, folders):
    """Side by side and with the slider the screen shows the two images' own pixels, zoomed; nothing is fetched, and no script fails."""
    assert run(folders, "--data", folders, "--size", 64, "--at", 0, 0) == 0
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    failures, requests = [], []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folders / "sheet.html").as_uri())
    assert page.locator(".tile").count() == 12
    assert page.locator(".tile img").evaluate_all("images => images.every(image => image.complete && image.naturalWidth === 64)")
    assert page.locator("#means tr").count() == 5 and "seconds" in page.locator("#means").inner_text()

    page.get_by_alt_text("p1, A").click()
    assert page.locator("#viewer").is_visible() and page.locator("#name").inner_text() == "p1"
    page.locator("#right-choice").select_option(label="darker")
    left, right = looks(page, "#left"), looks(page, "#right")
    middle = [side[side.shape[0] // 4, side.shape[1] // 4].tolist() for side in (left, right)]
    assert middle == [[120] * 3, [80] * 3]  # the flat grey of 100, lighter and darker
    assert "PSNR" in page.locator("#left span").inner_text()

    page.get_by_label("Zoom").select_option("4")
    page.get_by_label("Slider").check()
    shown = looks(page, "#view")
    y, centre = shown.shape[0] // 2 - 88, shown.shape[1] // 2  # 22 pixels above the middle, where all is flat
    assert [shown[y, centre + step].tolist() for step in (-40, 40)] == [[120] * 3, [80] * 3]
    box = page.locator("#view").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20, steps=4)
    page.mouse.up()
    assert abs(float(page.locator("#split").input_value()) - 25) < 2
    page.locator("#split").press("ArrowRight")
    assert float(page.locator("#split").input_value()) > 24

    before = page.locator("#left img").evaluate("image => image.style.transform")
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -200)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6 + 30, box["y"] + box["height"] / 2 + 10, steps=3)
    page.mouse.up()
    after = [page.locator(f"#{side} img").evaluate("image => image.style.transform") for side in ("left", "right")]
    assert after[0] == after[1] != before  # both move together

    page.get_by_role("button", name="Next picture").click()
    assert page.locator("#name").inner_text() == "p2"
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert not failures and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()
