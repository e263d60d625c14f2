"""Files that can be read, but whose tensors are not what their kind needs: each loader says which, before it copies or builds anything."""

import json

import fuzz_content
import limits
import pytest
import safetensors.torch
import torch
from tagger_toys import write_vocabulary

from fewstep_sr.methods import INVSR, OSEDIFF, identify, load_weights
from fewstep_sr.networks.vocabulary import TagVocabulary
from fewstep_sr.weights.lora import read_lora
from fewstep_sr.weights.tagger import add_dape, load_tagger_weights

PREDICTOR, TAGGER = fuzz_content.networks()["predictor"], fuzz_content.networks()["tagger"]
ADAPTER = fuzz_content.valid("adapter")


def load_predictor(tmp_path, changes):
    torch.save(PREDICTOR | changes, tmp_path / "a.pth")
    return load_weights(INVSR, tmp_path / "a.pth")


def load_adapter(tmp_path, changes, part="unet"):
    torch.save(ADAPTER | {f"state_dict_{part}": ADAPTER[f"state_dict_{part}"] | changes}, tmp_path / "a.pkl")
    return load_weights(OSEDIFF, tmp_path / "a.pkl")


def load_tagger(tmp_path, changes):
    torch.save({"model": TAGGER | changes}, tmp_path / "a.pth")
    write_vocabulary(tmp_path, fuzz_content.TAGS, fuzz_content.THRESHOLDS)
    return load_tagger_weights(tmp_path / "a.pth")


@limits.forks
@pytest.mark.parametrize(
    "key", ["encoder.down_blocks.0.resnets.1000000000.conv1.weight", "encoder.down_blocks.7.resnets.0.conv1.weight", "encoder.conv_in.extra"]
)
def test_predictor_of_a_billion_layers(tmp_path, key):
    """It was built layer by layer until memory ended, in the server too."""
    text, grown = limits.outcome(lambda: load_predictor(tmp_path, {key: torch.zeros(64, 64, 3, 3)}))
    assert text.startswith("ValueError: a.pth: ") and ("are numbered 0, " in text or "is no part of the network" in text)
    assert grown < 64 << 20


@limits.forks
@pytest.mark.parametrize(
    "key",
    [
        "visual_encoder.layers.0.blocks.1000000000.norm1.weight",
        "visual_encoder.layers.9.blocks.0.norm1.weight",
        "tagging_head.encoder.layer.1000000000.output.dense.weight",
    ],
)
def test_tagger_of_a_billion_layers(tmp_path, key):
    text, grown = limits.outcome(lambda: load_tagger(tmp_path, {key: torch.zeros(8)}))
    assert text.startswith("ValueError: a.pth: ") and "are numbered 0, 1" in text.replace("numbered 0, 9", "numbered 0, 1").replace("0, 1, 9", "0, 1")
    assert grown < 64 << 20


