"""The tagger without ComfyUI: golden logits, files, tags, errors in words."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tagger_toys import DAPE, NAMES, golden_picture, golden_tags, tagger_state_dict, write_ram, write_vocabulary
from toys import golden, picture, relative_error

from fewstep_sr.methods.osediff import prompt_of
from fewstep_sr.networks.ram import Tagger, TaggerConfig, prepare_picture
from fewstep_sr.networks.swin import SwinConfig, SwinTransformer
from fewstep_sr.networks.vocabulary import TagVocabulary
from fewstep_sr.weights.tagger import add_dape, by_preference, convert_tagger, load_tagger_weights

TOLERANCE = 1e-4
CASES = {"ram": None, "dape": DAPE}


@pytest.fixture(scope="module")
def ram(tmp_path_factory):
    return write_ram(tmp_path_factory.mktemp("dape"))


@torch.inference_mode()
def run(weights, image=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and logits."""
    network = Tagger(weights.config, dtype=next(iter(weights.state_dict.values())).dtype).eval()
    network.load_state_dict(weights.state_dict)
    seen = prepare_picture((golden_picture() if image is None else image).movedim(-1, 1), weights.config.image_size)
    seen = seen.to(network.label_embed.dtype)
    return network.image_embeds(seen), network(seen)


@pytest.mark.parametrize("case", CASES)
def test_golden(ram, case):
    _, arrays = golden("tagger")
    weights = load_tagger_weights(ram, CASES[case])
    embeds, logits = run(weights)
    assert relative_error(embeds, arrays[f"{case}_image_embeds"]) < TOLERANCE
    assert relative_error(logits, arrays[f"{case}_logits"]) < TOLERANCE
    assert weights.vocabulary.tags(logits) == [golden_tags(case)]


