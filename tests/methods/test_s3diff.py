"""S3Diff without its networks: the equations on the authors' arrays and by hand, the file, the options."""

import dataclasses

import pytest
import torch
import toys
from safetensors import safe_open
from toys import GOLDEN, golden, relative_error

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.methods import METHODS, S3DIFF, identify, load_weights, method_of, s3diff
from fewstep_sr.networks.degradation import DegradationConfig, EstimatorWeights
from fewstep_sr.weights.lora import LowRank

CASES = ["s3diff_square", "s3diff_tall"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_modulation(case, part):
    settings, arrays = golden(case)
    adapter = load_weights(S3DIFF, GOLDEN / f"{case}.pkl")
    p = s3diff.fourier_embedding(arrays["d"], adapter.frequencies)
    assert relative_error(p, arrays["p"]) < 1e-5
    assert relative_error(s3diff.modulation_matrices(p, adapter.modulation[part]), arrays[f"M_{part}"]) < 1e-5
    layers = adapter.unet if part == "unet" else adapter.vae
    assert {layer: s3diff.block_of(part, layer) for layer in layers} == settings["blocks"][part]
    assert {low_rank.scale for low_rank in layers.values()} == {settings[f"scale_{part}"]}
    scores = arrays["d"][0].double().requires_grad_()
    modulated = adapter.modulated(part, scores)
    for layer, low_rank in layers.items():
        expected = torch.einsum("or...,kr->ok...", low_rank.up, arrays[f"M_{part}"][settings["blocks"][part][layer]])
        assert relative_error(modulated[layer].up, expected) < 1e-5 and modulated[layer].down is low_rank.down
        assert modulated[layer].alpha == 8 and modulated[layer].up.dtype == torch.float32 and not modulated[layer].up.requires_grad
    alone = adapter.for_image(part, scores)
    assert type(alone) is not type(adapter) and not alone.per_image and adapter.per_image
    assert (alone.unet if part == "unet" else alone.vae).keys() == layers.keys() and not (alone.vae if part == "unet" else alone.unet)
    assert alone.unet_replaced == (adapter.unet_replaced if part == "unet" else {})


@pytest.mark.parametrize("case", CASES)
def test_one_step(case):
    settings, arrays = golden(case)
    assert settings["timestep"] == s3diff.TIMESTEP == S3DIFF.one_step.timestep == 999 and settings["cfg"] == S3DIFF.cfg
    level = alpha_bar_at(s3diff.TIMESTEP, arrays["latent"])
    assert relative_error(s3diff.one_step(arrays["latent"], arrays["noise_pred"], level), arrays["x0"]) < 1e-5
    noise_preds = [arrays["noise_pred_positive"], arrays["noise_pred_negative"]]
    assert relative_error(S3DIFF.one_step.equation(arrays["latent"], noise_preds, 999), arrays["x0_cfg1"]) < 1e-5


def test_embedding_by_hand():
    """Sines and cosines of the blur score, then of the noise score."""
    found = s3diff.fourier_embedding(torch.tensor([[0.25, 0.5], [0.0, 1.0]]), torch.tensor([1.0, 2.0]))
    expected = torch.tensor([[1.0, 0, 0, -1, 0, 0, -1, 1], [0, 0, 1, 1, 0, 0, 1, 1]])
    assert found.shape == (2, 8) and (found - expected).abs().max() < 1e-6


def test_a_matrix_stands_transposed_between_the_halves():
    down, up = torch.eye(2), torch.tensor([[1.0, 10.0]])
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    folded = s3diff.fold(LowRank(down, up, 6.0), matrix)
    assert folded.up.tolist() == [[21.0, 43.0]] and folded.down is down and folded.alpha == 6  # up Mᵀ
    kernel = s3diff.fold(LowRank(torch.ones(2, 3, 3, 3), up.view(1, 2, 1, 1).half()), matrix)
    assert kernel.up.shape == (1, 2, 1, 1) and kernel.up.dtype == torch.float16 and kernel.up.flatten().tolist() == [21.0, 43.0]


@pytest.mark.parametrize(
    ("part", "layer", "block"),
    [
        ("unet", "down_blocks.0.resnets.0.conv1", 0),
        ("unet", "down_blocks.3.resnets.1.conv2", 3),
        ("unet", "mid_block.resnets.0.conv1", 4),
        ("unet", "mid_block.3.conv1", 4),
        ("unet", "up_blocks.0.resnets.3.conv1", 5),
        ("unet", "up_blocks.3.attentions.2.proj_in", 8),
        ("unet", "conv_out", 9),
        ("vae", "encoder.down_blocks.0.resnets.0.conv1", 0),
        ("vae", "encoder.down_blocks.3.resnets.0.conv1", 3),
        ("vae", "encoder.mid_block.attentions.0.to_k", 4),
        ("vae", "encoder.conv_in", 5),
        ("vae", "encoder.conv_out", 5),
    ],
)
def test_blocks(part, layer, block):
    assert s3diff.block_of(part, layer) == block


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("unet", "conv_in"),
        ("unet", "conv_outer"),
        ("unet", "down_blocks.4.resnets.0.conv1"),
        ("unet", "up_blocks.9.x"),
        ("unet", "encoder.mid_block.x"),
        ("unet", "time_embedding.linear_1"),
        ("vae", "encoder.up_blocks.0.x"),
        ("vae", "mid_block.x"),
        ("vae", "decoder.mid_block.x"),
        ("vae", "quant_conv"),
    ],
)
def test_layers_of_no_block(part, layer):
    blocks = {"unet": 10, "vae": 6}[part]
    with pytest.raises(ValueError, match=f"layer {layer} of the {part} is in none of the {blocks} blocks that S3Diff modulates"):
        s3diff.block_of(part, layer)