CONV, TEXT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("load", "key", "tensor", "message"),
    [
        (load_predictor, "encoder.conv_in.weight", torch.zeros(64), r"conv_in\.weight has shape \(64,\), expected 4 axes"),
        (load_predictor, "encoder.conv_out.weight", torch.tensor(1.0), r"conv_out\.weight has shape \(\), expected 4 axes"),
        (load_predictor, "encoder.time_embedding.linear_1.weight", torch.zeros(16, 15), "and 15 time channels; expected"),
        (
            load_predictor,
            "encoder.conv_norm_out.bias",
            torch.full((64,), float("nan")),
            r"encoder\.conv_norm_out\.bias holds values that are not finite",
        ),
        (load_predictor, "encoder.conv_norm_out.bias", torch.zeros(64, dtype=torch.int64), r"encoder\.conv_norm_out\.bias is of int64"),
        (load_predictor, "encoder.surplus", torch.zeros(1), r"encoder\.surplus is no part of the network"),
        (load_tagger, "label_embed", torch.tensor(1.0), "found 0 label embeddings, but 10 tag names"),
        (load_tagger, "label_embed", torch.zeros(10), r"label_embed has shape \(10,\), expected 2 axes"),
        (load_tagger, "wordvec_proj.weight", torch.zeros(6, 8), "tagging_head: found 6 channels, expected a multiple of 4"),
        (load_tagger, "visual_encoder.layers.1.blocks.0.attn.relative_position_bias_table", torch.zeros(25, 3), "heads that divide the channels"),
        (load_tagger, "visual_encoder.layers.0.blocks.0.attn.relative_position_bias_table", torch.zeros(24, 1), r"and \(2 w - 1\)² positions"),
        (load_tagger, "fc.bias", torch.tensor([float("inf")]), r"fc\.bias holds values that are not finite"),
        (load_tagger, "fc.bias", torch.ones(1, dtype=torch.int32), r"fc\.bias is of int32"),
        (load_adapter, "conv_in.base_layer.bias", torch.zeros(15), r"conv_in\.base_layer has weight and bias of shapes \(16, 4, 3, 3\) and \(15,\)"),
        (load_adapter, "conv_in.base_layer.weight", torch.tensor(1.0), r"conv_in\.base_layer has weight and bias of shapes \(\) and \(16,\)"),
        (load_adapter, "conv_in.base_layer.bias", "text", r"the tensor conv_in\.base_layer\.bias is missing"),
        (load_adapter, "conv_in.base_layer.bias", torch.full((16,), float("nan")), r"UNet: conv_in\.bias holds values that are not finite"),
        (load_adapter, f"{TEXT}.lora_A.default_encoder.weight", torch.tensor(1.0), r"has halves of shapes \(\) and \(16, 4\), expected"),
        (load_adapter, f"{TEXT}.lora_A.default_encoder.weight", torch.zeros(4, 64, 3), r"has halves of shapes \(4, 64, 3\) and \(16, 4\), expected"),
        (
            load_adapter,
            f"{CONV}.lora_B.default_encoder.weight",
            torch.zeros(16, 4, 3, 3),
            r"has halves of shapes \(4, 16, 3, 3\) and \(16, 4, 3, 3\)",
        ),
        (load_adapter, f"{TEXT}.lora_A.default_encoder.weight", 5, "has something else than tensors"),
        (load_adapter, f"{TEXT}.lora_A.default_encoder.weight", torch.ones(4, 64, dtype=torch.int8), "is of int8, expected floating-point"),
        (load_adapter, f"{TEXT}.lora_B.default_encoder.weight", torch.full((16, 4), float("inf")), "holds values that are not finite"),
    ],
)
def test_files_whose_tensors_are_wrong(tmp_path, load, key, tensor, message):
    with pytest.raises(ValueError, match=rf"^a\.(pth|pkl): .*{message}"):
        load(tmp_path, {key: tensor})


def test_what_a_network_does_not_use_may_be_anything(tmp_path):
    """Five sixths of RAM's file are unused, and are not looked at."""
    unused = {
        "text_decoder.a": torch.full((3,), float("nan")),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9).long(),
    }
    assert load_tagger(tmp_path, unused).config == load_tagger(tmp_path, {}).config
    assert load_adapter(tmp_path, {"step": torch.tensor(5)}).rank_unet == 4


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_adapters_with_wrappers_are_read(tmp_path, prefix):
    """DistributedDataParallel leaves ``module.`` before the keys, torch.compile ``_orig_mod.``."""
    inside = ADAPTER | {f"state_dict_{part}": {f"{prefix}{k}": v for k, v in ADAPTER[f"state_dict_{part}"].items()} for part in ("unet", "vae")}
    outside = {f"{prefix}{key}": value for key, value in ADAPTER.items()}
    flat = {f"{prefix}{part}.{key}": value for part in ("unet", "vae") for key, value in ADAPTER[f"state_dict_{part}"].items()}
    between = {f"{part}.{prefix}{key}": value for part in ("unet", "vae") for key, value in ADAPTER[f"state_dict_{part}"].items()}
    for content in (inside, outside, flat, between):
        torch.save(content, tmp_path / "a.pkl")
        adapter = load_weights(OSEDIFF, tmp_path / "a.pkl")
        assert sorted(adapter.unet) == sorted({CONV, TEXT}) and list(adapter.vae) == ["quant_conv"] and identify(content).id == "osediff"
    twice = ADAPTER["state_dict_unet"] | {"module.conv_in.base_layer.bias": torch.zeros(16)}
    torch.save(ADAPTER | {"state_dict_unet": twice}, tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=r"a\.pkl: UNet: conv_in\.base_layer\.bias is there twice"):
        load_weights(OSEDIFF, tmp_path / "a.pkl")


