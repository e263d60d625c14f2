"""Which images a command names, where their results go, and what of them is done."""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep_sr.methods import METHODS
from pipelines.base import FewStepSRPipeline
from pipelines.cli import main
from pipelines.done import Results
from pipelines.jobs import Job, beside, list_jobs
from pipelines.pictures import Picture, Pixels, find_in_folder, write_picture
from pipelines.ranges import scaled
from pipelines.settings import Settings

OUT = Path("nowhere_yet")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def results(jobs: list[Job]) -> list[str]:
    return [str(job.target.relative_to(OUT)) for job in jobs]


def test_kinds_in_a_folder(tmp_path):
    """Kinds that are written keep their suffix, others become PNG; kinds that are not read get a job, too, which says so."""
    touch(tmp_path, "1.png", "2.bmp", "3.gif", "4.ppm", "5.jfif", "6.JPE", "7.heic", "8.tga", "9.CR2", "notes.txt", "movie.mp4", "Thumbs.db")
    assert results(list_jobs([str(tmp_path)], OUT, None)) == ["1.png", "2.png", "3.png", "4.png", "5.jfif", "6.JPE", "7.png", "8.png", "9.png"]


def test_files_of_systems_are_no_images(tmp_path):
    touch(
        tmp_path,
        "a.png",
        "sub/b.jpg",
        "._a.png",
        ".hidden.png",
        ".thumbnails/c.png",
        "__MACOSX/a.png",
        "@eaDir/a.png",
        "$RECYCLE.BIN/d.png",
        "sub/.t/e.png",
    )
    assert results(list_jobs([str(tmp_path)], OUT, None)) == ["a.png", "sub/b.jpg"]
    hidden = tmp_path / ".thumbnails"  # named by the user: their own choice
    assert [path.name for path in find_in_folder(hidden, {".png"})] == ["c.png"]


def test_one_name_for_two(tmp_path):
    touch(tmp_path, "cat.png", "cat.bmp", "dog.bmp")
    assert results(list_jobs([str(tmp_path)], OUT, None)) == ["cat.bmp.png", "cat.png", "dog.png"]
    touch(tmp_path, "dog.gif")
    with pytest.raises(ValueError, match=r"dog.bmp and .*dog.gif would both become"):
        list_jobs([str(tmp_path)], OUT, None)


def test_brackets_in_folders(tmp_path):
    touch(tmp_path, "trip [2024]/p.jpg", "trip [2024]/q.jpg", "trip [2024]/r[1].png", "trip 2/z.jpg")
    assert results(list_jobs([f"{tmp_path}/trip [[]2024]/*.jpg"], OUT, None)) == ["p.jpg", "q.jpg"]
    assert results(list_jobs([f"{tmp_path}/trip [2024]/*.jpg"], OUT, None)) == ["p.jpg", "q.jpg"]
    assert results(list_jobs([f"{tmp_path}/trip [2024]/r[1].png"], OUT, None)) == ["r[1].png"]
    assert results(list_jobs([f"{tmp_path}/trip [0-9]/*.jpg"], OUT, None)) == ["z.jpg"]
    assert len(list_jobs([f"{tmp_path}/**/*.jpg"], OUT, None)) == 3


def test_links_are_images_of_their_own(tmp_path):
    touch(tmp_path, "real/a.png", "in/own.png")
    for name in ("x.png", "y.png"):
        os.symlink(tmp_path / "real" / "a.png", tmp_path / "in" / name)
    assert results(list_jobs([str(tmp_path / "in")], OUT, None)) == ["own.png", "x.png", "y.png"]
    assert results(list_jobs([str(tmp_path / "in"), str(tmp_path / "in" / "x.png")], OUT, None)) == ["own.png", "x.png", "y.png"]
    with pytest.raises(ValueError, match="would replace the picture itself"):
        list_jobs([str(tmp_path / "in" / "x.png")], tmp_path / "real" / "a.png", None)


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, text):
    monkeypatch.chdir(touch(tmp_path, "a.png"))
    with pytest.raises(ValueError, match="INPUT: found an empty name"):
        list_jobs([text], OUT, None)


