"""OMGSR-S's folder without its networks: what is read of its four files, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fewstep_sr.methods import osediff
from fewstep_sr.methods.omgsr import TIMESTEP, read_omgsr

UNET, VAE = "unet_lora_adapter", "vae_encoder_lora_adapter"


def write(folder, ranks=(6, 4), alphas=(6, 4), **config) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer, rank, alpha in ((UNET, "conv_in", ranks[0], alphas[0]), (VAE, "mid_block.attentions.0.to_k", ranks[1], alphas[1])):
        (folder / name).mkdir(parents=True, exist_ok=True)
        halves = {
            f"base_model.model.{layer}.lora_A.weight": torch.randn(rank, 3),
            f"base_model.model.{layer}.lora_B.weight": torch.randn(5, rank),
        }
        save_file(halves, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha, "use_rslora": False, **config}))
        tensors |= {f"{name}.{key}": tensor for key, tensor in halves.items()}
    return tensors


@pytest.mark.parametrize("alphas", [(6, 4), (3, 1), (0.5, 16)])
def test_alpha_of_the_configuration(tmp_path, alphas):
    """The update is alpha / rank times both halves' product, written with the alpha of OSEDiff's files."""
    tensors = write(tmp_path, alphas=alphas)
    adapter = read_omgsr(tmp_path)
    assert type(adapter) is osediff.OSEDiffAdapter and adapter.timestep == TIMESTEP == 273 and adapter.unet_replaced == {}
    assert (list(adapter.unet), list(adapter.vae)) == (["conv_in"], ["encoder.mid_block.attentions.0.to_k"])
    for name, layers, rank, alpha in ((UNET, adapter.unet, 6, alphas[0]), (VAE, adapter.vae, 4, alphas[1])):
        (low_rank,) = layers.values()
        down, up = (next(t for key, t in tensors.items() if key.startswith(name) and half in key) for half in ("lora_A", "lora_B"))
        assert low_rank.alpha == 8 and low_rank.rank == rank
        assert torch.allclose(low_rank.scale * low_rank.up @ low_rank.down, alpha / rank * up @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [f"{part}/{file}" for part in (UNET, VAE) for file in ("adapter_model.safetensors", "adapter_config.json")])
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"found no {missing}, expected OMGSR-S's folder with {UNET} and {VAE}"):
        read_omgsr(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "found no lora_alpha in it"),
        ("[]", "found no lora_alpha in it"),
        ("{}", "found no lora_alpha in it"),
        ('{"lora_alpha": "eight"}', "found no lora_alpha in it"),
        ('{"lora_alpha": 4}' + " " * (1 << 20) + "x", None),  # what lies beyond a MiB is not read
        ('{"lora_alpha": 4' + " " * (1 << 20) + "}", "found no lora_alpha in it"),
        ('{"lora_alpha": 0}', "found lora_alpha 0, expected a plain LoRA with a positive"),
        ('{"lora_alpha": -2}', "found lora_alpha -2,"),
        ('{"lora_alpha": Infinity}', "found lora_alpha inf,"),
        ('{"lora_alpha": NaN}', "found lora_alpha nan,"),
        ('{"lora_alpha": 4, "use_rslora": true}', "found use_rslora,"),
        ('{"lora_alpha": 4, "use_dora": true}', "found use_dora,"),
        ('{"lora_alpha": 4, "rank_pattern": {"a": 1}, "alpha_pattern": {"a": 1}}', "found rank_pattern, alpha_pattern,"),
        ('{"lora_alpha": 4, "rank_pattern": {}}', None),
        ('{"lora_alpha": 1e-3}', None),
    ],
)
def test_configurations(tmp_path, text, found):
    write(tmp_path)
    (tmp_path / VAE / "adapter_config.json").write_text(text)
    if found is None:
        assert read_omgsr(tmp_path).vae
    else:
        with pytest.raises(ValueError, match=f"{VAE}/adapter_config.json: {found}"):
            read_omgsr(tmp_path)


def test_weights_that_are_no_lora_are_named(tmp_path):
    write(tmp_path)
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / UNET / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{UNET}/adapter_model.safetensors: no LoRA weights"):
        read_omgsr(tmp_path)