@limits.forks
def test_low_rank_weights_of_a_large_product(tmp_path):
    """8 MB whose product is 4 TB: shapes are compared before it is taken."""
    tagger = load_tagger(tmp_path, {})
    layer = "visual_encoder.layers.0.blocks.0.attn.proj"
    torch.save({f"{layer}.lora_A": torch.zeros(1, 10**6), f"{layer}.lora_B": torch.zeros(10**6, 1)}, tmp_path / "DAPE.pth")
    text, grown = limits.outcome(lambda: add_dape(tagger, tmp_path / "DAPE.pth"))
    assert text.startswith("ValueError: DAPE.pth: the update of") and "(1000000, 1000000)" in text and grown < 64 << 20


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (torch.tensor(1.0), torch.zeros(8, 2), "expected one rank in both"),
        (torch.zeros(0, 8), torch.zeros(8, 0), "which holds no numbers"),
        (torch.zeros(2, 8, 1), torch.zeros(8, 2), "expected one rank in both"),
        (torch.full((2, 8), float("nan")), torch.zeros(8, 2), "lora_A holds values that are not finite"),
        (torch.full((2, 8), 3e38), torch.full((8, 2), 3e38), "with the update holds values that are not finite"),
        (torch.zeros(2, 8).long(), torch.zeros(8, 2), "lora_A is of int64"),
    ],
)
def test_dape_whose_tensors_are_wrong(tmp_path, down, up, message):
    layer = "visual_encoder.layers.0.blocks.0.attn.proj"
    torch.save({f"{layer}.lora_A": down, f"{layer}.lora_B": up}, tmp_path / "DAPE.pth")
    with pytest.raises(ValueError, match=rf"^DAPE\.pth: .*{message}"):
        add_dape(load_tagger(tmp_path, {}), tmp_path / "DAPE.pth")


TEN = json.dumps(list("abcdefghij"))


@pytest.mark.parametrize(
    ("tags", "thresholds", "message"),
    [
        ("5", "[]", r"found no list \(int\) for the tags and a list of 0"),
        (TEN, None, "are no JSON lists"),
        (TEN, '["a", "b"]', "found a list of 10 for the tags and a list of 2"),
        (TEN, json.dumps(["0.5"] * 10), "expected texts and as many numbers between 0 and 1"),
        (TEN, "[" + "NaN, " * 9 + "1]", "expected texts and as many numbers between 0 and 1"),
        (TEN, json.dumps([True] * 10), "expected texts and as many numbers between 0 and 1"),
        (json.dumps([1] * 10), json.dumps([0.5] * 10), "expected texts and as many numbers between 0 and 1"),
        ("[" * 100_000, "[]", "are no JSON lists"),
        ("[" + "9" * 5000 + "]", "[0.5]", "are no JSON lists|expected texts"),
    ],
)
def test_metadata_of_a_tagger(tmp_path, tags, thresholds, message):
    metadata = {"tagger_tags": tags, "tagger_dape": ""} | ({} if thresholds is None else {"tagger_thresholds": thresholds})
    safetensors.torch.save_file(TAGGER, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"^a\.safetensors: its metadata: .*({message})"):
        load_tagger_weights(tmp_path / "a.safetensors")


def test_text_files_of_a_tagger(tmp_path):
    write_vocabulary(tmp_path, ["ä", "b"], ["0.5", "nan"])
    with pytest.raises(ValueError, match=r"ram_tag_list_threshold\.txt: line 2 is 'nan'"):
        TagVocabulary.read(tmp_path)
    write_vocabulary(tmp_path, ["ä", "b"], [0.5, 0.25])
    (tmp_path / "ram_tag_list.txt").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "ram_tag_list.txt").read_bytes())
    assert TagVocabulary.read(tmp_path).names == ("ä", "b")
    (tmp_path / "ram_tag_list.txt").write_bytes("ä\nb".encode("utf-16"))
    with pytest.raises(ValueError, match=r"ram_tag_list\.txt: it is no text in UTF-8"):
        TagVocabulary.read(tmp_path)


def test_low_rank_keys_that_are_no_text():
    with pytest.raises(ValueError, match="no LoRA weights"):
        read_lora({5: torch.zeros(2, 2)}, "file")
