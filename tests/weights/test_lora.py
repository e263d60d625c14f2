"""PEFT's layout of LoRA weights: adapter names, alpha, halves that do not fit."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from fewstep_sr.methods import INVSR, OSEDIFF, identify, load_weights, method_of, osediff
from fewstep_sr.weights.lora import Adapter, LowRank, metadata_alpha, one_adapter, read_lora
from fewstep_sr.weights.save import save_safetensors


def halves(layer: str, adapter: str = "", rank: int = 4, ins: int = 6, outs: int = 8) -> dict[str, torch.Tensor]:
    dot = f".{adapter}" if adapter else ""
    return {f"{layer}.lora_A{dot}.weight": torch.randn(rank, ins), f"{layer}.lora_B{dot}.weight": torch.randn(outs, rank)}


def test_adapter_names_are_kept():
    """Two adapters on one layer: none takes the other's place."""
    state = halves("a", "default_pix") | halves("a", "default_sem", rank=2) | halves("b", "default_pix") | {"conv_in.weight": torch.ones(1)}
    adapters = read_lora(state, "file")
    assert {name: sorted(layers) for name, layers in adapters.items()} == {"default_pix": ["a", "b"], "default_sem": ["a"]}
    assert torch.equal(adapters["default_sem"]["a"].down, state["a.lora_A.default_sem.weight"])
    assert [adapters[name]["a"].scale for name in adapters] == [2.0, 4.0]
    assert list(read_lora(halves("a"), "file")) == [""]


def test_two_adapters_on_one_layer_are_refused_where_one_is_expected():
    adapters = read_lora(halves("a", "first") | halves("b", "second") | halves("a", "third"), "file: UNet")
    with pytest.raises(ValueError, match="file: UNet: layer a has two adapters, 'first' and 'third', expected one"):
        one_adapter(adapters, "file: UNet")
    assert sorted(one_adapter({"first": adapters["first"], "second": adapters["second"]}, "file")) == ["a", "b"]


def test_scale_is_alpha_over_rank():
    down, up = torch.randn(4, 6), torch.randn(8, 4)
    assert LowRank(down, up).scale == 2 and LowRank(down, up, 16.0).scale == 4 and LowRank(down, up).rank == 4
    assert LowRank(down, up).weight_shape == (8, 6) and LowRank(torch.zeros(4, 6, 3, 3), torch.zeros(8, 4, 1, 1)).weight_shape == (8, 6, 3, 3)
    assert read_lora(halves("a"), "file", alpha=None)[""]["a"].scale == 1
    assert read_lora(halves("a"), "file", alpha=2.0)[""]["a"].alpha == 2


def test_tensors_are_copies():
    state = halves("a")
    low_rank = read_lora(state, "file")[""]["a"]
    assert low_rank.down.data_ptr() != state["a.lora_A.weight"].data_ptr() and low_rank.up.data_ptr() != state["a.lora_B.weight"].data_ptr()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"no LoRA weights \(lora_A, lora_B\) found"),
        ({"a.lora_A.weight": torch.ones(4, 6)}, "layer a has lora_A but not its other half"),
        ({"a.lora_B.weight": torch.ones(4, 6)}, "layer a has lora_B but not its other half"),
        ({"a.lora_A.weight": torch.ones(4, 6), "a.lora_B.weight": torch.ones(8, 3)}, r"layer a has ranks 4 and 3 in its two halves"),
        ({"a.lora_A.weight": torch.ones(4), "a.lora_B.weight": torch.ones(8, 4)}, r"layer a has halves of shapes \(4,\) and \(8, 4\)"),
        ({"a.lora_A.weight": torch.ones(4, 6), "a.lora_B.weight": torch.tensor(1.0)}, r"layer a has halves of shapes \(4, 6\) and \(\)"),
        ({"a.lora_A.weight": torch.ones(0, 6), "a.lora_B.weight": torch.ones(8, 0)}, r"layer a has halves of shapes \(0, 6\) and \(8, 0\)"),
    ],
)
def test_halves_that_do_not_fit(state, message):
    with pytest.raises(ValueError, match=f"file: {message}"):
        read_lora(state, "file")


