"""Half-width decoders: read strictly, told apart, merged with a base's VAE into one file."""

import argparse
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toys
from toys import GOLDEN, golden

from fewstep_sr.methods import OSEDIFF, identify, load_weights
from fewstep_sr.weights.kinds import ADCSR_DECODER, CHECKPOINT, LIGHT_VAE, TAESD, VAE, VOSR_DECODER
from fewstep_sr.weights.light_decoder import read_light_decoder
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.vae import read_vae
from pipelines.files import convert, describe_file

FILES = {"adcsr": "lightdecoder_adcsr.ckpt", "vosr": "lightdecoder_vosr.pth"}
KINDS = {"adcsr": ADCSR_DECODER, "vosr": VOSR_DECODER}


def base(folder: Path, family: str) -> Path:
    path = folder / "base.safetensors"
    safetensors.torch.save_file(toys.vae_state_dict(golden(f"lightdecoder_{family}")[0]["seed"]), path)
    return path


@pytest.mark.parametrize("family", FILES)
def test_kinds(family):
    assert identify(read_weights(GOLDEN / FILES[family])[0]) == KINDS[family]
    text = describe_file(GOLDEN / FILES[family])
    assert "half-width decoder" in text and "32, 32, 32, 64 channels, 3 residual blocks a level" in text
    assert ("behind the base's post_quant_conv" in text) == (family == "adcsr") and ("behind no post_quant_conv" in text) == (family == "vosr")


@pytest.mark.parametrize("family", FILES)
def test_decoder_is_that_of_the_file(family):
    decoder = read_light_decoder(GOLDEN / FILES[family], KINDS[family])
    settings = golden(f"lightdecoder_{family}")[0]
    expected = toys.weights(settings["seed"], "lightdecoder", settings["keys"])
    assert decoder.state_dict.keys() == expected.keys() and all(torch.equal(decoder.state_dict[key], value) for key, value in expected.items())
    assert decoder.widths == (32, 32, 32, 64) and decoder.resnets == 3


@pytest.mark.parametrize("family", FILES)
def test_merged_with_the_base(tmp_path, family):
    path = base(tmp_path, family)
    said = convert(GOLDEN / FILES[family], tmp_path / "vae.safetensors", vae=path)
    assert "half-width decoder" in said
    merged, metadata = read_weights(tmp_path / "vae.safetensors")
    own = safetensors.torch.load_file(path)
    assert all(torch.equal(merged[key], own[key]) for key in own if key.startswith(("encoder.", "quant_conv.")))
    if family == "adcsr":  # the base's, and not the one that lies in the file
        assert torch.equal(merged["post_quant_conv.weight"], own["post_quant_conv.weight"])
        decoy = torch.load(GOLDEN / FILES[family], weights_only=True)["state_dict"]["post_quant_conv.weight"]
        assert not torch.allclose(merged["post_quant_conv.weight"], decoy, atol=0.01)
    else:
        assert torch.equal(merged["post_quant_conv.weight"].flatten(1), torch.eye(4)) and not merged["post_quant_conv.bias"].any()
    assert metadata["decoder"] in ("AdcSR", "VOSR") and "post_quant_conv: " in describe_file(tmp_path / "vae.safetensors")


def original_names(weights: dict) -> dict:
    """The same VAE as ComfyUI and the original code name it."""
    import comfy.diffusers_convert

    return comfy.diffusers_convert.convert_vae_state_dict(weights)


@pytest.mark.parametrize("form", ["vae", "lightning", "checkpoint", "folder", "vae folder", "bin", "old names"])
def test_bases(tmp_path, comfy, form):
    weights = toys.vae_state_dict(2)
    if form in ("folder", "vae folder", "bin"):
        folder = tmp_path / "base" / "vae"
        folder.mkdir(parents=True)
        if form == "bin":
            torch.save(weights, folder / "diffusion_pytorch_model.bin")
        else:
            safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        path = folder if form == "vae folder" else folder.parent
    elif form == "old names":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for key, value in weights.items():
            for new, name in old.items():
                key = key.replace(f"attentions.0.{new}", f"attentions.0.{name}")
            renamed[key] = value
        path = tmp_path / "old.safetensors"
        safetensors.torch.save_file(renamed, path)
    else:
        original = original_names(weights)
        if form == "checkpoint":
            original = {f"first_stage_model.{key}": value for key, value in original.items()} | {
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)
            }
        path = tmp_path / "base.ckpt"
        torch.save({"state_dict": original, "global_step": 3} if form == "lightning" else original, path)
        assert identify(read_weights(path)[0]).id == (CHECKPOINT if form == "checkpoint" else VAE).id
    found = read_vae(path)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], value) for key, value in weights.items())


