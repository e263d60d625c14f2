"""OSEDiff's prompts read off the pictures, headless."""

import shutil

import pipeline_toys
import pytest
import torch
import toys
from PIL import Image
from tagger_toys import DAPE, golden_picture, golden_tags, write_ram

from fewstep_sr.weights.tagger import convert_tagger
from pipelines import OSEDiffPipeline
from pipelines.cli import main
from pipelines.tagger import PromptTagger


@pytest.fixture(scope="module")
def ram(tmp_path_factory):
    return write_ram(tmp_path_factory.mktemp("ram"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("osediff")
    torch.save(toys.osediff_checkpoint(5, rank=4), folder / "osediff.pkl")
    pipeline = OSEDiffPipeline(**pipeline_toys.components(5, text=folder / "tokenizer"))
    pipeline.load_osediff(folder / "osediff.pkl")
    return pipeline


@pytest.mark.parametrize(("case", "dape"), [("ram", None), ("dape", DAPE)])
def test_golden_prompt(ram, case, dape):
    picture = golden_picture().movedim(-1, 1)
    tags = ", ".join(golden_tags(case))
    tagger = PromptTagger.from_files(ram, dape)
    assert tagger(picture) == [f"{tags}, ,"]
    assert tagger(picture.expand(2, -1, -1, -1), ["sharp", "old"]) == [f"{tags}, sharp,", f"{tags}, old,"]
    with pytest.raises(ValueError, match="found 3 texts, expected 1 or 1"):
        tagger(picture, ["a", "b", "c"])


def test_dape_beside_the_tagger_is_used_once(ram, tmp_path):
    for file in ram.parent.iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(DAPE, tmp_path / "DAPE.pth")
    prompt = [", ".join(golden_tags("dape")) + ", ,"]
    assert PromptTagger.from_files(tmp_path / ram.name)(golden_picture().movedim(-1, 1)) == prompt
    convert_tagger(ram, tmp_path / "tagger.safetensors", DAPE, dtype=torch.float32)
    assert PromptTagger.from_files(tmp_path / "tagger.safetensors")(golden_picture().movedim(-1, 1)) == prompt


@pytest.mark.slow
def test_pipeline_uses_the_tags(pipeline, ram):
    pictures = toys.picture(1, 16, 16, batch=2).movedim(-1, 1)
    settings = {"output_type": "pt", "prompt": "sharp"}
    plain = pipeline(pictures, **settings).images
    pipeline.load_tagger(ram)
    tagged = pipeline(pictures, **settings).images
    _, enlarged = pipeline.preprocess(pictures)
    prompts = pipeline.prompts(enlarged, "sharp")
    assert len(prompts) == 2 and all(prompt.endswith(", sharp,") for prompt in prompts)
    pipeline.unload_tagger()
    assert torch.equal(pipeline(pictures, output_type="pt", prompt=prompts).images, tagged)
    assert torch.equal(pipeline(pictures, **settings).images, plain) and not torch.equal(plain, tagged)


@pytest.mark.slow
def test_command_line(ram, tmp_path, capsys):
    OSEDiffPipeline(**pipeline_toys.components(3, tmp_path / "clip")).save_pretrained(tmp_path / "base")
    torch.save(toys.osediff_checkpoint(3, 4), tmp_path / "osediff.pkl")
    Image.fromarray((toys.picture(1, 16, 16)[0].numpy() * 255).astype("uint8")).save(tmp_path / "in.png")
    words = ["upscale", tmp_path / "in.png", "--base", tmp_path / "base", "--weights", tmp_path / "osediff.pkl", "--scale", 2, "--device", "cpu"]
    results = []
    for name, extra in (("plain", []), ("tagged", ["--tagger", ram, "--dape", DAPE])):
        assert main([str(word) for word in [*words, "-o", tmp_path / f"{name}.png", *extra]]) == 0
        results.append(Image.open(tmp_path / f"{name}.png"))
    assert results[0].size == results[1].size == (32, 32) and results[0].tobytes() != results[1].tobytes()
    assert main([str(word) for word in [*words, "-o", tmp_path / "x.png", "--method", "invsr", "--tagger", ram]]) == 2
    assert "expected --method osediff with a tagger" in capsys.readouterr().err


def test_convert_command(ram, tmp_path, capsys):
    """One compact file replaces the tagger's four; half precision may move tags that lie on their threshold."""
    compact = tmp_path / "tagger.safetensors"
    assert main(["convert", str(ram), "--dape", str(DAPE), "-o", str(compact)]) == 0
    (prompt,) = PromptTagger.from_files(compact)(golden_picture().movedim(-1, 1))
    assert len(set(prompt.split(", ")) ^ {*golden_tags("dape"), ","}) < 20
    assert main(["info", str(compact)]) == 0 and f"DAPE: {DAPE.name}" in capsys.readouterr().out
    assert main(["convert", str(ram), "-o", str(compact)]) == 2 and "exists" in capsys.readouterr().err