def test_dimensions_of_an_adapter():
    unet = {"down.attn2.to_k": LowRank(torch.zeros(4, 1024), torch.zeros(320, 4)), "conv": LowRank(torch.zeros(4, 3, 3, 3), torch.zeros(8, 4, 1, 1))}
    assert Adapter(unet).context_dim == 1024 and Adapter(unet).rank_unet == 4 and Adapter(unet).rank_vae == 0
    assert Adapter({"conv": unet["conv"]}, {"conv": LowRank(torch.zeros(3, 6), torch.zeros(8, 3))}).rank_vae == 3
    assert Adapter({"conv": unet["conv"]}).context_dim is None


def test_alpha_of_the_metadata():
    assert metadata_alpha({}, "file") == 8 and metadata_alpha({}, "file", None) is None and metadata_alpha({"lora_alpha": "4"}, "file") == 4
    for text in ("0", "-1", "inf", "nan", "four"):
        with pytest.raises(ValueError, match="file: found lora_alpha .* in its metadata, expected a positive number"):
            metadata_alpha({"lora_alpha": text}, "file")


def adapter_tensors() -> dict[str, torch.Tensor]:
    tensors = {"unet.conv_in.base_layer.weight": torch.ones(2, 3), "unet.conv_in.base_layer.bias": torch.ones(2)}
    for layer, group in (
        ("unet.down_blocks.0.a", "default_encoder"),
        ("unet.up_blocks.0.a", "default_decoder"),
        ("unet.mid_block.a", "default_others"),
    ):
        tensors |= halves(layer, group)
    return tensors | halves("vae.encoder.a", "default_encoder", rank=2)


def test_alpha_and_timestep_of_a_file_are_read_and_written(tmp_path):
    """What another training wrote with alpha 16 acts with scale 16 / rank, and is written so again."""
    save_safetensors(adapter_tensors(), tmp_path / "a.safetensors", {"lora_alpha": "16", "timestep": "249"})
    adapter = load_weights(OSEDIFF, tmp_path / "a.safetensors")
    assert adapter.timestep == 249 and {low_rank.alpha for low_rank in (*adapter.unet.values(), *adapter.vae.values())} == {16.0}
    assert (adapter.rank_unet, adapter.rank_vae) == (4, 2) and adapter.unet["mid_block.a"].scale == 4
    osediff.save_adapter(adapter, tmp_path / "b.safetensors")
    again = load_weights(OSEDIFF, tmp_path / "b.safetensors")
    assert again.timestep == 249 and again.unet["up_blocks.0.a"].alpha == 16
    for part in ("unet", "vae"):
        for layer, low_rank in getattr(adapter, part).items():
            assert torch.equal(getattr(again, part)[layer].down, low_rank.down) and torch.equal(getattr(again, part)[layer].up, low_rank.up)
    assert torch.equal(again.unet_replaced["conv_in.weight"], torch.ones(2, 3)) and torch.equal(again.unet_replaced["conv_in.bias"], torch.ones(2))


def test_a_conv_in_that_is_the_bases(tmp_path):
    """An adapter that leaves it alone says so in its file."""
    save_safetensors(adapter_tensors(), tmp_path / "a.safetensors", {"timestep": "0249"})
    adapter = load_weights(OSEDIFF, tmp_path / "a.safetensors")
    assert adapter.timestep == 249 and adapter.unet_replaced
    for replaced in (adapter.unet_replaced, {}):
        osediff.save_adapter(dataclasses.replace(adapter, unet_replaced=replaced), tmp_path / "b.safetensors")
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert ("conv_in" in file.metadata()) is (not replaced)
        assert load_weights(OSEDIFF, tmp_path / "b.safetensors").unet_replaced.keys() == replaced.keys()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_conv_in_that_is_missing(tmp_path, kind):
    tensors = adapter_tensors()
    del tensors[f"unet.conv_in.base_layer.{kind}"]
    save_safetensors(tensors, tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match=rf"a\.safetensors: UNet: the tensor conv_in\.base_layer\.{kind} is missing"):
        load_weights(OSEDIFF, tmp_path / "a.safetensors")