def test_older_names(tmp_path):
    """RAM's own loader knows the tagging head under another name, too."""
    renamed = {k.replace("tagging_head.", "vision_multi."): w for k, w in tagger_state_dict().items()}
    _, logits = run(load_tagger_weights(write_ram(tmp_path, renamed)))
    assert relative_error(logits, golden("tagger")[1]["ram_logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_compact_file(ram, tmp_path, case):
    """One file is enough: fp16 weights, DAPE merged, tags in the metadata."""
    output = tmp_path / "tagger.safetensors"
    convert_tagger(ram, output, CASES[case])
    assert [file.name for file in tmp_path.iterdir()] == [output.name]
    weights = load_tagger_weights(output)
    assert {w.dtype for w in weights.state_dict.values()} == {torch.float16}
    assert weights.dape == (DAPE.name if CASES[case] else None)
    assert weights.vocabulary == load_tagger_weights(ram).vocabulary
    arrays = golden("tagger")[1]
    in_float = replace(weights, state_dict={k: w.float() for k, w in weights.state_dict.items()})
    assert relative_error(run(in_float)[1], arrays[f"{case}_logits"]) < 2e-3  # what rounding the weights to fp16 costs
    assert relative_error(run(weights)[1].float(), arrays[f"{case}_logits"]) < 1e-2  # and computing in it


def test_compact_file_in_full_precision(ram, tmp_path):
    convert_tagger(ram, tmp_path / "tagger.safetensors", DAPE, dtype=torch.float32)
    _, logits = run(load_tagger_weights(tmp_path / "tagger.safetensors"))
    assert relative_error(logits, golden("tagger")[1]["dape_logits"]) < TOLERANCE


def test_convert_loses_nothing(ram, tmp_path):
    output = tmp_path / "tagger.safetensors"
    convert_tagger(ram, output)
    written = output.read_bytes()
    with pytest.raises(FileExistsError, match=r"tagger\.safetensors exists"):
        convert_tagger(ram, output, DAPE)
    assert output.read_bytes() == written
    convert_tagger(ram, output, DAPE, overwrite=True)
    assert load_tagger_weights(output).dape == DAPE.name
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        convert_tagger(ram, tmp_path / "tagger.pth")
    large = {**tagger_state_dict(), "fc.bias": torch.tensor([1e6])}
    with pytest.raises(ValueError, match=r"fc\.bias holds values that are not finite in float16"):
        convert_tagger(write_ram(tmp_path, large), tmp_path / "other.safetensors")
    assert not list(tmp_path.glob("other*"))


def test_dape_is_added_once(ram, tmp_path):
    plain = load_tagger_weights(ram)
    before = {k: w.clone() for k, w in plain.state_dict.items()}
    merged = add_dape(plain, DAPE)
    assert all(torch.equal(plain.state_dict[k], before[k]) for k in before)
    changed = {k for k in before if not torch.equal(merged.state_dict[k], before[k])}
    assert changed == {f"{k.rpartition('.')[0]}.weight" for k in torch.load(DAPE, weights_only=True)}
    with pytest.raises(ValueError, match=r"the tagger file already holds tagger_dape\.pth"):
        add_dape(merged, DAPE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_unused_parts_are_not_read(tmp_path):
    """The published file is mostly weights for captions and an optimizer's state."""
    state = {"model": tagger_state_dict() | {"text_decoder.weight": torch.ones(64, 2**20)}, "optimizer": torch.ones(64, 2**20)}
    torch.save(state, tmp_path / "ram.pth")
    write_vocabulary(tmp_path)
    code = (
        "import resource, sys; from fewstep_sr.weights.tagger import load_tagger_weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        "before = peak(); load_tagger_weights(sys.argv[1]); print(peak() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, tmp_path / "ram.pth"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "ram.pth").stat().st_size > 512 * 2**20
    assert int(grown.stdout) < 100 * 2**20


def test_tags():
    vocabulary = TagVocabulary(("cat", "Dog", "old house", "tree"), (0.5, 0.5, 0.9, 0.6))
    logits = torch.tensor([[0.7, 0.3, 0.8, 0.65], [0.1, 0.6, 0.95, 0.1]]).logit()
    assert vocabulary.tags(logits) == [["cat", "tree"], ["Dog", "old house"]]
    assert vocabulary.tags(logits, offset=-0.2) == [["cat", "old house", "tree"], ["Dog", "old house"]]
    assert vocabulary.tags(logits, offset=0.08) == [["cat"], ["Dog"]]
    assert vocabulary.tags(logits, offset=-0.5, max_tags=2) == [["cat", "old house"], ["Dog", "old house"]]  # the most probable, in order
    assert vocabulary.tags(logits, offset=-0.2, max_tags=2, exclude=["CAT ", "", "nothing"]) == [["old house", "tree"], ["Dog", "old house"]]
    assert vocabulary.tags(logits.half())[0] == ["cat", "tree"]
    assert vocabulary.tags(torch.full((1, 4), -9.0)) == [[]]


def test_prompt():
    assert prompt_of(["cat", "old house"], "sharp") == "cat, old house, sharp,"
    assert prompt_of(["cat"]) == "cat, ,"


def test_compact_files_come_first():
    assert by_preference(["DAPE.pth", "ram_swin_large_14m.pth", "tagger.safetensors"]) == ["tagger.safetensors", "ram_swin_large_14m.pth", "DAPE.pth"]


def test_prepare_picture():
    grey = prepare_picture(torch.full((1, 3, 40, 30), 0.5), 96)
    assert grey.shape == (1, 3, 96, 96)
    assert grey[0, :, 5, 5].tolist() == pytest.approx([0.015 / 0.229, 0.044 / 0.224, 0.094 / 0.225], rel=1e-5)
    white = prepare_picture(torch.full((1, 3, 96, 96), 1.5), 96)  # enlargement overshoots
    assert torch.equal(white, prepare_picture(torch.ones(1, 3, 96, 96), 96))


def without(state_dict, key):
    return {k: w for k, w in state_dict.items() if k != key}


def test_missing_text_files(ram, tmp_path):
    lonely = tmp_path / "ram.pth"
    lonely.write_bytes(ram.read_bytes())
    with pytest.raises(FileNotFoundError, match=rf"ram_tag_list\.txt is missing: put it next to the weights, in {tmp_path}"):
        load_tagger_weights(lonely)
    (tmp_path / "ram_tag_list.txt").write_text("cat")
    with pytest.raises(FileNotFoundError, match=r"ram_tag_list_threshold\.txt is missing"):
        load_tagger_weights(lonely)


@pytest.mark.parametrize(
    ("names", "thresholds", "message"),
    [
        (["cat", "dog"], [0.5], r"has 2 lines and ram_tag_list_threshold\.txt 1, expected as many"),
        (["cat", "dog"], [0.5, "many"], r"line 2 is 'many', expected a number"),
        (["cat", "dog"], [0.5, 0.5], r"found 4585 label embeddings, but 2 tag names"),
    ],
)
def test_wrong_text_files(tmp_path, names, thresholds, message):
    path = write_ram(tmp_path, names=names, thresholds=thresholds)
    with pytest.raises(ValueError, match=message):
        load_tagger_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.load(DAPE, weights_only=True), "found DAPE's LoRA weights for the RAM tagger; expected RAM's tagger"),
        ({"model": {**tagger_state_dict(), "reweight_scale": torch.ones(())}}, r"found RAM\+\+, another tagger"),
        ({"model": {"visual_encoder.patch_embed.proj.weight": torch.ones(2, 2), "label_embed.weight": torch.ones(2, 2)}}, "found Tag2Text"),
        ({"model": without(tagger_state_dict(), "fc.bias")}, r"ram\.pth: the tensor 'fc\.bias' is missing"),
        ({"model": without(tagger_state_dict(), "wordvec_proj.weight")}, r"ram\.pth: the tensor 'wordvec_proj\.weight' is missing"),
        ({"model": {**tagger_state_dict(), "fc.weight": torch.ones(2, 64)}}, r"fc\.weight has shape \(2, 64\), expected \(1, 64\)"),
    ],
)
def test_wrong_tagger(tmp_path, content, message):
    torch.save(content, tmp_path / "ram.pth")
    write_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tagger_weights(tmp_path / "ram.pth")


QKV = "visual_encoder.layers.0.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": tagger_state_dict()}, r"found an image tagger \(RAM or DAPE\); expected DAPE's LoRA weights"),
        ({f"{QKV}.lora_A": torch.ones(16, 24)}, "has but one of lora_A and lora_B"),
        ({f"{QKV}.lora_A": torch.ones(8, 24), f"{QKV}.lora_B": torch.ones(48, 8)}, "expected one rank in both"),
        (
            {f"{QKV}.lora_A": torch.ones(16, 48), f"{QKV}.lora_B": torch.ones(96, 8)},
            r"for a weight of \(144, 48\), but the tagger has a weight of \(72, 24\)",
        ),
        ({"tagging_head.no.lora_A": torch.ones(8, 24), "tagging_head.no.lora_B": torch.ones(48, 8)}, "the tagger has no such layer"),
    ],
)
def test_wrong_dape(ram, tmp_path, content, message):
    torch.save(content, tmp_path / "DAPE.pth")
    with pytest.raises(ValueError, match=message):
        load_tagger_weights(ram, tmp_path / "DAPE.pth")


