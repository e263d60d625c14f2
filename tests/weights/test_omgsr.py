"""OMGSR-S: the folder that PEFT writes becomes one file, which restores as the adapted networks themselves do."""

import json
import shutil

import pipeline_toys
import pytest
import torch
import toys
from peft import LoraConfig, PeftModel
from toys import gaussian, relative_error

from fewstep_sr.diffusion import alphas_cumprod
from fewstep_sr.methods import OSEDIFF, load_weights
from fewstep_sr.methods.omgsr import TIMESTEP, read_omgsr
from pipelines import OSEDiffPipeline
from pipelines.cli import main

SEED = 3
TARGETS = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"]
RANKS = {"unet_lora_adapter": 6, "vae_encoder_lora_adapter": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters with weights of their own as OMGSR's training makes and saves them, and the networks that they are on."""
    folder, adapted = tmp_path_factory.mktemp("omgsr"), []
    for (name, rank), network in zip(RANKS.items(), (pipeline_toys.unet(SEED), pipeline_toys.vae(SEED).encoder), strict=True):
        model = PeftModel(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"), adapter_name=name)
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.data.copy_(toys.weights(SEED, "omgsr", {key: tuple(parameter.shape)})[key])
        model.save_pretrained(folder)
        adapted.append(model)
    return folder, *adapted


def test_restores_as_the_adapted_networks_do(trained, tmp_path):
    """x0 = (z - sqrt(1 - a) UNet(z, 273)) / sqrt(a), of a latent by the adapted encoder."""
    folder, unet, encoder = trained
    assert main(["convert", str(folder), "-o", str(tmp_path / "omgsr.safetensors")]) == 0
    pipeline = OSEDiffPipeline(**pipeline_toys.components(SEED))
    pipeline.load_osediff(tmp_path / "omgsr.safetensors")
    image, embeds = toys.picture(SEED, 64, 64).movedim(-1, 1), gaussian(SEED, "prompt_embeds", (1, 77, 64))
    vae = pipeline_toys.vae(SEED)
    alpha_bar = alphas_cumprod()[TIMESTEP]
    with torch.no_grad():
        mean = vae.quant_conv(encoder(image * 2 - 1))[:, :4] * 0.18215
        eps = unet(mean, TIMESTEP, encoder_hidden_states=embeds).sample
    latents = pipeline.encode(image)
    assert relative_error(latents, mean) < 1e-5
    expected = (mean - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    assert relative_error(pipeline.one_step(latents, embeds), expected) < 1e-4
    assert relative_error(pipeline.one_step(latents, embeds, timestep=999), expected) > 0.1
    with torch.no_grad():
        bare = pipeline_toys.unet(SEED)(mean, TIMESTEP, encoder_hidden_states=embeds).sample
    assert relative_error(bare, eps) > 0.1  # the adapter does something


def test_through_the_nodes(comfy, trained, tmp_path):
    folder, unet, _ = trained
    assert main(["convert", str(folder), "-o", str(comfy.folder("osediff") / "omgsr.safetensors")]) == 0
    model, _ = comfy.run("OSEDiffLoader", model=toys.comfy_model(SEED), vae=toys.comfy_vae(SEED), osediff_name="omgsr.safetensors").args
    latents, embeds = gaussian(SEED, "latent", (1, 4, 8, 8)), gaussian(SEED, "prompt_embeds", (1, 77, 64))
    positive = toys.conditioning(SEED)
    (restored,) = comfy.run("OSEDiffOneStep", model=model, positive=positive, latent={"samples": latents / 0.18215}, timestep=TIMESTEP).args
    alpha_bar = alphas_cumprod()[TIMESTEP]
    with torch.no_grad():
        expected = (latents - (1 - alpha_bar).sqrt() * unet(latents, TIMESTEP, encoder_hidden_states=embeds).sample) / alpha_bar.sqrt()
    assert relative_error(restored["samples"] * 0.18215, expected) < 1e-4


def test_what_the_file_says(trained, tmp_path, capsys):
    folder, *_ = trained
    assert main(["convert", str(folder), "-o", str(tmp_path / "omgsr.safetensors")]) == 0
    adapter = load_weights(OSEDIFF, tmp_path / "omgsr.safetensors")
    assert (adapter.rank_unet, adapter.rank_vae, adapter.timestep, adapter.unet_replaced) == (6, 4, 273, {})
    assert main(["info", str(tmp_path / "omgsr.safetensors"), str(folder / "unet_lora_adapter" / "adapter_model.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "replaces: nothing" in text and "timestep: 273" in text and "one of an OMGSR-S adapter's two files" in text
    assert main(["convert", str(folder), "-o", str(tmp_path / "omgsr.safetensors")]) == 2  # not written over


def test_where_a_folders_file_goes(trained, tmp_path, capsys):
    folder = tmp_path / "OMGSR-S_v1.5"
    shutil.copytree(trained[0], folder)
    assert main(["convert", str(folder), "-o", str(tmp_path / "omgsr.pth")]) == 2
    assert "-o: found omgsr.pth, expected a name that ends in .safetensors" in capsys.readouterr().err and not (tmp_path / "omgsr.pth").exists()
    assert main(["convert", str(folder)]) == 0 and (tmp_path / "OMGSR-S_v1.5.safetensors").is_file()


def test_what_is_no_such_folder(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no unet_lora_adapter/adapter_model\.safetensors, expected OMGSR-S's folder"):
        read_omgsr(tmp_path)
    folder, *_ = trained
    copy = tmp_path / "copy"
    for name in RANKS:
        (copy / name).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (copy / name / path.name).write_bytes(path.read_bytes())
    config = copy / "unet_lora_adapter" / "adapter_config.json"
    original = json.loads(config.read_text())
    for text, message in (
        ("{", "found no lora_alpha in it"),
        (json.dumps(original | {"lora_alpha": -1}), "found lora_alpha -1, expected a plain LoRA"),
        (json.dumps(original | {"use_rslora": True}), "found use_rslora, expected a plain LoRA"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=f"unet_lora_adapter/adapter_config.json: {message}"):
            read_omgsr(copy)
