"""PiSA-SR and HYPIR without their networks: the steps on the authors' arrays, the files, the options."""

import dataclasses
import re

import pytest
import torch
import toys
from safetensors import safe_open
from toys import GOLDEN, golden, relative_error

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.methods import HYPIR, METHODS, OSEDIFF, PISASR, hypir, identify, load_adapter, load_weights, method_of, pisasr
from fewstep_sr.weights.lora import LowRank


@pytest.mark.parametrize("case", ["pisasr_square", "pisasr_tall"])
def test_pisasr_residual_step(case):
    settings, arrays = golden(case)
    assert settings["timestep"] == pisasr.TIMESTEP == 1
    for pixel, semantic in settings["lambdas"]:
        x0 = pisasr.residual_step(arrays["latent"], arrays["eps_pix"], arrays["eps_full"], pixel, semantic)
        assert relative_error(x0, arrays[f"x0_{pixel:g}_{semantic:g}"]) < 1e-5
    assert relative_error(pisasr.residual_step(arrays["latent"], arrays["eps_pix"], arrays["eps_full"]), arrays["x0_default"]) < 1e-5
    z, pix, full = torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([3.0])
    assert pisasr.residual_step(z, pix, full, 0.5, 0.25).item() == 5 - (0.5 * 1 + 0.25 * 2)


@pytest.mark.parametrize("case", ["hypir_square", "hypir_tall"])
def test_hypir_one_step(case):
    settings, arrays = golden(case)
    for model_t, coeff_t in settings["model_t_coeff_t"]:
        assert model_t == hypir.TIMESTEP == 200
        x0 = hypir.one_step(arrays["latent"], arrays["noise_pred"], alpha_bar_at(coeff_t, arrays["latent"]))
        assert relative_error(x0, arrays[f"x0_{model_t}_{coeff_t}"]) < 1e-5


def saved(method, checkpoint, tmp_path):
    """A checkpoint as published, read, and again from what is written of it."""
    torch.save(checkpoint, tmp_path / "published.pth")
    adapter = load_weights(method, tmp_path / "published.pth")
    method.save(adapter, tmp_path / "written.safetensors")
    return adapter, load_weights(method, tmp_path / "written.safetensors")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), set(file.keys())


def equal(a: dict[str, LowRank], b: dict[str, LowRank]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].down, b[k].down) and torch.equal(a[k].up, b[k].up) and a[k].alpha == b[k].alpha for k in a)


