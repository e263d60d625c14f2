"""Weight files: the right ones in every form, the wrong ones named, and none of them run."""

import dataclasses
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toys

from fewstep_sr.methods import INVSR, METHODS, OSEDIFF, identify, load_weights
from fewstep_sr.methods.osediff import save_adapter

TENSOR = torch.zeros(4, 4)


def save(path: Path, content) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.clone() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("extension", ["pkl", "pt", "pth"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_osediff_adapter(tmp_path, extension, rank):
    checkpoint = toys.osediff_checkpoint(seed=3, rank=rank)
    adapter = load_weights(OSEDIFF, save(tmp_path / f"a.{extension}", checkpoint))
    check_adapter(adapter, checkpoint, rank)


def check_adapter(adapter, checkpoint, rank):
    assert adapter.rank_unet == adapter.rank_vae == rank and adapter.context_dim == 64
    assert set(adapter.unet) == {k for group in ("encoder", "decoder", "others") for k in checkpoint[f"unet_lora_{group}_modules"]}
    assert set(adapter.vae) == set(checkpoint["vae_lora_encoder_modules"])
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert torch.equal(adapter.unet[layer].down, checkpoint["state_dict_unet"][f"{layer}.lora_A.default_decoder.weight"])
    assert torch.equal(adapter.vae["quant_conv"].up, checkpoint["state_dict_vae"]["quant_conv.lora_B.default_encoder.weight"])
    for kind in ("weight", "bias"):
        assert torch.equal(adapter.unet_replaced[f"conv_in.{kind}"], checkpoint["state_dict_unet"][f"conv_in.base_layer.{kind}"])


def test_osediff_adapter_in_safetensors(tmp_path):
    checkpoint = toys.osediff_checkpoint(seed=3, rank=4)
    tensors = {f"{part}.{k}": v for part in ("unet", "vae") for k, v in checkpoint[f"state_dict_{part}"].items()}
    check_adapter(load_weights(OSEDIFF, save(tmp_path / "a.safetensors", tensors)), checkpoint, 4)


def test_timestep_of_an_adapter(tmp_path):
    """The published ones say nothing and are for 999; what was trained at another keeps it through a conversion."""
    adapter = load_weights(OSEDIFF, save(tmp_path / "a.pkl", toys.osediff_checkpoint(seed=3, rank=4)))
    assert adapter.timestep == 999
    save_adapter(dataclasses.replace(adapter, timestep=249), tmp_path / "b.safetensors")
    assert load_weights(OSEDIFF, tmp_path / "b.safetensors").timestep == 249
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors", {"timestep": "1000"})
    with pytest.raises(ValueError, match="c.safetensors: found the timestep '1000' in its metadata, expected 0 to 999"):
        load_weights(OSEDIFF, tmp_path / "c.safetensors")


def test_osediff_adapter_written_by_the_authors_code():
    adapter = load_weights(OSEDIFF, toys.GOLDEN / "osediff_square.pkl")
    check_adapter(adapter, toys.osediff_checkpoint(seed=0, rank=4), 4)
    low_rank = adapter.unet["conv_in"]
    assert low_rank.weight_shape == (32, 4, 3, 3)


WRAPPINGS = {
    "bare": lambda sd: sd,
    "state_dict": lambda sd: {"epoch": 3, "state_dict": sd},
    "module": lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}},
    "orig_mod": lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()},
    "both": lambda sd: {f"module._orig_mod.{k}": v for k, v in sd.items()},
    "training": lambda sd: {"state_dict": sd, "state_dict_dis": {"feature_in.weight": TENSOR}, "iters_start": 5, "amp_scaler": {"scale": 1.0}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_noise_predictor(tmp_path, wrapping):
    state_dict = toys.predictor_state_dict(seed=2)
    weights = load_weights(INVSR, save(tmp_path / "p.pth", WRAPPINGS[wrapping](state_dict)))
    assert weights.config.block_out_channels == (64, 128) and weights.state_dict.keys() == state_dict.keys()
    assert all(torch.equal(weights.state_dict[k], v) for k, v in state_dict.items())


def test_noise_predictor_in_safetensors(tmp_path):
    state_dict = toys.predictor_state_dict(seed=2)
    weights = load_weights(INVSR, save(tmp_path / "p.safetensors", state_dict))
    assert all(torch.equal(weights.state_dict[k], v) for k, v in state_dict.items())


class Payload:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_malicious_pickle_does_not_run(tmp_path, method, form):
    target, path = tmp_path / "created", tmp_path / "osediff.pkl"
    content = {"state_dict_unet": {}, "payload": Payload(target)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"osediff\.pkl: refused"):
        load_weights(method, path)
    assert not target.exists()
    # The payload works where a pickle is run, so that the test means something.
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())
    assert target.exists()


