"""The miniature's workshop: synthetic pictures, the small VAE and UNet, packing, its commands; and that the product does without it."""

import ast
import io
import json
import logging
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL

from fewstep_sr.methods import METHODS
from pipelines.cli import main as pipelines_main
from pipelines.demo import load_demo
from tools.miniature import photos
from tools.miniature.autoencoder import AutoencoderTask, TextureOptions, normalize_latents, small_vae
from tools.miniature.base_unet import BaseUNetTask, small_unet
from tools.miniature.cli import main
from tools.miniature.restored import RestoredLatents
from tools.miniature.synthetic import draw_picture


def test_a_seed_draws_one_picture():
    first, again, other = (np.asarray(draw_picture(48, seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 48, 3) and first.std() > 5
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_normalized_latents_have_deviation_one_and_reconstruct_the_same():
    torch.manual_seed(0)
    vae = small_vae().eval()
    torch.nn.init.normal_(vae.quant_conv.bias)
    pictures = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample
        normalize_latents(vae, pictures)
        posterior = vae.encode(pictures * 2 - 1).latent_dist
        latents = posterior.mean * vae.config.scaling_factor
        assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert (vae.decode(posterior.mode()).sample - before).norm() < 1e-3 * before.norm()


def test_decoder_only_leaves_the_encoder():
    vae = small_vae()
    task = AutoencoderTask(vae, torch.rand(1, 3, 32, 32), decoder_only=True)
    loss, _ = task.loss("autoencoder", {"hq": torch.rand(2, 3, 32, 32)}, torch.Generator().manual_seed(0))
    loss.backward()
    learned = {name.split(".")[0] for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert learned == {"decoder", "post_quant_conv"}


def test_a_decoder_learns_from_a_discriminator_and_from_restored_latents():
    """The discriminator learns alone at first; each phase's gradients are its own; the last half of a batch is decoded from what the methods made of it."""
    torch.manual_seed(0)
    restored, asked = torch.randn(1, 4, 4, 4), []

    def restore(lq, number, generator):
        asked.append((lq, number.tolist()))
        return restored * vae.config.scaling_factor

    vae, options = (
        small_vae(),
        TextureOptions(texture=0.1, structure=0.1, adversarial=0.1, adversarial_from=2, discriminator_channels=(8, 16), restored=0.5),
    )
    task = AutoencoderTask(vae, torch.empty(0), decoder_only=True, options=options, restore=restore)
    batch = {"hq": torch.rand(2, 3, 32, 32), "lq": torch.rand(2, 3, 8, 8), "number": torch.tensor([3, 4])}
    for step in (1, 2):
        task.begin_step(step)
        loss, figures = task.loss("autoencoder", batch, torch.Generator().manual_seed(0))
        assert {"texture", "structure"} <= figures.keys() and ("adversarial" in figures) == (step == 2)
        loss.backward()
    assert all(torch.equal(lq, batch["lq"][1:]) and numbers == [4] for lq, numbers in asked) and len(asked) == 2
    real, fake = task._seen
    assert torch.equal(real, batch["hq"] * 2 - 1) and torch.allclose(fake[1:], vae.decode(restored).sample, atol=1e-5)
    assert not torch.allclose(fake[:1], vae.decode(restored).sample, atol=1e-2)
    assert all(parameter.grad is None for parameter in (*task.discriminator.parameters(), *vae.encoder.parameters()))
    before = vae.decoder.conv_out.weight.grad.clone()
    assert before.abs().sum() > 0
    loss, figures = task.loss("discriminator", batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert set(figures) == {"real", "fake"} and torch.equal(vae.decoder.conv_out.weight.grad, before)
    assert all(parameter.grad is not None for parameter in task.discriminator.parameters())
    assert task.settings()["restored"] == 0.5 and AutoencoderTask(small_vae(), torch.empty(0)).settings() == {}


@pytest.mark.slow
def test_restored_latents_are_the_methods():
    """By OSEDiff and InvSR in turns, what their pipelines decode; samples that come again are not restored again."""
    restore, lq = RestoredLatents(load_demo()[0].vae), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = restore(lq, torch.tensor([6, 3]), torch.Generator().manual_seed(1))
    for row, method in enumerate(("osediff", "invsr")):
        pipeline, embeds = load_demo(method)
        call = METHODS[method].demo.call | {
            "prompt_embeds": embeds,
            "generator": torch.Generator().manual_seed(1),
            "color_fix": None,
            "output_type": "pt",
        }
        decoded = pipeline.decode(found[row : row + 1])
        assert torch.allclose(decoded, pipeline(lq[row : row + 1], **call).images, atol=1e-4), method
    again = restore(torch.zeros_like(lq), torch.tensor([3, 6]), torch.Generator().manual_seed(2))
    assert torch.equal(again, found.flip(0))
    assert not torch.allclose(restore(lq, None, torch.Generator().manual_seed(2))[1], found[1])  # another noise map


def test_photos_have_authors_and_free_licences_and_none_is_held_out():
    listed = json.loads(photos.PHOTOS.read_text(encoding="utf-8"))
    assert len(listed) >= 150 and len({(photo["source"], photo["path"]) for photo in listed}) == len(listed)
    for photo in listed:
        assert photo["author"] and re.fullmatch(r"public-domain|CC0-1\.0|CC-BY(-SA)?-[234]\.[05]", photo["licence"]), photo
        assert not re.search("chelsea|coffee|astronaut", photo["path"]), photo


def test_photos_of_a_cache(tmp_path, monkeypatch, caplog):
    """A wheel's photo as it is, a repository's in two scales, one of a Qt resource file; what a source lacks is named."""
    listed = [
        {"source": "scikit-image", "path": "skimage/data/a.png", "author": "A", "licence": "CC0-1.0"},
        {"source": "scikit-image", "path": "skimage/data/missing.png", "author": "A", "licence": "CC0-1.0"},
        {"source": "scikit-image", "path": "skimage/data/script.png", "author": "A", "licence": "CC0-1.0"},
        {"source": "pop-wallpapers", "path": "original/b.jpg", "author": "B", "licence": "CC0-1.0"},
        {"source": "gcompris-qt-data", "path": "x.rcc:/f/c.jpg", "author": "C", "licence": "CC0-1.0"},
    ]
    (tmp_path / "photos.json").write_text(json.dumps(listed))
    monkeypatch.setattr(photos, "PHOTOS", tmp_path / "photos.json")
    for path, size in (("scikit-image/skimage/data/a.png", (90, 60)), ("pop-wallpapers/original/b.jpg", (2160, 2160))):
        (tmp_path / "cache" / path).parent.mkdir(parents=True)
        Image.new("RGB", size, "red").save(tmp_path / "cache" / path)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "cache" / "scikit-image/skimage/data/script.png").write_bytes(script)
    rcc = tmp_path / "cache" / "gcompris-qt-data/usr/share/gcompris-qt/rcc"
    rcc.mkdir(parents=True)
    (rcc / "x.rcc").write_bytes(resource_file("f", "c.jpg", jpeg_file((90, 60), orientation=6)))
    with caplog.at_level(logging.WARNING):
        assert photos.collect_photos(tmp_path / "out", tmp_path / "cache") == 3
    assert "scikit-image: can't read skimage/data/missing.png" in caplog.text
    assert "scikit-image: can't read skimage/data/script.png (cannot identify image file" in caplog.text
    sizes = {str(path.relative_to(tmp_path / "out")): Image.open(path).size for path in (tmp_path / "out").rglob("*.png")}
    assert sizes == {
        "scikit-image/data-a-0.png": (90, 60),
        "pop-wallpapers/original-b-0.png": (1080, 1080),
        "pop-wallpapers/original-b-1.png": (1024, 1024),
        "gcompris-qt-data/f-c-0.png": (40, 60),
    }
    (rcc / "x.rcc").write_bytes(b"PK\3\4")
    with pytest.raises(RuntimeError, match="found a file that begins with b'PK"):
        photos.read_resources(rcc / "x.rcc")


@pytest.mark.slow
def test_a_picture_of_held_out_photos(tmp_path):
    photo = ROOT / "tests" / "data" / "photos" / "chelsea.png"
    Image.open(photo).crop((0, 0, 70, 64)).save(tmp_path / "photo.png")
    assert main(["picture", str(tmp_path / "photo.png"), str(photo), "-o", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (64 + 256, 4 * 320, 3) and np.array_equal(sheet[64:, 960:], np.asarray(Image.open(photo).convert("RGB")))


def test_a_sheet_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.miniature.picture.load_demo", None)  # is not reached
    Image.new("RGB", (70, 63)).save(tmp_path / "small.png")
    Image.new("RGB", (70, 64)).save(tmp_path / "photo.png")
    for photo, output, words in (
        ("small.png", "sheet.png", "small.png: found 70 x 63 pixels, expected 64 a side at least"),
        ("photo.png", "sheet.xyz", "-o: found sheet.xyz, expected a name that ends in .png"),
        ("photo.png", "photo.png/sheet.png", "a file is where a folder is needed"),
    ):
        assert main(["picture", str(tmp_path / photo), "-o", str(tmp_path / output)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("command", "options"), [
    ("synthesize", {"--count": ["0", "-1", "x"], "--size": ["0", "63", "99999"], "--seed": ["-1"]}),
    ("vae", {"--channels": ["0", "-8", "12"], "--kl-weight": ["-1", "nan", "inf"]}),
    ("base", {"--channels": ["0", "48"], "--width": ["0", "-4"]}),
    ("picture", {"--mild-degradation": ["nan", "-0.1", "1.1"], "--seed": ["-1"]}),
])  # fmt: skip
def test_ranges_are_refused_at_once(tmp_path, capsys, command, options):
    needed = {
        "synthesize": [],
        "picture": ["photo.png"],
        "vae": ["--data", "x", "--steps", "1"],
        "base": ["--data", "x", "--steps", "1", "--vae", "x"],
    }
    for option, values in options.items():
        for value in values:
            with pytest.raises(SystemExit) as exit:
                main([command, *needed[command], "-o", str(tmp_path / "out"), f"{option}={value}"])
            error = capsys.readouterr().err
            assert exit.value.code == 2 and f"argument {option}: found '{value}', expected" in error, (option, value)


def resource_file(folder: str, name: str, content: bytes) -> bytes:
    """Qt's binary resource format, version 1, with one file in one folder."""
    names = b"".join(struct.pack(">HI", len(text), 0) + text.encode("utf-16-be") for text in (folder, name))
    second = 6 + 2 * len(folder)
    nodes = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", 0, 2, 1, 2) + struct.pack(">IHHHI", second, 0, 0, 0, 0)
    data = struct.pack(">I", len(content)) + content
    return b"qres" + struct.pack(">IIII", 1, 20, 20 + len(nodes), 20 + len(nodes) + len(data)) + nodes + data + names


def jpeg_file(size: tuple[int, int], orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "blue").save(file, format="JPEG", exif=exif)
    return file.getvalue()


def test_low_timesteps_are_drawn_more_often():
    seen = []

    class Phase(torch.nn.Conv2d):  # with weights, whose precision is asked for
        def forward(self, latents, timesteps, encoder_hidden_states):
            seen.append(timesteps)
            return SimpleNamespace(sample=latents)

    for low in (False, True):
        task = BaseUNetTask(small_unet((32, 32, 32)), small_vae(), torch.zeros(1, 8, 64), low)
        task.phases["unet"] = Phase(4, 4, 1)
        task.loss("unet", {"hq": torch.rand(64, 3, 8, 8)}, torch.Generator().manual_seed(0))
    assert 400 < seen[0].float().mean() < 600 and 250 < seen[1].float().mean() < 400 and seen[1].max() < 1000


@pytest.mark.slow
def test_synthesize_vae_base_pack(tmp_path):
    folder = tmp_path / "pictures"
    assert main(["synthesize", "-o", str(folder), "--count", "3", "--size", "96"]) == 0
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    common = ["--data", str(folder), "--patch", "32", "--batch", "2", "--threads", "1", "--save-every", "2"]
    assert main(["vae", *common, "-o", str(tmp_path / "vae"), "--steps", "3", "--optimizer", "muon"]) == 0
    texture = ["--decoder-only", "--texture-weight", "0.1", "--adversarial-weight", "0.1", "--discriminator-channels", "8", "16"]
    again = ["vae", *common, "-o", str(tmp_path / "decoder"), "--init", str(ROOT / "miniature" / "vae"), *texture]
    assert main([*again, "--restored", "0.5", "--patch", "64", "--mild-degradation", "0.5", "--crops", "2", "--steps", "1"]) == 0
    first, second = (AutoencoderKL.from_pretrained(folder) for folder in (ROOT / "miniature" / "vae", tmp_path / "decoder" / "vae"))
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(first.encoder.conv_in.weight.float(), second.encoder.conv_in.weight)
    assert not torch.equal(first.float().decode(latents).sample, second.decode(latents).sample)
    assert (
        main(["base", *common, "-o", str(tmp_path / "base"), "--steps", "3", "--vae", str(tmp_path / "vae" / "vae"), "--channels", "32", "64"]) == 0
    )
    for name in ("unet", "vae", "scheduler", "prompt_embeds.safetensors", "samples/0000003.png"):
        assert (tmp_path / "base" / name).exists(), name
    assert main(["base", *common, "-o", str(tmp_path / "base"), "--steps", "3", "--vae", str(tmp_path / "vae" / "vae")]) == 2
    again = ["--init", str(tmp_path / "base"), "--lr", "1e-30", "--low-timesteps"]
    assert main(["base", *common, "-o", str(tmp_path / "base2"), "--steps", "1", "--vae", str(tmp_path / "vae" / "vae"), *again]) == 0
    for name in ("unet/diffusion_pytorch_model.safetensors", "prompt_embeds.safetensors"):
        first, second = (load_file(tmp_path / run / name) for run in ("base", "base2"))
        assert all(torch.allclose(first[key], second[key]) for key in first)
    assert main(["pack", "--base", str(tmp_path / "base"), "-o", str(tmp_path / "packed")]) == 0
    packed = load_file(tmp_path / "packed" / "prompt_embeds.safetensors")
    assert packed["prompt_embeds"].dtype == torch.float16
    assert all(str(tmp_path) not in (tmp_path / "packed" / name / "config.json").read_text() for name in ("unet", "vae"))


def test_old_commands_say_where_they_went(capfd):
    """Status 2 and the command to type, whatever options follow."""
    for old, new in ((["synthesize"], "synthesize"), (["train", "vae"], "vae"), (["train", "base"], "base"), (["train", "pack"], "pack")):
        for rest, tail in (([], ""), (["-o", "my run", "--steps", "3"], " -o 'my run' --steps 3")):
            assert pipelines_main([*old, *rest]) == 2
            found = capfd.readouterr().err
            assert f"'{' '.join(old)}'" in found and found.endswith(f"python -m tools.miniature {new}{tail}\n")


def test_restored_latents_are_for_the_miniatures_encoder_alone(tmp_path, capfd):
    """Refused before anything is read or written: another encoder, one that learns, a patch that the methods would pad."""
    draw_picture(64, 0).save(tmp_path / "picture.png")
    common = ["vae", "--data", str(tmp_path / "picture.png"), "-o", str(tmp_path / "out"), "--steps", "1", "--restored", "0.5"]
    own = ["--init", str(ROOT / "miniature" / "vae")]
    wrong = {
        "--restored: found a share without --decoder-only": ["--patch", "64", *own],
        "--patch: found 72, expected a multiple of 64": ["--patch", "72", "--decoder-only", *own],
        "--init: found a VAE with another encoder": ["--patch", "64", "--decoder-only"],
    }
    for message, arguments in wrong.items():
        assert main([*common, *arguments]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "tools.miniature", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "synthesize" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["pipelines", "fewstep_sr", "nodes"])
def test_the_product_imports_nothing_of_the_tools(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in [*files, ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
            )
            assert not any("tools" in name.split(".") or "tests" in name.split(".") for name in names), f"{path}, line {node.lineno}"