def test_pisasrs_file(tmp_path):
    settings, _ = golden("pisasr_square")
    checkpoint = toys.adapter_checkpoint({**settings, "rank_sem": 2})
    adapter, again = saved(PISASR, checkpoint, tmp_path)
    published = checkpoint["state_dict_unet"]
    for layer, group in (("conv_in", "encoder"), ("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "decoder")):
        for which, layers, rank in (("pix", adapter.unet, 4), ("sem", adapter.semantic, 2)):
            assert torch.equal(layers[layer].down, published[f"{layer}.lora_A.default_{group}_{which}.weight"])
            assert torch.equal(layers[layer].up, published[f"{layer}.lora_B.default_{group}_{which}.weight"])
            assert layers[layer].rank == rank and layers[layer].scale == 8 / rank
    assert pisasr.peft_name("mid_block.x", "pix") == "default_others_pix" and adapter.vae == {} and adapter.rank_vae == 0
    assert equal(adapter.unet, again.unet) and equal(adapter.semantic, again.semantic)
    assert list(adapter.sets.items()) == [("pix", adapter.unet), ("sem", adapter.semantic)]
    written, keys = metadata(tmp_path / "written.safetensors")
    assert keys == {f"unet.{key}" for key in published}
    assert {"family": "PiSA-SR adapter", "lora_rank_unet_pix": "4", "lora_rank_unet_sem": "2", "lora_alpha": "8"}.items() <= written.items()
    assert PISASR.summary(adapter) == [
        f"  rank: 4 for pixels, 2 for semantics, on {len(adapter.unet)} layers of the UNet",
        "  fits: a base of another kind, cross-attention dimension 64",
    ]


def test_hypirs_file(tmp_path):
    checkpoint = toys.adapter_checkpoint(golden("hypir_square")[0])
    adapter, again = saved(HYPIR, checkpoint, tmp_path)
    assert adapter.unet.keys() == {key.partition(".lora_")[0] for key in checkpoint}
    assert torch.equal(adapter.unet["conv_out"].down, checkpoint["conv_out.lora_A.default.weight"])
    assert torch.equal(adapter.unet["conv_out"].up, checkpoint["conv_out.lora_B.default.weight"])
    assert adapter.unet["conv_out"].scale == again.unet["conv_out"].scale == 1 and equal(adapter.unet, again.unet)
    written, keys = metadata(tmp_path / "written.safetensors")
    assert keys == {f"unet.{key}" for key in checkpoint}
    assert {"family": "HYPIR adapter", "rank_unet": "4", "lora_alpha": "4"}.items() <= written.items()
    assert HYPIR.summary(adapter) == [
        f"  rank: 4 on {len(adapter.unet)} layers of the UNet; scale 1",
        "  fits: a base of another kind, cross-attention dimension 64",
        "  non-commercial use only",
    ]


@pytest.mark.parametrize(("method", "case"), [(PISASR, "pisasr_square"), (HYPIR, "hypir_square")])
def test_for_stable_diffusion_2(method, case, tmp_path):
    """A summary names the base by its text width."""
    adapter, _ = saved(method, toys.adapter_checkpoint(golden(case)[0]), tmp_path)
    wide = LowRank(torch.zeros(4, 1024), torch.zeros(8, 4), 4.0)
    adapter = dataclasses.replace(adapter, unet={"a.attn2.to_k": wide})
    assert "  fits: Stable Diffusion 2.x, cross-attention dimension 1024" in method.summary(adapter)


def test_what_is_a_hypir_adapter():
    halves = {f"conv_out.lora_{half}.default.weight": torch.ones(4, 4) for half in "AB"}
    assert method_of(identify(halves)) is HYPIR and method_of(identify({f"unet.{key}": half for key, half in halves.items()})) is HYPIR
    assert method_of(identify({**halves, "conv_in.lora_A.default.weight": torch.ones(4, 4)})) is HYPIR
    assert method_of(identify({**halves, "conv_in.lora_A.weight": torch.ones(4, 4)})) is not HYPIR
    assert method_of(identify({key.replace("conv_out", "conv_in"): half for key, half in halves.items()})) is not HYPIR


def test_what_is_a_pisasr_adapter():
    assert method_of(identify({"state_dict_unet": {"a.lora_A.default_encoder_pix.weight": torch.ones(4, 4)}})) is PISASR
    assert method_of(identify({"unet.a.lora_A.default_encoder_sem.weight": torch.ones(4, 4)})) is PISASR
    assert method_of(identify({"state_dict_unet": {}, "state_dict_vae": {}})) is OSEDIFF
    assert method_of(identify({"state_dict_unet": {"a.lora_A.default_encoder_pix.weight": torch.ones(4, 4)}, "state_dict_vae": {}})) is PISASR


@pytest.mark.parametrize(
    ("knobs", "calls"),
    [
        ((1, 1), [("pix", "sem")]),
        ((0.5, 0.5), [("pix", "sem")]),
        ((0, 0), [("pix", "sem")]),
        ((1, 0), [("pix",)]),
        ((0, 1), [("pix",), ("pix", "sem")]),
        ((1, 0.5), [("pix",), ("pix", "sem")]),
    ],
)
def test_calls_of_pisasr(knobs, calls):
    """None whose prediction has no weight; the equation takes what is left."""
    assert list(pisasr.calls(*knobs)) == calls
    z, eps = torch.tensor([5.0]), {("pix",): torch.tensor([1.0]), ("pix", "sem"): torch.tensor([3.0])}
    pixel, semantic = knobs
    found = PISASR.one_step.equation(z, [eps[call] for call in calls], 1, pixel=pixel, semantic=semantic)
    assert found.item() == pytest.approx(5 - (pixel * 1 + semantic * 2))
    assert PISASR.one_step.controls == ("pixel", "semantic")


def test_pisasrs_published_layout(tmp_path):
    """What is written so is read as the same, and has all that the authors' own program asks for."""
    checkpoint = toys.adapter_checkpoint({**golden("pisasr_square")[0], "rank_sem": 2})
    adapter, _ = saved(PISASR, checkpoint, tmp_path)
    pisasr.save_published(adapter, tmp_path / "again.pkl")
    state = torch.load(tmp_path / "again.pkl", weights_only=True)
    assert state["lora_rank_unet_pix"] == 4 and state["lora_rank_unet_sem"] == 2
    assert state["state_dict_unet"].keys() == checkpoint["state_dict_unet"].keys()
    for which in ("pix", "sem"):
        groups = {group: state[f"unet_lora_{group}_modules_{which}"] for group in ("encoder", "decoder", "others")}
        assert sorted(layer for layers in groups.values() for layer in layers) == sorted(adapter.unet)
        assert "conv_in" in groups["encoder"] and "conv_out" in groups["decoder"] and "mid_block.resnets.0.conv1" in groups["others"]
    again = load_weights(PISASR, tmp_path / "again.pkl")
    assert equal(again.unet, adapter.unet) and equal(again.semantic, adapter.semantic)
    other = dataclasses.replace(adapter, unet={layer: dataclasses.replace(low_rank, alpha=4.0) for layer, low_rank in adapter.unet.items()})
    with pytest.raises(ValueError, match=r"lora_alpha: found 4, expected 8 in the published layout"):
        pisasr.save_published(other, tmp_path / "none.pkl")
    assert not (tmp_path / "none.pkl").exists()


def test_which_methods_adapter_a_file_is(tmp_path):
    """The contents tell, whatever the name is."""
    for case, method in (("osediff_square", OSEDIFF), ("pisasr_square", PISASR), ("hypir_square", HYPIR), ("s3diff_square", METHODS["s3diff"])):
        (file,) = (path for path in GOLDEN.glob(f"{case}.p*"))
        found, adapter = load_adapter(file)
        assert found is method and adapter.unet.keys() == load_weights(method, file).unet.keys()
    for name, state, found in (
        ("predictor.pth", toys.predictor_state_dict(0), "an InvSR noise predictor"),
        ("net.pth", {"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "a whole UNet"),
    ):
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: found {found}; expected an adapter of one of these methods: OSEDiff, PiSA-SR, HYPIR, S3Diff"):
            load_adapter(tmp_path / name)


def test_every_file_is_loaded_by_its_own_record_alone(tmp_path):
    torch.save(toys.predictor_state_dict(0), tmp_path / "predictor.pth")
    files = [(METHODS["invsr"], tmp_path / "predictor.pth"), (OSEDIFF, GOLDEN / "osediff_square.pkl"), (HYPIR, GOLDEN / "hypir_square.pth")]
    for record, own in files:
        assert load_weights(record, own)
        contents = f" ({record.contents})" if record.contents else ""
        for other, file in files:
            if other is not record:
                words = f"found {other.kind.phrase}; expected {record.kind.phrase}{contents}. Choose another file: {record.source}"
                with pytest.raises(ValueError, match=re.escape(words)):
                    load_weights(record, file)


def test_the_noise_predictors_file(tmp_path):
    weights = toys.predictor_state_dict(0)
    torch.save(weights, tmp_path / "predictor.pth")
    invsr = METHODS["invsr"]
    invsr.save(load_weights(invsr, tmp_path / "predictor.pth"), tmp_path / "a.safetensors")
    written, keys = metadata(tmp_path / "a.safetensors")
    assert written["family"] == "InvSR noise predictor" and keys == set(weights)
    again = load_weights(invsr, tmp_path / "a.safetensors")
    assert all(torch.equal(again.state_dict[key], value) for key, value in weights.items())


@pytest.mark.parametrize("missing", ["pix", "sem"])
def test_a_set_that_is_missing_is_named(missing, tmp_path):
    checkpoint = toys.adapter_checkpoint(golden("pisasr_square")[0])
    left = {key: weight for key, weight in checkpoint["state_dict_unet"].items() if f"_{missing}." not in key}
    torch.save({"state_dict_unet": left}, tmp_path / "half.pkl")
    with pytest.raises(ValueError, match=rf"half\.pkl: UNet: the set '{missing}' is missing, expected PiSA-SR's two, 'pix' and 'sem'"):
        load_weights(PISASR, tmp_path / "half.pkl")
    with pytest.raises(ValueError, match="semantic: found no second LoRA set"):
        pisasr.PiSASRAdapter(unet={})


def test_options():
    pixel, semantic = PISASR.options
    (coeff_t,) = HYPIR.options
    for option, name in ((pixel, "pixel"), (semantic, "semantic")):
        assert (option.name, option.default, option.many, option.needed) == (name, 1.0, False, False)
        assert [option.parse(text) for text in ("-10", "0.5", "10")] == [-10, 0.5, 10]
        shown = option.widget
        assert (shown.low, shown.high, shown.step, shown.usual) == (-10, 10, 0.05, (0, 2))
        for text in ("-10.01", "10.01", "nan", "much"):
            with pytest.raises(ValueError, match=f"found {text}, expected a number from -10 to 10"):
                option.parse(text)
    assert (coeff_t.name, coeff_t.default, coeff_t.many, coeff_t.needed) == ("coeff_t", 200, False, False)
    assert coeff_t.parse("0") == 0 and coeff_t.parse("999") == 999
    assert (coeff_t.widget.low, coeff_t.widget.high, coeff_t.widget.step, coeff_t.widget.usual) == (0, 999, None, None)
    assert not PISASR.guided and not HYPIR.guided and OSEDIFF.guided  # what takes a cfg
    for text in ("-1", "1000", "12.5", ""):
        with pytest.raises(ValueError, match=f"found {text}, expected a whole number from 0 to 999"):
            coeff_t.parse(text)


def test_what_the_records_say():
    assert (PISASR.color_fix, HYPIR.color_fix) == ("adain", "wavelet")
    for method in (PISASR, HYPIR):
        assert method.base is OSEDIFF.base and method.schedule is None and method.demo is None and METHODS[method.key] is method
        assert method.prompt == "" and method.negative_prompt == ""
    assert PISASR.weights.by_hand and not HYPIR.weights.by_hand and not any(m.base.by_hand for m in METHODS.values())
    assert not OSEDIFF.weights.by_hand and HYPIR.weights.file == "HYPIR_sd2.pth"