def lora(key: str, width: int) -> dict:
    return {key: torch.zeros(4, width), key.replace("down", "up").replace("lora_A", "lora_B"): torch.zeros(64, 4)}


WRONG = {
    "AdcSR's merged OSEDiff": {"vae": {"encoder.conv_in.weight": TENSOR}, "unet": {"conv_in.weight": TENSOR}},
    "a PiSA-SR adapter": {"rank_unet": 4, "unet_lora_encoder_modules_pix": [], "state_dict_unet": {}},
    "a discriminator": {"feature_in.weight": TENSOR, "down_blocks.0.resnets.0.conv1.weight": TENSOR},
    "a training checkpoint of a discriminator": {"state_dict_dis": {"conv_in.weight": TENSOR}, "iters_start": 1},
    "a LoRA for Stable Diffusion 1.x": lora("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", 768),
    "a LoRA for Stable Diffusion 2.x": lora("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 1024),
    "a LoRA for Stable Diffusion XL": lora("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280),
    "a LoRA for a diffusion transformer": lora("transformer.single_blocks.0.attn.to_q.lora_A.weight", 3072),
    "a Stable Diffusion XL checkpoint": {
        "conditioner.embedders.1.model.ln_final.weight": TENSOR,
        "model.diffusion_model.label_emb.0.0.weight": TENSOR,
    },
    "a UNet of Stable Diffusion XL": {"add_embedding.linear_1.weight": TENSOR, "down_blocks.0.resnets.0.conv1.weight": TENSOR},
    "a whole checkpoint for Stable Diffusion 2.x": {
        "model.diffusion_model.input_blocks.0.0.weight": TENSOR,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
    },
    "a whole UNet for Stable Diffusion 1.x": {
        "down_blocks.0.resnets.0.conv1.weight": TENSOR,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
    },
    "a VAE": {"encoder.down.0.block.0.conv1.weight": TENSOR},
    "weights of a perceptual loss": {"lin0.model.1.weight": TENSOR, "net.slice1.0.weight": TENSOR},
    "an image tagger": {"visual_encoder.patch_embed.proj.weight": TENSOR},
    "an unknown file with 2 entries": {"a": TENSOR, "b": TENSOR},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize(("method", "wanted"), [(OSEDIFF, "expected an OSEDiff adapter"), (INVSR, "expected an InvSR noise predictor")])
def test_wrong_file_is_named(tmp_path, method, wanted, what):
    assert identify(WRONG[what]).phrase.startswith(what)
    with pytest.raises(ValueError) as error:
        load_weights(method, save(tmp_path / "weights.pth", WRONG[what]))
    assert f"weights.pth: found {what}" in str(error.value) and wanted in str(error.value)
    if all(isinstance(v, torch.Tensor) for v in WRONG[what].values()):
        with pytest.raises(ValueError, match=wanted):
            load_weights(method, save(tmp_path / "weights.safetensors", WRONG[what]))


def test_files_of_the_other_method_are_named(tmp_path):
    with pytest.raises(ValueError, match="found an OSEDiff adapter; expected an InvSR noise predictor"):
        load_weights(INVSR, toys.GOLDEN / "osediff_square.pkl")
    with pytest.raises(ValueError, match="found an InvSR noise predictor; expected an OSEDiff adapter"):
        load_weights(OSEDIFF, save(tmp_path / "p.pth", {"state_dict": toys.predictor_state_dict(seed=0)}))


def corrupt(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "one byte": whole[:1],
        "html": b"\n<!DOCTYPE html><html><body>Sign in to download</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "json": b'{"error": "Access to model is restricted"}',
        "text": b"hello, world",
    }
    path.write_bytes(contents[kind])


CORRUPT = {
    "empty": "the file is empty",
    "truncated": "damaged or cut off|is cut off",
    "one byte": "damaged or cut off|is cut off|not a weight file",
    "html": "a web page saved",
    "lfs": "Git LFS pointer",
    "json": "JSON text",
    "text": "not a weight file",
}


@pytest.mark.parametrize("kind", CORRUPT)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_damaged_file_is_named(tmp_path, method, form, kind):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    state_dict = toys.predictor_state_dict(seed=0)
    if form == "safetensors":
        save(path, state_dict)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=form == "zip")
    corrupt(path, kind)
    with pytest.raises(ValueError, match=CORRUPT[kind]) as error:
        load_weights(method, path)
    assert path.name in str(error.value)


def test_other_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(OSEDIFF, tmp_path / "missing.pkl")
    with pytest.raises(ValueError, match="single Tensor, expected a dictionary"):
        load_weights(OSEDIFF, save(tmp_path / "tensor.pth", TENSOR))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_weights(OSEDIFF, tmp_path / "other.pth")


def test_incomplete_adapters_are_named(tmp_path):
    checkpoint = toys.osediff_checkpoint(seed=0, rank=4)
    key = next(k for k in checkpoint["state_dict_unet"] if "lora_B" in k)
    del checkpoint["state_dict_unet"][key]
    with pytest.raises(ValueError, match="has lora_A but not its other half"):
        load_weights(OSEDIFF, save(tmp_path / "half.pkl", checkpoint))
    checkpoint["state_dict_unet"][key] = torch.zeros(32, 5, 1, 1)
    with pytest.raises(ValueError, match="ranks 4 and 5"):
        load_weights(OSEDIFF, save(tmp_path / "ranks.pkl", checkpoint))
    del checkpoint["state_dict_unet"]["conv_in.base_layer.bias"]
    with pytest.raises(ValueError, match=r"conv_in\.base_layer\.bias is missing"):
        load_weights(OSEDIFF, save(tmp_path / "bias.pkl", checkpoint))
    checkpoint = toys.osediff_checkpoint(seed=0, rank=4)
    checkpoint["state_dict_vae"] = {}
    with pytest.raises(ValueError, match="VAE: no LoRA weights"):
        load_weights(OSEDIFF, save(tmp_path / "no_vae.pkl", checkpoint))


def test_incomplete_predictors_are_named(tmp_path):
    state_dict = toys.predictor_state_dict(seed=0)
    del state_dict["encoder.conv_out.weight"]
    with pytest.raises(ValueError, match=r"'encoder\.conv_out\.weight' is missing"):
        load_weights(INVSR, save(tmp_path / "p.pth", state_dict))
    state_dict["encoder.conv_out.weight"] = torch.zeros(8, 128, 3, 3)
    layer = "encoder.mid_block.attentions.0.to_q.weight"
    with pytest.raises(ValueError, match=r"to_q\.weight has shape \(2, 2\), expected \(128, 128\)"):
        load_weights(INVSR, save(tmp_path / "p.pth", state_dict | {layer: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=r"to_q\.weight has no tensor, expected \(128, 128\)"):
        load_weights(INVSR, save(tmp_path / "p.pth", {k: v for k, v in state_dict.items() if k != layer}))
    with pytest.raises(ValueError, match="extra is no part of the network"):
        load_weights(INVSR, save(tmp_path / "p.pth", state_dict | {"extra": TENSOR}))
    state_dict["encoder.conv_out.weight"] = torch.zeros(32, 128, 3, 3)
    with pytest.raises(ValueError, match="32 output channels"):
        load_weights(INVSR, save(tmp_path / "p.pth", state_dict))