@pytest.mark.parametrize("half", ["state_dict_unet", "state_dict_vae"])
def test_half_a_published_file(half):
    with pytest.raises(ValueError, match="file: its UNet's or its VAE's part is no dictionary of tensors"):
        OSEDIFF.parse({half: {"conv_in.base_layer.weight": torch.ones(2, 3)}}, {}, "file")


@pytest.mark.parametrize("timestep", ["1000", "-1", "9.5", "", "²", "10000000", "00249"])
def test_timestep_that_is_none(tmp_path, timestep):
    save_safetensors(adapter_tensors(), tmp_path / "a.safetensors", {"timestep": timestep})
    with pytest.raises(ValueError, match="expected 0 to 999"):
        load_weights(OSEDIFF, tmp_path / "a.safetensors")


def test_groups_are_the_published_ones():
    layers = ["down_blocks.0.x", "conv_in", "up_blocks.1.x", "conv_out", "mid_block.x", "time_embedding.x"]
    groups = [osediff.unet_group(layer) for layer in layers]
    assert groups == ["default_encoder", "default_encoder", "default_decoder", "default_decoder", "default_others", "default_others"]
    assert osediff.VAE_GROUP == "default_encoder"


def test_kinds_decide_by_id():
    """RAM++, Tag2Text and DAPE are all called taggers by people; code tells them apart."""
    dape, ram_plus = {"visual_encoder.layers.0.lora_A": 0}, {"reweight_scale": 0, "visual_encoder.patch_embed.proj.weight": 0}
    kinds = [identify(state) for state in (dape, ram_plus, {"label_embed.weight": 0}, {"visual_encoder.patch_embed.proj.weight": 0})]
    assert [kind.id for kind in kinds] == ["dape", "ram++", "tag2text", "tagger"] and all("tagger" in kind.phrase for kind in kinds)
    assert method_of(OSEDIFF.kind) is OSEDIFF and method_of(INVSR.kind) is INVSR and method_of(kinds[0]) is None
    published = {"state_dict_unet": {}, "state_dict_vae": {}, "rank_unet": 4}
    assert identify(published).id == "osediff" and identify({"state_dict": published}).id == "osediff"
    assert identify(published | {"state_dict_unet": {"a.lora_A.default_encoder_pix.weight": 0}}).id == "pisasr"
    assert identify({"state_dict_unet": {}, "state_dict_vae": {}, "state_dict_vae_de_mlp": {}}).id != "osediff"
    assert identify({"module._orig_mod.encoder.down_blocks.0.resnets.0.time_emb_proj.weight": 0}).id == "invsr"
    assert identify({"unet": {}, "vae": {}}).id == "adcsr-osediff" and identify({"unet": {}}).id == "unknown"
    assert identify({}).phrase == "an unknown file with 0 entries (none, ...)" and identify({"b": 0, "a": 0}).phrase.endswith("2 entries (a, b, ...)")


@pytest.mark.parametrize(
    ("keys", "phrase"),
    [
        ({"x.attn2.to_k.lora_A.default.weight": (4, 768)}, "a LoRA for Stable Diffusion 1.x"),
        ({"x_attn2_to_k.lora_down.weight": (4, 1024)}, "a LoRA for Stable Diffusion 2.x"),
        ({"x.attn2.to_k.lora_A.weight": (4, 99)}, "a LoRA for a model with a cross-attention dimension of 99"),
        ({"lora_te2_x.lora_down.weight": (4, 9)}, "a LoRA for Stable Diffusion XL"),
        ({"double_blocks.0.lora_A.weight": (4, 9)}, "a LoRA for a diffusion transformer"),
        ({"y.lora_A.weight": (4, 9)}, "a LoRA"),
        ({"down_blocks.0.resnets.0.x": (1, 1), "d.attn2.to_k.weight": (320, 2048)}, "a whole UNet for Stable Diffusion XL"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (1, 1), "q.attn2.to_k.weight": (3, 1024)}, "a whole checkpoint for Stable Diffusion 2.x"),
        ({"decoder.up_blocks.0.x": (1, 1)}, "a VAE"),
    ],
)
def test_bases_are_named(keys, phrase):
    assert identify({key: torch.zeros(shape) for key, shape in keys.items()}).phrase == phrase