def test_wrong_size():
    network = Tagger(TaggerConfig(SwinConfig(8, (1, 1), (1, 1), 3)), device="meta")
    with pytest.raises(ValueError, match="found 32 x 32 pixels, expected 24 x 24"):
        network(torch.zeros(1, 3, 32, 32, device="meta"))


def torchvision_swin(config: SwinConfig, state_dict: dict) -> torch.nn.Module:
    """torchvision's Swin Transformer with our weights."""
    torchvision = pytest.importorskip("torchvision")
    window = [config.window_size] * 2
    network = torchvision.models.SwinTransformer([4, 4], config.embed_dim, list(config.depths), list(config.num_heads), window, num_classes=1)
    names = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2", "norm": "norm"}
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            ours, theirs = f"layers.{i}.blocks.{j}", f"features.{2 * i + 1}.{j}"
            names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("norm1", "norm2", "attn", "attn.qkv", "attn.proj")}
            names |= {f"{ours}.mlp.fc1": f"{theirs}.mlp.0", f"{ours}.mlp.fc2": f"{theirs}.mlp.3"}
        names |= {f"layers.{i}.downsample.{part}": f"features.{2 * i + 2}.{part}" for part in ("norm", "reduction")}
    renamed = {}
    for key, weight in state_dict.items():
        layer, _, kind = key.rpartition(".")
        renamed[f"{names[layer]}.{kind}"] = weight
    missing = network.load_state_dict(renamed, strict=False).missing_keys
    assert all("relative_position_index" in key or key.startswith("head.") for key in missing)
    return network.eval()


def assert_same_as_torchvision(network: SwinTransformer, config: SwinConfig):
    image = picture(1, config.image_size, config.image_size).movedim(-1, 1)
    reference = torchvision_swin(config, network.state_dict())
    with torch.inference_mode():
        expected = reference.norm(reference.features(image)).flatten(1, 2)
        found = network(image)
    assert relative_error(found[:, 1:], expected) < TOLERANCE
    assert relative_error(found[:, 0], expected.mean(dim=1)) < TOLERANCE


def test_same_as_torchvisions_swin():
    config = SwinConfig(embed_dim=16, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=12)
    assert config.image_size == 384
    network = SwinTransformer(config).eval()
    network.load_state_dict(tagger_state_dict({k: v.shape for k, v in network.state_dict().items()}))
    assert_same_as_torchvision(network, config)


@pytest.mark.skipif(os.environ.get("FEWSTEP_SR_FULL") != "1", reason="the full-size Swin-L: takes half a minute and 4 GB; set FEWSTEP_SR_FULL=1")
def test_full_size(tmp_path):
    state_dict = tagger_state_dict({k: v.shape for k, v in Tagger(TaggerConfig(), device="meta").state_dict().items()})
    weights = load_tagger_weights(write_ram(tmp_path, state_dict))
    assert weights.config == TaggerConfig() and weights.config.image_size == 384
    network = Tagger(weights.config, device="meta").eval()
    network.load_state_dict(weights.state_dict, assign=True)
    with torch.inference_mode():
        logits = network(prepare_picture(picture(2, 128, 160).movedim(-1, 1), 384))
    assert logits.shape == (1, len(NAMES)) and torch.isfinite(logits).all() and logits.std() > 0.1
    assert_same_as_torchvision(network.visual_encoder, weights.config.swin)
