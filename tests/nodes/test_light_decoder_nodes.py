"""Converted half-width decoders and TAESD in ComfyUI: core's Load VAE, and our nodes, whole and tiled."""

import pytest
import safetensors.torch
import torch
import toys
from stable_diffusion import random_weights, vae_shapes
from toys import GOLDEN, golden, relative_error

from fewstep_sr.weights.vae import coder_shapes
from pipelines.files import convert

TOLERANCE = 1e-4
SCALE = 0.18215
FILES = {"adcsr": "lightdecoder_adcsr.ckpt", "vosr": "lightdecoder_vosr.pth"}
SMALL = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0}
ENCODER = SMALL | {"ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}
DECODER = SMALL | {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 2}
PUBLISHED = (64, 128, 256, 256)


def small_vae(family: str, folder):
    """Core's VAE around the converted file; a width below the published ones has to be said."""
    import comfy.sd

    seed = golden(f"lightdecoder_{family}")[0]["seed"]
    safetensors.torch.save_file(toys.vae_state_dict(seed), folder / "base.safetensors")
    convert(GOLDEN / FILES[family], folder / "vae.safetensors", vae=folder / "base.safetensors")
    config = {"params": {"ddconfig": ENCODER, "decoder_ddconfig": DECODER, "embed_dim": 4}}
    return comfy.sd.VAE(sd=safetensors.torch.load_file(folder / "vae.safetensors"), config=config)


@pytest.mark.parametrize("family", FILES)
def test_decoded_as_the_authors_do(comfy, tmp_path, family):
    vae, (_, arrays) = small_vae(family, tmp_path), golden(f"lightdecoder_{family}")
    (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": arrays["latent"] / SCALE}, vae=vae).args
    assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays["image"]) < TOLERANCE


@pytest.mark.parametrize("family", FILES)
def test_the_other_treatment_of_post_quant_conv(comfy, tmp_path, family):
    vae, (_, arrays) = small_vae(family, tmp_path), golden(f"lightdecoder_{family}")
    own = toys.vae_state_dict(golden(f"lightdecoder_{family}")[0]["seed"])
    with torch.no_grad():
        vae.first_stage_model.post_quant_conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1) if family == "adcsr" else own["post_quant_conv.weight"])
        vae.first_stage_model.post_quant_conv.bias.copy_(torch.zeros(4) if family == "adcsr" else own["post_quant_conv.bias"])
    (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": arrays["latent"] / SCALE}, vae=vae).args
    assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays["image"]) > 0.5


def test_encodes_as_the_base(comfy, tmp_path):
    vae, base = small_vae("adcsr", tmp_path), toys.comfy_vae(golden("lightdecoder_adcsr")[0]["seed"])
    pixels = toys.picture(3, 72, 56)
    light, whole = (comfy.run("FewStepSRVAEEncode", pixels=pixels, vae=each)[0]["samples"] for each in (vae, base))
    assert relative_error(light, whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", FILES)
def test_tiled_against_whole(comfy, tmp_path, family):
    vae = small_vae(family, tmp_path)
    base = toys.comfy_vae(golden(f"lightdecoder_{family}")[0]["seed"])
    latent = {"samples": toys.gaussian(7, "latent", (1, 4, 24, 20)).mul(0.5)}

    def difference(vae) -> float:
        whole, tiled = (comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae, tile_size=size)[0] for size in (8192, 128))
        return relative_error(tiled, whole)

    assert 0 < difference(vae) < max(0.05, 1.5 * difference(base))


@pytest.mark.slow
@pytest.mark.parametrize("family", FILES)
def test_published_widths_load_by_themselves(comfy, tmp_path, family):
    """Core reads the decoder's width off the file: Load VAE, then our nodes, whole and tiled."""
    import folder_paths

    names = {f"decoder.up_blocks.{i}.resnets.{j}.conv2.weight": torch.zeros(PUBLISHED[3 - i], 1) for i in range(4) for j in range(3)}
    decoder = random_weights(coder_shapes(names, "decoder", "decoder"), seed=1)
    if family == "adcsr":
        torch.save({"state_dict": {f"decoder.{key}": value for key, value in decoder.items()}, "epoch": 1}, tmp_path / "light.pth")
    else:
        torch.save({"config": {"block_out_channels": list(PUBLISHED)}, "model_state_dict": decoder}, tmp_path / "light.pth")
    safetensors.torch.save_file(
        {f"first_stage_model.{key}": value for key, value in random_weights(vae_shapes(), 0).items()}, tmp_path / "base.safetensors"
    )
    folder_paths.add_model_folder_path("vae", str(tmp_path))
    convert(tmp_path / "light.pth", tmp_path / f"{family}.safetensors", vae=tmp_path / "base.safetensors")
    folder_paths.filename_list_cache.clear()
    (vae,) = comfy.run("VAELoader", vae_name=f"{family}.safetensors")
    network = vae.first_stage_model
    assert [network.decoder.up[i].block[0].conv2.weight.shape[0] for i in range(4)] == list(PUBLISHED)
    assert network.encoder.conv_out.weight.shape == (8, 512, 3, 3) and len(network.decoder.up[0].block) == 3
    assert torch.equal(network.decoder.conv_in.weight.float().cpu(), decoder["conv_in.weight"].float())
    weight = network.post_quant_conv.weight.float().cpu().flatten(1)
    assert torch.equal(weight, torch.eye(4)) == (family == "vosr")
    (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": toys.gaussian(1, "latent", (1, 4, 4, 6))}, vae=vae).args
    assert image.shape == (1, 32, 48, 3) and image.std() > 0.01


def taesd(comfy):
    import comfy.sd
    import comfy.taesd.taesd

    shapes = {key: tuple(value.shape) for key, value in comfy.taesd.taesd.TAESD().state_dict().items() if value.ndim}
    sd = toys.weights(5, "taesd", shapes) | {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=sd)


def test_taesd_decodes(comfy):
    """As core's Load VAE builds it from models/vae_approx; whole, and in tiles that see as much as it needs around them."""
    vae = taesd(comfy)
    latent = {"samples": toys.gaussian(7, "latent", (1, 4, 24, 20))}
    (core,) = comfy.run("VAEDecode", samples=latent, vae=vae)
    whole, tiled = (comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae, tile_size=size)[0] for size in (8192, 128))
    assert relative_error(whole, core) < 1e-5
    assert 0 < relative_error(tiled, whole) < 0.1  # random weights look further than trained ones


def test_taesd_is_refused_where_a_posterior_is_needed(comfy, tmp_path):
    vae = taesd(comfy)
    with pytest.raises(ValueError, match="vae: found TAESD, which has no posterior, expected Stable Diffusion's AutoencoderKL"):
        comfy.run("FewStepSRVAEEncode", pixels=toys.picture(1, 64, 64), vae=vae)
    torch.save(toys.osediff_checkpoint(1, 4), comfy.folder("osediff") / "taesd_osediff.pkl")
    with pytest.raises(ValueError, match="vae: .*load SD 2.1-base"):
        comfy.run("OSEDiffLoader", model=toys.comfy_model(1), vae=vae, osediff_name="taesd_osediff.pkl")