def test_incomplete_bases_are_named(tmp_path):
    weights = toys.vae_state_dict(2)
    path = tmp_path / "base.safetensors"

    def fails(weights: dict, match: str) -> None:
        safetensors.torch.save_file(weights, path)
        with pytest.raises(ValueError, match=match):
            convert(GOLDEN / FILES["adcsr"], tmp_path / "out.safetensors", vae=path)
        assert not (tmp_path / "out.safetensors").exists()

    fails(
        {key: value for key, value in weights.items() if key != "quant_conv.bias"},
        r"base.safetensors: quant_conv.bias has no tensor, expected \(8,\)",
    )
    fails(
        weights | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, r"post_quant_conv.weight has shape \(16, 16, 1, 1\), expected \(4, 4, 1, 1\)"
    )
    fails(
        {key: value for key, value in weights.items() if "up_blocks.3" not in key},
        "found 3 levels in the VAE's decoder, expected Stable Diffusion's 4",
    )
    fails({"a": torch.zeros(1)}, "found no VAE, expected Stable Diffusion's")
    fails(weights | {"encoder.extra.weight": torch.zeros(1)}, "encoder.extra.weight is no part of Stable Diffusion's VAE")
    with pytest.raises(FileNotFoundError, match=r"found no diffusion_pytorch_model\.safetensors in this folder"):
        convert(GOLDEN / FILES["adcsr"], tmp_path / "out.safetensors", vae=tmp_path)


def test_incomplete_decoders_are_named(tmp_path):
    content = torch.load(GOLDEN / FILES["adcsr"], weights_only=True)
    del content["state_dict"]["decoder.mid_block.resnets.1.conv2.bias"]
    torch.save(content, tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=r"half.ckpt: decoder.mid_block.resnets.1.conv2.bias has no tensor, expected \(64,\)"):
        read_light_decoder(tmp_path / "half.ckpt", ADCSR_DECODER)
    content = torch.load(GOLDEN / FILES["vosr"], weights_only=True)
    content["model_state_dict"]["extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="decoder.extra is no part"):
        read_light_decoder(tmp_path / "half.pth", VOSR_DECODER)


def test_option_is_for_light_decoders_alone(tmp_path):
    with pytest.raises(ValueError, match="--vae: found AdcSR's half-width decoder for Stable Diffusion's VAE alone in .*, expected its base's VAE"):
        convert(GOLDEN / FILES["adcsr"], tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"--vae: found an OSEDiff adapter in osediff_square.pkl, expected AdcSR's or VOSR's decoder"):
        convert(GOLDEN / "osediff_square.pkl", tmp_path / "out.safetensors", vae=base(tmp_path, "adcsr"))


class Hyperparameters(dict):
    """A class of a framework's own for dictionaries, as Lightning's checkpoints hold one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.origin = "somewhere"


class RunsOnLoading:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_in_a_training_checkpoint_are_passed_over_unrun(tmp_path, legacy):
    """What the published checkpoint holds beside the decoder is not known, and its authors read it with a reader that runs it."""
    content = torch.load(GOLDEN / FILES["adcsr"], weights_only=True)
    content |= {
        "hyper_parameters": Hyperparameters(lr=1e-4, options=argparse.Namespace(rank=4)),
        "callbacks": {Hyperparameters: {"best_model_score": torch.ones(()), "path": Path("a")}},
        "payload": RunsOnLoading(tmp_path / "created"),
    }
    path = tmp_path / "halfDecoder.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    convert(path, tmp_path / "vae.safetensors", vae=base(tmp_path, "adcsr"))
    assert (tmp_path / "vae.safetensors").is_file()
    assert "  passed over: argparse.Namespace, " in describe_file(path)
    assert not (tmp_path / "created").exists()
    with pytest.raises(ValueError, match="halfDecoder.ckpt: refused, because the pickle holds Python objects"):
        read_weights(path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "created").exists()  # the payload works where a pickle is run, so that the test means something


def test_objects_are_refused_where_weights_are_expected(tmp_path):
    """``info`` looks at what is there; a method's own weights are read strictly."""
    path = tmp_path / "osediff.pkl"
    torch.save(toys.osediff_checkpoint(seed=3, rank=4) | {"payload": RunsOnLoading(tmp_path / "created")}, path)
    for read in (lambda: load_weights(OSEDIFF, path), lambda: describe_file(path), lambda: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(ValueError, match="osediff.pkl: refused"):
            read()
    assert not (tmp_path / "created").exists()


def test_too_many_kinds_of_objects(tmp_path):
    kinds = [type(f"Kind{i}", (), {"__module__": __name__}) for i in range(101)]
    globals().update({kind.__name__: kind for kind in kinds})
    try:
        torch.save({"a": torch.ones(1), "objects": [kind() for kind in kinds]}, tmp_path / "a.ckpt")
    finally:
        for kind in kinds:
            del globals()[kind.__name__]
    with pytest.raises(ValueError, match="holds 101 kinds of Python objects, expected at most 100"):
        read_weights(tmp_path / "a.ckpt", pass_over=True)


def test_whole_and_tiny_autoencoders_are_no_light_decoders(tmp_path):
    wide = {f"decoder.{key}": torch.zeros(1) for key in golden("lightdecoder_adcsr")[0]["keys"]} | {"decoder.conv_norm_out.weight": torch.zeros(128)}
    assert identify({"state_dict": wide}).id == VAE.id
    narrow = {"decoder.conv_in.weight": torch.zeros(256, 4, 3, 3), "encoder.conv_out.weight": torch.zeros(8, 512, 3, 3)}
    assert identify(narrow).id == LIGHT_VAE.id
    for key in ("taesd_decoder.1.weight", "1.conv.0.weight", "decoder.layers.0.weight"):
        assert identify({key: torch.zeros(1)}).id == TAESD.id
    torch.save({"1.conv.0.weight": torch.zeros(1)}, tmp_path / "taesd_decoder.pth")
    with pytest.raises(ValueError, match="found TAESD, a tiny autoencoder for previews; expected"):
        convert(tmp_path / "taesd_decoder.pth", None)
