"""Files of methods that are named and not run: recognised by the layouts that their authors' code writes, and refused with what running them would take."""

import pytest
import torch
import toys

from fewstep_sr.methods import METHODS, OSEDIFF, identify, load_weights
from fewstep_sr.weights.known import NOT_RUN
from pipelines.files import convert, describe_file

ONE = torch.zeros(1)


def peft_layers(*layers: str, before: str = "", after: str = "") -> dict:
    return {f"{before}{layer}.lora_{half}{after}.weight": ONE for layer in layers for half in "AB"}


def tadsr() -> dict:
    """OSEDiff's layout with one part more (TADSR's ``save_model``)."""
    return toys.osediff_checkpoint(seed=1, rank=4) | {"state_dict_vae_time": {"encoder.time_embedding.linear_1.weight": ONE}}


def adcsr() -> dict:
    """A Sequential of pixel-unshuffling, UNet and the decoder's middle in DataParallel (AdcSR's ``train.py``)."""
    layers = ("1.conv_in.weight", "1.down_blocks.0.resnets.0.conv1.weight", "1.body.0.resnets.0.conv1.weight", "1.mid_block.resnets.0.norm1.weight")
    return {f"module.body.{layer}": ONE for layer in (*layers, "2.attentions.0.to_q.weight", "2.resnets.0.conv1.weight")}


def resshift() -> dict:
    layers = ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight", "input_blocks.1.1.blocks.0.attn.relative_position_bias_table")
    return {layer: ONE for layer in (*layers, "time_embed.0.weight", "feature_extractor.0.weight", "out.2.weight")}


def vosr() -> dict:
    layers = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.cross_attn.q_linear.weight", "blocks.0.cross_attn.k_linear.weight")
    return {layer: ONE for layer in (*layers, "blocks.0.scale_shift_table", "mlp_ca.fc1.weight", "final_layer.linear.weight")}


FILES = {
    "tadsr": tadsr(),
    "adcsr": adcsr(),
    "omgsr": peft_layers("conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_out", before="base_model.model."),
    "tsdsr": peft_layers("pos_embed.proj", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", before="transformer."),
    "vosr": vosr(),
    "resshift": resshift(),
    "vq-autoencoder": {"encoder.down.0.block.0.conv1.weight": ONE, "decoder.conv_in.weight": ONE, "quantize.embedding.weight": ONE},
}
OTHER_FORMS = {
    "omgsr": peft_layers("conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_out.0", before="base_model.model."),
    "tsdsr": peft_layers("encoder.conv_in", "encoder.mid_block.attentions.0.to_q", before="transformer."),
    "resshift": {"state_dict": {f"module.{key}": value for key, value in resshift().items()}},
}


def test_each_has_a_file():
    assert {kind.id for kind in NOT_RUN} == set(FILES) and all(kind.lacking for kind in NOT_RUN)


@pytest.mark.parametrize("name", FILES)
def test_recognised_and_refused_with_what_is_lacking(tmp_path, name):
    kind = next(kind for kind in NOT_RUN if kind.id == name)
    for state in (FILES[name], OTHER_FORMS.get(name, FILES[name])):
        assert identify(state) == kind
    path = tmp_path / "weights.pth"
    torch.save(FILES[name], path)
    assert f"  note: {kind.lacking}" in describe_file(path)
    for method in METHODS.values():
        with pytest.raises(ValueError) as error:
            load_weights(method, path)
        assert f"found {kind.phrase} ({kind.lacking}); expected {method.kind.phrase}" in str(error.value)
        assert len(str(error.value)) < 700
    with pytest.raises(ValueError, match="not run here: |give convert the folder"):
        convert(path, tmp_path / "out.safetensors")


def test_a_tadsr_adapter_is_no_osediff_adapter(tmp_path):
    """It has all that OSEDiff's has, and would be loaded as one, to another picture, but for its one part more."""
    torch.save({key: value for key, value in tadsr().items() if key != "state_dict_vae_time"}, tmp_path / "a.pkl")
    assert load_weights(OSEDIFF, tmp_path / "a.pkl").rank_unet == 4


def test_lookalikes_are_told_apart():
    """PixArt's transformer, a LoRA of PEFT's for something else, an SD 3 LoRA, an LDM checkpoint's UNet and a plain VAE are none of these."""
    others = (
        {"x_embedder.proj.weight": ONE, "blocks.0.cross_attn.kv_linear.weight": ONE, "blocks.0.scale_shift_table": ONE},
        peft_layers("conv_in", "text_model.encoder.layers.0.mlp.fc1", before="base_model.model."),
        peft_layers("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", before="base_model.model."),
        peft_layers("transformer_blocks.0.attn.to_q", before="transformer."),
        {"input_blocks.0.0.weight": ONE, "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": ONE},
        {"encoder.down.0.block.0.conv1.weight": ONE, "decoder.conv_in.weight": ONE, "quant_conv.weight": ONE},
    )
    assert not {identify(state).id for state in others} & set(FILES)