@pytest.mark.parametrize(
    "words",
    [
        ["upscale", "a.png", "-o"],
        ["upscale", "a.png", "--weights"],
        ["upscale", "a.png", "--base"],
        ["upscale", "a.png", "--comfyui"],
        ["convert"],
        ["convert", "a.pkl", "-o"],
        ["info"],
        ["evaluate", "--data"],
        ["compare", "a", "-o"],
        ["verify", "--json"],
        ["train", "osediff", "--data", "a", "--steps", "1", "--base"],
        ["train", "osediff", "--data", "a", "--steps", "1", "-o"],
    ],
)
def test_no_empty_name_is_the_current_folder(tmp_path, monkeypatch, capsys, words):
    """Of options and other commands: the parser refuses it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*words, ""])
    assert ended.value.code == 2 and "found an empty name (a variable of the shell that is not set?)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_long_names_are_answered_briefly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["upscale", "x" * 100_000, "-o", "out", "--demo"]) == 2
    error = capsys.readouterr().err
    assert "xxx" in error and len(error) < 5000 and "characters)" in error


@pytest.mark.parametrize("names", [["cta.png"], ["ca?.jpg"], ["cat.png", "cta.png"], ["cta"]])
def test_a_mistyped_name_is_answered_about_the_name(tmp_path, monkeypatch, names):
    """With -o and without."""
    monkeypatch.chdir(touch(tmp_path, "cat.png"))
    for call in (lambda: beside(names, "x4", None), lambda: list_jobs(names, OUT, None)):
        with pytest.raises(FileNotFoundError, match=rf"^{re.escape(names[-1])}: there is no such file or folder, and nothing matches it"):
            call()
    with pytest.raises(ValueError, match="-o: name a folder for the results of cat.png, ca[?].png"):
        beside(["cat.png", "ca?.png"], "x4", None)
    with pytest.raises(ValueError, match="INPUT: found an empty name"):
        beside([""], "x4", None)


@pytest.mark.parametrize(
    ("output", "suffix", "words"),
    [
        ("cat.bmp", None, "-o: found cat.bmp, but .bmp is not written"),
        ("cat.HEIC", None, "-o: found cat.HEIC, but .heic is not written"),
        ("cat.pdf", None, "-o: found cat.pdf, but .pdf is not written"),
        ("a.jpg", ".png", "--format: found png, but -o names the file a.jpg"),
        ("a.tiff", ".webp", "--format: found webp, but -o names the file a.tiff"),
    ],
)
def test_output_names_that_contradict(tmp_path, output, suffix, words):
    with pytest.raises(ValueError, match=words):
        list_jobs([str(touch(tmp_path, "a.png") / "a.png")], tmp_path / output, suffix)


def test_output_names_that_agree(tmp_path):
    touch(tmp_path, "in.png")
    source = str(tmp_path / "in.png")
    for output, suffix in (("a.jpg", ".jpeg"), ("a.tif", ".tiff"), ("a.PNG", None), ("a.jfif", None)):
        assert list_jobs([source], tmp_path / output, suffix)[0].target == tmp_path / output
    assert list_jobs([source], tmp_path / "results.v2", None)[0].target == tmp_path / "results.v2" / "in.png"
    (tmp_path / "album.png").mkdir()
    assert list_jobs([source], tmp_path / "album.png", ".webp")[0].target == tmp_path / "album.png" / "in.webp"
    assert beside([str(touch(tmp_path, "c.bmp") / "c.bmp")], "x1.5", None).name == "c_x1.5.png"


def settings(method="osediff", output=None, **kwargs) -> Settings:
    return Settings(inputs=("a",), output=output, method=METHODS[method], **kwargs)


def result(job: Job, own: Settings | None) -> None:
    record = Results(own, [job]).record(job) if own else None
    write_picture(Pixels(np.zeros((4, 4, 3), np.uint8)).tensor(), Picture(Pixels(np.zeros((4, 4, 3), np.uint8))), job.target, 95, record)


OTHERS = [
    {"method": "invsr"},
    {"scale": 2.0},
    {"seed": 1},
    {"prompt": "a cat"},
    {"cfg": 2.0},
    {"color_fix": "wavelet"},
    {"tile": 512},
    {"weights": "other.pkl"},
    {"options": {"tagger": Path("ram.pth")}},
]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("other", OTHERS)
def test_settings_are_part_of_done(tmp_path, capsys, other, suffix):
    touch(tmp_path, "a.png", "b.png")
    jobs = [Job(tmp_path / "a.png", tmp_path / "out" / f"a{suffix}"), Job(tmp_path / "b.png", tmp_path / "out" / f"b{suffix}")]
    for job in jobs:
        result(job, settings())
    look = Results(settings(), jobs)
    assert [look(job) for job in jobs] == [True, True]
    look = Results(settings(**other), jobs)
    assert [look(job) for job in jobs] == [False, False]
    look.report(0)
    assert "2 were made with other settings and are done again (a" in capsys.readouterr().err
    (name,) = other
    if name != "options":
        assert name in look.other[0][1]
    look = Results(settings(**other, overwrite=True), jobs)
    assert not look(jobs[0]) and not look.other


def test_what_does_not_change_a_result(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    jobs = [Job(tmp_path / f"{n}.png", tmp_path / "out" / f"{n}.png") for n in "ab"]
    result(jobs[0], settings())
    for same in ({"device": "cpu"}, {"offload": True}, {"compile": True}, {"quality": 50}, {"negative_prompt": "x"}, {"weights": None}):
        assert Results(settings(**same), jobs)(jobs[0]), same
    (tmp_path / "a.png").write_bytes(b"another photo of the same name")
    look = Results(settings(), jobs)
    assert not look(jobs[0]) and look.other[0][1] == "another source"


def test_records_hold_no_paths(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "base.safetensors").write_bytes(b"1234")
    touch(tmp_path, "a.png")
    line = Results(settings(base=str(tmp_path / "secret" / "base.safetensors")), []).record(Job(tmp_path / "a.png", tmp_path / "b.png"))
    assert "base.safetensors (4 bytes)" in line and "secret" not in line


def test_what_else_may_lie_there(tmp_path, capsys):
    """An empty file is no result; another program's file is left, and named; a folder fails alone."""
    touch(tmp_path, "a.png", "b.png", "c.png", "out/b.png")
    jobs = [Job(tmp_path / f"{n}.png", tmp_path / "out" / f"{n}.png") for n in "abc"]
    jobs[0].target.write_bytes(b"")
    jobs[2].target.mkdir()
    look = Results(settings(), jobs)
    assert [look(job) for job in jobs] == [False, True, False]
    look.report(1)
    assert "1 of these hold no record of how they were made: b.png" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"c.png is a folder, expected a file"):
        Results(settings(), jobs[2:])(jobs[2])