def test_what_is_an_s3diff_adapter():
    for key in ("state_dict_vae_de_mlp", "vae_de_mlp.0.weight", "module.vae_de_mlp.0.bias"):
        assert method_of(identify({key: torch.ones(1)})) is S3DIFF
    assert method_of(identify({key: {} for key in ("state_dict_vae_de_mlp", "state_dict_unet", "state_dict_vae")})) is S3DIFF
    assert method_of(identify({"my_vae_de_mlp.0.weight": torch.ones(1)})) is None


def test_the_file_written(tmp_path):
    adapter = load_weights(S3DIFF, GOLDEN / "s3diff_square.pkl")
    other = dataclasses.replace(adapter, unet={k: dataclasses.replace(v, alpha=12.0) for k, v in adapter.unet.items()})
    S3DIFF.save(other, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        notes, keys = file.metadata(), set(file.keys())
    assert {"family": "S3Diff adapter", "rank_unet": "6", "rank_vae": "4", "lora_alpha": "12"}.items() <= notes.items()
    assert {"w", "unet.conv_in.weight", "unet.conv_in.bias", "unet_de_mlp.0.weight", "vae_block_embeddings.weight"} <= keys
    assert {"unet.conv_out.lora_A.default.weight", "vae.encoder.conv_in.lora_B.vae_skip.weight"} <= keys and not any("estimator" in k for k in keys)
    again = load_weights(S3DIFF, tmp_path / "a.safetensors")
    assert {low_rank.alpha for layers in (again.unet, again.vae) for low_rank in layers.values()} == {12.0}
    found, expected = again.unet["conv_out"], adapter.unet["conv_out"]
    assert torch.equal(found.down, expected.down) and torch.equal(found.up, expected.up)


def test_without_its_file_it_has_no_frequencies():
    bare = s3diff.S3DiffAdapter({})
    assert bare.frequencies.shape == (0,) and bare.modulation == {} and bare.estimator is None


def test_half_precision_is_computed_in_float32(tmp_path):
    published = torch.load(GOLDEN / "s3diff_square.pkl", weights_only=True)
    published["w"] = published["w"].data.half()
    published["state_dict_unet_de_mlp"] = {key: tensor.half() for key, tensor in published["state_dict_unet_de_mlp"].items()}
    torch.save(published, tmp_path / "half.pkl")
    adapter = load_weights(S3DIFF, tmp_path / "half.pkl")
    assert adapter.frequencies.dtype == adapter.modulation["unet"]["de_mlp.0.weight"].dtype == torch.float32


def test_summary():
    adapter = load_weights(S3DIFF, GOLDEN / "s3diff_square.pkl")
    lines = S3DIFF.summary(adapter)
    assert lines == [
        "  rank: 6 on the UNet (164 layers), 4 on the VAE's encoder (22 layers); scale 1.33333 and 2",
        "  replaces: the UNet's conv_in",
        "  modulated by the image's blur and noise; degradation estimator: a file of its own",
        "  fits: a base of another kind, cross-attention dimension 64; published for SD-Turbo",
    ]
    wide = dataclasses.replace(adapter, unet={"a.attn2.to_k": LowRank(torch.zeros(6, 1024), torch.zeros(8, 6))})
    assert S3DIFF.summary(wide)[3] == "  fits: Stable Diffusion 2.x, cross-attention dimension 1024; published for SD-Turbo"
    published, other = (EstimatorWeights(config, {}) for config in (DegradationConfig(), DegradationConfig(channels=8)))
    assert "(as published)" in s3diff.ESTIMATOR.summary(published)[0] and "(not the published dimensions)" in s3diff.ESTIMATOR.summary(other)[0]


def test_options():
    estimator, blur, noise = S3DIFF.options
    assert [option.name for option in S3DIFF.options] == ["estimator", "blur", "noise"]
    for option in S3DIFF.options:
        assert option.default is None and not option.many and not option.needed
    for option in (blur, noise):
        assert [option.parse(text) for text in ("0", "0.25", "1")] == [0, 0.25, 1]
        for text in ("-0.01", "1.01", "2", "nan"):
            with pytest.raises(ValueError, match=f"found {text}, expected a number from 0 to 1"):
                option.parse(text)
    assert S3DIFF.companions == (s3diff.ESTIMATOR,) and s3diff.ESTIMATOR.option == estimator.name
    assert s3diff.PAD_MULTIPLE == 64 and METHODS["s3diff"].cfg == 1.07 and S3DIFF.schedule is None and S3DIFF.demo is None


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, True), ({"blur": 0.0}, True), ({"noise": 0.0}, True), ({"blur": None, "noise": 1.0}, True), ({"blur": 0.0, "noise": 0.0}, False)],
)
def test_scores_given_need_no_estimator(options, needed):
    assert s3diff.ESTIMATOR.is_needed(options) is needed
    assert dataclasses.replace(s3diff.ESTIMATOR, replaced_by=()).is_needed(options) is True


def test_the_checkpoint_of_the_toys_is_read(tmp_path):
    """Ranks and widths of its own: they come from the tensors' shapes."""
    torch.save(toys.s3diff_checkpoint(1, 3, 1, toys.SHAPES, lambda shapes, seed: toys.weights(seed, "s3diff", shapes)), tmp_path / "a.pkl")
    adapter = load_weights(S3DIFF, tmp_path / "a.pkl")
    assert (adapter.rank_unet, adapter.rank_vae) == (3, 1)
