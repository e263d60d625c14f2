"""The command line on real files, with the small networks as base and weights."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pipeline_toys
import psutil
import pytest
import torch
import toys
from forked import Forked, free_port
from PIL import Image, ImageCms, ImageOps

from pipelines import InvSRPipeline, OSEDiffPipeline
from pipelines.cli import main
from pipelines.processes import require_joined

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base as a diffusers folder, and both methods' weights."""
    folder = tmp_path_factory.mktemp("models")
    OSEDiffPipeline(**pipeline_toys.components(3, folder / "clip")).save_pretrained(folder / "base")
    torch.save(toys.osediff_checkpoint(3, 4), folder / "osediff.pkl")
    torch.save(toys.predictor_state_dict(3), folder / "predictor.pth")
    return folder


def upscale(models: Path, *words, method="osediff", scale=2) -> int:
    weights = models / ("osediff.pkl" if method == "osediff" else "predictor.pth")
    words = [*words, "--method", method, "--base", models / "base", "--weights", weights, "--scale", scale, "--device", "cpu"]
    return main(["upscale", *map(str, words)])


def photo(width=21, height=16, mode="RGB", seed=1) -> Image.Image:
    image = Image.fromarray((toys.picture(seed, height, width)[0].numpy() * 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def write_photos(folder: Path, number: int) -> list[str]:
    folder.mkdir()
    for i in range(number):
        photo(seed=i).save(folder / f"photo_{i:02}.png")
    return [f"photo_{i:02}.png" for i in range(number)]


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("method", "kind", "settings"),
    [
        pytest.param("osediff", OSEDiffPipeline, {"prompt": "a cat"}, marks=pytest.mark.slow),
        ("invsr", InvSRPipeline, {"timesteps": [120, 30], "color_fix": "wavelet"}),
    ],
)
def test_result_is_the_pipelines(models, tmp_path, method, kind, settings):
    photo().save(tmp_path / "in.png")
    words = ["--prompt", "a cat"] if method == "osediff" else ["--timesteps", "120", "30", "--color-fix", "wavelet"]
    assert upscale(models, tmp_path / "in.png", "-o", tmp_path / "out.png", *words, method=method) == 0

    pipeline = kind.from_pretrained(models / "base")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_osediff(models / "osediff.pkl") if method == "osediff" else pipeline.load_noise_predictor(models / "predictor.pth")
    (expected,) = pipeline(photo(), scale=2, generator=torch.Generator().manual_seed(12345), **settings).images
    found = Image.open(tmp_path / "out.png")
    assert found.size == expected.size == (42, 32)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(("words", "name"), [([], "in_x2.png"), pytest.param(["--format", "webp"], "in_x2.webp", marks=pytest.mark.slow)])
def test_one_picture_goes_beside_itself(models, tmp_path, words, name):
    photo().save(tmp_path / "in.png")
    assert upscale(models, tmp_path / "in.png", *words) == 0
    assert names(tmp_path) == ["in.png", name]
    assert Image.open(tmp_path / name).format == Path(name).suffix[1:].upper()


def test_a_folder_needs_an_output(models, tmp_path, capsys):
    assert upscale(models, tmp_path) == 2
    assert "name a folder for the results" in capsys.readouterr().err


@pytest.mark.slow
def test_formats(models, tmp_path):
    """Every format, with profile, orientation, transparency and greyness; in a folder with a subfolder."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"  # turned by 90 degrees
    photo().save(source / "turned.jpg", exif=exif, icc_profile=PROFILE)
    photo(mode="RGBA").save(source / "sub" / "clear.png", icc_profile=PROFILE)
    photo(mode="RGBA").save(source / "clear.webp")
    photo(mode="L").save(source / "grey.tiff")
    photo(mode="LA").save(source / "grey_clear.png")
    photo(mode="CMYK").save(source / "print.tif")
    photo().convert("P").save(source / "few.png")
    Image.fromarray((np.arange(21 * 16).reshape(16, 21) * 195).astype(np.uint16)).save(source / "deep.png")
    assert upscale(models, source, "-o", out) == 0
    assert names(out) == names(source)

    turned = Image.open(out / "turned.jpg")
    assert turned.size == (32, 42) and turned.info["icc_profile"] == PROFILE
    assert turned.getexif().get(0x0112) is None and turned.getexif()[0x010F] == "Camera"
    modes = {name: Image.open(out / name).mode for name in names(out)}
    assert modes == {
        "turned.jpg": "RGB", "sub/clear.png": "RGBA", "clear.webp": "RGBA", "grey.tiff": "L",
        "grey_clear.png": "LA", "print.tif": "RGB", "few.png": "RGB", "deep.png": "I;16",
    }  # fmt: skip
    clear = Image.open(out / "sub" / "clear.png")
    assert clear.info["icc_profile"] == PROFILE
    expected = Image.open(source / "sub" / "clear.png").getchannel("A").resize(clear.size, Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(clear.getchannel("A")), np.asarray(expected))


@pytest.mark.slow
def test_orientation_is_applied_to_the_pixels(models, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "turned.png", exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).save(tmp_path / "upright.png")
    assert upscale(models, tmp_path / "*.png", "-o", tmp_path / "out") == 0
    turned, upright = (np.asarray(Image.open(tmp_path / "out" / f"{n}.png")) for n in ("turned", "upright"))
    assert np.array_equal(turned, upright)


def test_bad_files_do_not_stop_the_others(models, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    write_photos(source, 2)
    (source / "a_corrupt.png").write_bytes((source / "photo_00.png").read_bytes()[:200])
    (source / "b_text.jpg").write_text("no picture")
    photo(mode="RGBA").save(source / "c_clear.webp")
    photo().save(source / "d_moving.png", save_all=True, append_images=[photo(seed=2)])
    assert upscale(models, source, "-o", out, "--format", "jpg") == 1
    assert names(out) == ["photo_00.jpg", "photo_01.jpg"]
    report = capsys.readouterr().err
    assert "4 of 6 failed" in report
    for name, reason in (
        ("a_corrupt.png", "truncated"),
        ("b_text.jpg", "cannot identify"),
        ("c_clear.webp", "transparency"),
        ("d_moving.png", "2 frames"),
    ):
        assert any(name in line and reason in line for line in report.splitlines()), (name, report)


@pytest.mark.slow
def test_done_pictures_are_left_unless_asked(models, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    write_photos(source, 2)
    out.mkdir()
    (out / "photo_00.png").write_text("mine")
    assert upscale(models, source, "-o", out) == 0
    assert (out / "photo_00.png").read_text() == "mine" and "1 of 2 are done already" in capsys.readouterr().err
    assert upscale(models, source, "-o", out, "--overwrite") == 0
    assert Image.open(out / "photo_00.png").size == (42, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{in}", "-o", "{in}"], "it is the output folder, too"),
        (["{in}/photo_00.png", "-o", "{in}/photo_00.png"], "would replace the picture itself"),
        (["{in}", "-o", "out.png"], "for 2 pictures, expected a folder"),
        (["{in}/photo_00.png", "{in}/../photo_00.png", "-o", "out"], "would both become"),
        (["nothing", "-o", "out"], "there is no such file or folder"),
        (["{in}", "-o", "out", "--timesteps", "300"], "from 250 down to 1"),
    ],
)
def test_refused_before_any_work(models, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "in", 2)
    shutil.copy(tmp_path / "in" / "photo_00.png", tmp_path)
    method = "invsr" if "--timesteps" in words else "osediff"
    assert upscale(models, *[word.replace("{in}", str(tmp_path / "in")) for word in words], method=method) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["in/photo_00.png", "in/photo_01.png", "photo_00.png"]


@pytest.mark.slow
def test_tiles(models, tmp_path):
    photo(90, 40).save(tmp_path / "wide.png")
    results = []
    for tile in (0, 256, 1024):
        assert upscale(models, tmp_path / "wide.png", "-o", tmp_path / f"{tile}.png", "--tile", tile, scale=4) == 0
        results.append(np.asarray(Image.open(tmp_path / f"{tile}.png")))
    assert results[1].shape == (160, 360, 3)
    assert np.array_equal(results[0], results[2]) and not np.array_equal(results[0], results[1])


@pytest.mark.slow
def test_weights_in_a_comfyui(models, tmp_path, monkeypatch, capsys):
    write_photos(tmp_path / "in", 1)
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [
        "upscale",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "--comfyui",
        str(comfyui),
        "--base",
        str(models / "base"),
        "--device",
        "cpu",
    ]
    assert main(words) == 2
    report = capsys.readouterr().err
    assert (
        "OSEDiff's adapter (osediff.safetensors)" in report and f"put it into {comfyui / 'models' / 'osediff'}" in report and "Apache-2.0" in report
    )
    (comfyui / "models" / "osediff").mkdir()
    shutil.copy(models / "osediff.pkl", comfyui / "models" / "osediff")
    assert main(words) == 0
    assert names(tmp_path / "out") == ["photo_00.png"]


def command(models, source, out) -> list[str]:
    words = ["upscale", source, "-o", out, "--base", models / "base", "--weights", models / "osediff.pkl", "--scale", "4", "--device", "cpu"]
    return [*map(str, words)]


# accelerate calls several processes of one machine multi_gpu; where there is no GPU they are CPU processes.
TWO = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def start(models, source, out) -> subprocess.Popen:
    """Two processes, as accelerate starts them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *TWO, f"--main_process_port={free_port()}", "-m", "pipelines", *command(models, source, out)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_two(out: Path, running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while len(list(out.glob("*.png"))) < 2 and running():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole_ones(out: Path, expected: list[str]) -> dict[str, int]:
    """The results of a run that was killed, all of which can be read, with the times at which they were written.

    What it was writing is made old, so that the next run takes it for what it is: left behind.
    """
    for part in out.glob(".fewstepsr-*.part"):
        os.utime(part, (0, 0))
    done = {name: (out / name).stat().st_mtime_ns for name in expected if (out / name).exists()}
    assert 2 <= len(done) < len(expected)
    for name in done:
        Image.open(out / name).load()
    return done


@pytest.mark.slow
def test_killed_and_restarted(models, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    expected = write_photos(source, 7)
    first = Forked(lambda: main(command(models, source, out)), tmp_path / "first")
    wait_for_two(out, first.process.is_alive)
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    done = whole_ones(out, expected)
    second = Forked(lambda: main(command(models, source, out)), tmp_path / "second")
    assert second.wait() == 0, second.text
    assert names(out) == expected
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert f"{len(done)} of 7 are done already" in second.text


@pytest.mark.slow
def test_one_of_two_killed_and_both_restarted(models, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    expected = write_photos(source, 7)
    first = start(models, source, out)
    wait_for_two(out, lambda: first.poll() is None)
    workers = psutil.Process(first.pid).children(recursive=True)
    workers[-1].kill()
    first.communicate()
    assert first.returncode != 0
    done = whole_ones(out, expected)
    processes = Forked.together(lambda: main(command(models, source, out)), 2, tmp_path)
    for process in processes:
        assert process.wait() == 0, process.text
    assert names(out) == expected
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert f"{len(done)} of 7 are done already" in processes[0].text


@pytest.mark.slow
@pytest.mark.parametrize(("good", "bad", "shares"), [(1, 0, [1]), (3, 4, [3, 4])])
def test_two_processes_share_a_folder(models, tmp_path, good, bad, shares):
    """Every picture is in one process's share alone, a single one, too; bad ones of any share are reported."""
    source, out = tmp_path / "in", tmp_path / "out"
    expected = write_photos(source, good)
    for i in range(bad):
        (source / f"{'az'[i % 2]}_bad_{i}.png").write_bytes(b"")
    processes = Forked.together(lambda: main(command(models, source, out)), 2, tmp_path)
    statuses, report = [process.wait() for process in processes], "".join(process.text for process in processes)
    assert names(out) == expected
    assert any(statuses) == bool(bad) and (not bad or f"{bad} of {good + bad} failed" in report)
    bars = re.findall(r"100%.*? (\d+)/\1 ", report)
    assert sorted(map(int, set(bars))) == shares, report


@pytest.mark.parametrize("name", ["osediff.pkl", "predictor.pth"])
def test_convert_and_info(models, tmp_path, capsys, name):
    target = tmp_path / "new.safetensors"
    assert main(["convert", str(models / name), "-o", str(target)]) == 0
    assert names(tmp_path) == ["new.safetensors"]
    capsys.readouterr()
    assert main(["info", str(models / name), str(target)]) == 0
    report = capsys.readouterr().out
    kind = "an OSEDiff adapter" if name == "osediff.pkl" else "an InvSR noise predictor"
    assert report.count(kind) == 2 and report.count("fits:") == 2
    assert ("rank: 4 on the UNet" in report) == (name == "osediff.pkl")
    assert main(["convert", str(models / name), "-o", str(target)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_converted_weights_give_the_same(models, tmp_path):
    photo().save(tmp_path / "in.png")
    for method, name in (("osediff", "osediff.pkl"), ("invsr", "predictor.pth")):
        target = tmp_path / f"{method}.safetensors"
        assert main(["convert", str(models / name), "-o", str(target)]) == 0
        pictures = []
        for weights in (models / name, target):
            result = tmp_path / f"{method}_{weights.suffix[1:]}.png"
            words = [
                "upscale",
                tmp_path / "in.png",
                "-o",
                result,
                "--method",
                method,
                "--base",
                models / "base",
                "--weights",
                weights,
                "--device",
                "cpu",
            ]
            assert main([str(word) for word in words]) == 0
            pictures.append(np.asarray(Image.open(result)))
        assert np.array_equal(*pictures)


@pytest.mark.slow
def test_converted_weights_in_the_nodes(comfy, models):
    for folder, name in (("osediff", "osediff.pkl"), ("invsr", "predictor.pth")):
        assert main(["convert", str(models / name), "-o", str(comfy.folder(folder) / "converted.safetensors"), "--overwrite"]) == 0
        shutil.copy(models / name, comfy.folder(folder) / f"original_{name}")
    states = []
    for name in ("original_osediff.pkl", "converted.safetensors"):
        model, vae = comfy.run("OSEDiffLoader", model=toys.comfy_model(3), vae=toys.comfy_vae(3), osediff_name=name).args
        states.append((model.patches, vae.patcher.patches))
    assert states[0][0].keys() == states[1][0].keys() and states[0][1].keys() == states[1][1].keys()
    predictors = [comfy.run("InvSRNoisePredictorLoader", noise_predictor_name=n)[0] for n in ("original_predictor.pth", "converted.safetensors")]
    first, second = (p.patcher.model.state_dict() for p in predictors)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_processes_that_do_not_find_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_joined(2, "Leave out --device.")
    with pytest.raises(RuntimeError, match="processes: the launcher started 2, but accelerate sees 1\\. Leave out --device."):
        require_joined(1, "Leave out --device.")


def test_convert_refuses(tmp_path, capsys):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert main(["convert", str(tmp_path / "other.pth")]) == 2
    assert "expected an OSEDiff adapter" in capsys.readouterr().err
    assert names(tmp_path) == ["other.pth"]


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["upscale", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "continues where it stopped" in text and "python -m pipelines info RESULT" in text
    groups = [line[:-1] for line in text.splitlines() if re.fullmatch("[a-z ]+:", line)]
    assert groups[2:] == ["method", "size of the results", "options of single methods", "weights", "machine", "files", "video", "examples"]


def test_the_exit_statuses_are_told(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for status in ("0", "1", "2", "130"):
        assert re.search(rf"\b{status} [a-z]", text) and f"| {status} |" in page


@pytest.mark.parametrize(
    ("words", "size", "name"),
    [
        (["--long-side", 63], (63, 48), "photo_long63.png"),
        pytest.param(["--short-side", 40], (52, 40), "photo_short40.png", marks=pytest.mark.slow),
        (["--megapixels", 0.004], (74, 57), "photo_0.004mp.png"),
        pytest.param(["--long-side", 10], (10, 8), "photo_long10.png", marks=pytest.mark.slow),
    ],
)
def test_sizes_as_people_think_of_them(models, tmp_path, capsys, words, size, name):
    """In place of a factor; for smaller results too. The name and the record say which."""
    photo().save(tmp_path / "photo.png")
    fixed = ["--method", "osediff", "--base", models / "base", "--weights", models / "osediff.pkl", "--device", "cpu", "--prompt", "cat"]
    run = ["upscale", *map(str, [tmp_path / "photo.png", *fixed, *words])]
    assert main(run) == 0
    assert f"{tmp_path / name}: {size[0]} x {size[1]} pixels" in (out := capsys.readouterr().out) and out.rstrip().endswith("by OSEDiff")
    with Image.open(tmp_path / name) as result:
        assert result.size == size
    assert main(["info", str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    assert "restored by this program" in told and f"{words[0][2:].replace('-', '_')}: {words[1]}" in told
    assert "method: osediff" in told and "prompt: cat" in told and "scale:" not in told


@pytest.mark.slow
def test_a_size_is_known_again(models, tmp_path):
    """What is done by a size is not done again; by another it is."""
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in" / "photo.png")
    fixed = ["--method", "osediff", "--base", models / "base", "--weights", models / "osediff.pkl", "--device", "cpu", "--prompt", "cat"]
    run = ["upscale", *map(str, [tmp_path / "in", "-o", tmp_path / "folder", *fixed])]
    result = tmp_path / "folder" / "photo.png"
    written = []
    for side in ("24", "24", "32"):
        assert main([*run, "--long-side", side]) == 0
        with Image.open(result) as image:
            written.append((result.stat().st_mtime_ns, image.size))
    assert written[0] == written[1] and [size for _, size in written[1:]] == [(24, 18), (32, 24)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--long-side", "0"], "--long-side: found 0, expected a number of pixels from 1 to 2147483647"),
        (["--megapixels", "nan"], "--megapixels: found nan, expected a finite number of more than 0"),
        (["--long-side", "5", "--scale", "2"], "argument --scale: not allowed with argument --long-side"),
    ],
)
def test_wrong_sizes_are_refused(tmp_path, capsys, words, message):
    photo().save(tmp_path / "photo.png")
    try:
        assert main(["upscale", str(tmp_path / "photo.png"), "--demo", *words]) == 2
    except SystemExit as ended:  # argparse
        assert ended.code == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["photo.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--semantic", "11"], "argument --semantic: found 11, expected a number from -10 to 10."),
        (["--pixel", "nan"], "argument --pixel: found nan, expected a number from -10 to 10."),
        (["--coeff-t", "12.5"], "argument --coeff-t: found 12.5, expected a whole number from 0 to 999."),
        (["--blur", "much"], "argument --blur: found much, expected a number from 0 to 1."),
        (["--timesteps", "x"], "argument --timesteps: timesteps: found"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (
            ["--method", "pisasr", "--cfg", "2"],
            "--cfg: found 2, expected 1: PiSA-SR has no negative prompt. Leave it out, and say with --pixel and --semantic how",
        ),
        (["--method", "hypir", "--cfg", "0"], "--cfg: found 0, expected 1: HYPIR has no negative prompt. Leave it out, and say with --coeff-t how"),
    ],
)
def test_wrong_values_are_refused_in_words_before_anything_is_loaded(tmp_path, capsys, words, message):
    photo().save(tmp_path / "photo.png")
    try:
        assert main(["upscale", str(tmp_path / "photo.png"), *words]) == 2
    except SystemExit as ended:  # argparse
        assert ended.code == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["photo.png"]


def test_success_says_what_it_wrote(models, tmp_path, capsys):
    written = write_photos(tmp_path / "in", 2)
    assert upscale(models, tmp_path / "in", "-o", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert f"2 images written to {tmp_path / 'out'} by OSEDiff" in out and out.rstrip().endswith(f"({', '.join(written)})")


@pytest.mark.slow
def test_a_training_of_the_miniature_is_used_as_the_docs_say(tmp_path, monkeypatch, capsys):
    """The two commands of docs/training.md, with fewer steps."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    train, use = (
        line.split()[3:] for line in text.splitlines() if "--base miniature --data tests" in line or "--demo --method osediff --weights" in line
    )
    run = tmp_path / "run"
    train = [str(run) if word == "run" else "1" if before == "--steps" else word for before, word in zip(["", *train], train, strict=False)]
    use = [word.replace("run/", f"{run}/") for word in use]
    monkeypatch.chdir(ROOT)
    assert main(train) == 0
    assert main(use) == 0
    assert f"{run / 'restored.png'}: 448 x 300 pixels" in capsys.readouterr().out
    assert main([*use[:-4], "--weights", str(tmp_path / "none.safetensors"), *use[-2:]]) == 2
    assert "--weights: there is no file" in capsys.readouterr().err


def test_completion(capsys, monkeypatch):
    pytest.importorskip("shtab", reason="shtab is not installed (pip install shtab)")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert ended.value.code == 0
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    typed = "fewstep-sr upscale --long"
    ask = f'{script}\nCOMP_WORDS=({typed}); COMP_CWORD=2; COMP_LINE="{typed}"; _shtab_fewstep_sr; echo "${{COMPREPLY[@]}}"'
    assert subprocess.run(["bash"], input=ask, text=True, capture_output=True, check=False).stdout.split() == ["--long-side"]
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2 and "shtab is not installed. Install it: pip install shtab" in capsys.readouterr().err