def test_a_single_named_file_is_done_again(tmp_path, capsys):
    touch(tmp_path, "a.png")
    job = Job(tmp_path / "a.png", tmp_path / "b.png", named=True)
    result(job, settings())
    for wanted, said in ((settings(), ""), (settings(seed=5), "b.png was made with other settings and is done again: seed 12345 -> 5.\n")):
        look = Results(wanted, [job])
        assert not look(job)
        look.report(0)
        assert capsys.readouterr().err == said
    result(job, None)
    with pytest.raises(FileExistsError, match="b.png exists and was not made by this program"):
        Results(settings(), [job])(job)
    assert not Results(settings(overwrite=True), [job])(job)


def test_info_gives_a_terminal_no_commands(tmp_path, capsys):
    """Out of a result's record and of a weight file's metadata."""
    pixels = Pixels(np.zeros((4, 4, 3), np.uint8))
    record = f"ComfyUI-FewStepSR {'0' * 32} " + json.dumps({"prompt": "\x1b[2J", "a\x07": 1, "base": "sd.safetensors"})
    write_picture(pixels.tensor(), Picture(pixels), tmp_path / "a.png", 95, record)
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", {"note": "\x1b]0;title\x07", "\x1b[1m" + "k" * 5000: "v"})
    for name, words in (("a.png", ["base: sd.safetensors", "\\x1b[2J"]), ("a.safetensors", ["note: \\x1b]0;title"])):
        assert main(["info", str(tmp_path / name)]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words) and all(line.isprintable() and len(line) < 300 for line in said.splitlines())


@pytest.mark.parametrize("rest", [' {"scale": 4', " [1, 2]", " " + "[" * 3000, " nothing", "", " null"])
def test_a_record_that_was_cut_ends_no_run(tmp_path, capsys, rest):
    """As other programs leave it: the result is done again, and info says what there is."""
    touch(tmp_path, "a.png", "b.png", "out/x")
    jobs = [Job(tmp_path / f"{name}.png", tmp_path / "out" / f"{name}.png") for name in "ab"]
    pixels = Pixels(np.zeros((4, 4, 3), np.uint8))
    write_picture(pixels.tensor(), Picture(pixels), jobs[0].target, 95, f"ComfyUI-FewStepSR {'0' * 32}{rest}")
    look = Results(settings(), jobs)
    assert not look(jobs[0]) and not look(jobs[1])
    look.report(0)
    assert "a.png was made with other settings and is done again: " in capsys.readouterr().err
    assert main(["info", str(jobs[0].target)]) == 0
    assert "a picture restored by this program" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale nan", "--scale: found nan, expected a finite number of more than 0"),
        ("--scale inf", "--scale: found inf"),
        ("--scale 0", "--scale: found 0"),
        ("--scale -2", "--scale: found -2"),
        ("--scale 1e300", "--scale: found 1e+300, which makes more than 2147483647 pixels a side"),
        (f"--long-side {10**400}", "--long-side: found 1000"),
        (f"--short-side {10**400}", "--short-side: found 1000"),
        (f"--tile -{10**400}", "--tile: found -1000"),
        ("--crf nan", "--crf: found nan"),
        ("--cfg nan", "--cfg: found nan"),
        (f"--seed {2**64}", f"--seed: found {2**64}, expected 0 to"),
        ("--seed -1", "--seed: found -1"),
        ("--quality 500", "--quality: found 500, expected 1 to 100"),
        ("--quality 0", "--quality: found 0"),
        ("--tile 100", "--tile: found 100, expected a multiple of 64 from 256 on"),
        ("--tile -64", "--tile: found -64"),
        ("--device gpu", "--device: found 'gpu', expected one that this machine has: cpu"),
        ("--device cuda:99", "--device: found 'cuda:99'"),
        ("--device meta", "--device: found 'meta'"),
        ("--steps 0", "steps: found 0"),
    ],
)
def test_options_edges(tmp_path, capsys, words, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    method = [] if "cfg" in words else ["--demo"]
    assert main(["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), *method, *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said) < 300 and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("fps", ["1/0", "nan", "x", "9" * 400 + "/0"])
def test_a_frame_rate_that_is_none(tmp_path, capsys, fps):
    with pytest.raises(SystemExit):
        main(["upscale", str(tmp_path), "--demo", "--fps", fps])
    said = capsys.readouterr().err.splitlines()[0]
    assert f"--fps: found {fps[:40]}, expected a number such as 25 or 30000/1001" in said and len(said) < 200


@pytest.mark.parametrize(
    ("size", "scale", "message"),
    [
        ((12, 8), 1e308, "makes more than 2147483647 pixels a side of a picture of 12 x 8"),
        ((12, 8), 2**28, "makes more than"),
        ((12, 8), 0.06, "leaves nothing of a picture of 12 x 8"),
        ((12, 8), float("nan"), "expected a finite number"),
        ((12, 8), float("inf"), "expected a finite number"),
    ],
)
def test_sizes_that_no_picture_has(size, scale, message):
    with pytest.raises(ValueError, match=message):
        scaled(size, scale)
    with pytest.raises(ValueError, match=message):
        FewStepSRPipeline.preprocess(None, Image.new("RGB", size), scale)


def test_sizes_are_rounded():
    assert scaled((12, 8), 1.45) == (17, 12) and scaled((2**31 - 1, 1), 1) == (2**31 - 1, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("upscale a.png --longside 700", "upscale: error: there is no option --longside. Did you mean --long-side?"),
        ("upscale a.png --scale=2 --qwertz=3", "upscale: error: there is no option --qwertz."),
        ("train invsr --data d -o out --steps 1 --warm-up 3", "train invsr: error: there is no option --warm-up. Did you mean --warmup?"),
        ("upscale a.png --\x1b[2J", "upscale: error: there is no option --\\x1b[2J."),
        (f"upscale a.png --scale {'x' * 10**6}", "... (1000041 characters)"),
        ("info", "info: error: the following arguments are required: FILE"),
    ],
)
def test_wrong_arguments_are_answered_in_a_line(capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    error, where = capsys.readouterr().err.splitlines()
    assert (
        error.endswith(said) and len(error) < 5000 and where.endswith(f"{words.split()[0]}{' invsr' * ('invsr' in words)} --help lists the options.")
    )


def test_info_of_a_picture_of_others(tmp_path, capsys):
    touch(tmp_path, "a.jpg")
    assert main(["info", str(tmp_path / "a.jpg")]) == 2
    assert "a.jpg: this picture was not made by this program, or has lost its record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"negative_prompt": "x"}, "--negative-prompt is ignored"),
        ({"options": {"dape": Path("d.pth")}}, "--dape is ignored without --tagger"),
        ({"suffix": ".png", "quality": 50}, "--quality is ignored: PNG loses nothing"),
        ({"output": Path("a.TIF"), "quality": 50}, "--quality is ignored: TIF loses nothing"),
        ({"method": "invsr", "options": {"steps": 9, "timesteps": ()}}, "--steps 9: InvSR is published with 1 to 5; these are evenly spaced"),
        ({"method": "invsr", "options": {"steps": 3, "timesteps": (100,)}}, "--steps is ignored"),
    ],
)
def test_options_that_change_nothing_are_said(capsys, own, words):
    from pipelines.ranges import say_ignored

    say_ignored(settings(**own))
    assert words in capsys.readouterr().err
    say_ignored(settings())
    assert capsys.readouterr().err == ""


def test_options_of_videos_are_said_where_there_is_none(capsys):
    from pipelines.ranges import say_ignored_of_videos

    pictures, video = [Job(Path("a.png"), Path("b.png"))], [Job(Path("a.mp4"), Path("b.mp4"))]
    own = settings(codec="hevc", crf=20.0, pixel_format="yuv420p", fps=Fraction(25), segment=10)
    say_ignored_of_videos(own, video)
    say_ignored_of_videos(settings(), pictures)
    assert capsys.readouterr().err == ""
    say_ignored_of_videos(own, pictures)
    said = capsys.readouterr().err
    assert [line.split()[0] for line in said.splitlines()] == ["--codec", "--crf", "--pixel-format", "--fps", "--segment"] and "for videos" in said
    with pytest.raises(ValueError, match="--steady: found pictures alone"):
        say_ignored_of_videos(settings(steady=True), pictures)
