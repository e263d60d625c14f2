"""The pipelines with half-width decoders, against what the authors' own code decodes."""

import pipeline_toys
import pytest
import safetensors.torch
import torch
import toys
from PIL import Image
from toys import GOLDEN, golden, relative_error

from pipelines import OSEDiffPipeline, PiSASRPipeline
from pipelines.cli import main
from pipelines.done import settings_to_record
from pipelines.files import convert
from pipelines.settings import Settings
from pipelines.tiling import Tiling

TOLERANCE = 1e-4
FILES = {"adcsr": "lightdecoder_adcsr.ckpt", "vosr": "lightdecoder_vosr.pth"}


def pipeline_for(family: str):
    settings, arrays = golden(f"lightdecoder_{family}")
    return OSEDiffPipeline(**pipeline_toys.components(settings["seed"])), arrays


def merged_file(family: str, folder):
    seed = golden(f"lightdecoder_{family}")[0]["seed"]
    safetensors.torch.save_file(toys.vae_state_dict(seed), folder / "base.safetensors")
    convert(GOLDEN / FILES[family], folder / "vae.safetensors", vae=folder / "base.safetensors")
    return folder / "vae.safetensors"


@pytest.mark.parametrize("form", ["raw", pytest.param("merged", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FILES)
def test_decoded_as_the_authors_do(tmp_path, family, form):
    pipeline, arrays = pipeline_for(family)
    own = pipeline.decode(arrays["latent"])
    pipeline.load_decoder(GOLDEN / FILES[family] if form == "raw" else merged_file(family, tmp_path))
    assert relative_error(pipeline.decode(arrays["latent"]) * 2 - 1, arrays["image"]) < TOLERANCE
    pipeline.clamps_decoded = False
    assert relative_error(pipeline.decode(arrays["latent"]) * 2 - 1, arrays["image_unclamped"]) < TOLERANCE
    pipeline.clamps_decoded = True
    pipeline.unload_decoder()
    assert torch.equal(pipeline.decode(arrays["latent"]), own)


@pytest.mark.parametrize("family", FILES)
def test_the_other_treatment_of_post_quant_conv(family):
    """Nothing in the files says which it is, and the wrong one is another picture."""
    pipeline, arrays = pipeline_for(family)
    pipeline.load_decoder(GOLDEN / FILES[family])
    if family == "adcsr":
        with torch.no_grad():
            pipeline.vae.post_quant_conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
            pipeline.vae.post_quant_conv.bias.zero_()
    else:
        pipeline.vae.post_quant_conv = pipeline._own_decoder["post_quant_conv"]
    assert relative_error(pipeline.decode(arrays["latent"]) * 2 - 1, arrays["image"]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", FILES)
def test_tiled_against_whole(family):
    """As near as the base's own decoder is on the same tiles."""
    pipeline, _ = pipeline_for(family)
    latents = 0.18215 * toys.gaussian(7, "latent", (1, 4, 24, 20)).mul(0.5)

    def difference() -> float:
        pipeline.disable_tiling()
        whole = pipeline.decode(latents)
        pipeline._tiling = Tiling(tile=16)  # smaller ones than a user may choose, for a smaller picture
        return relative_error(pipeline.decode(latents), whole)

    own = difference()
    pipeline.load_decoder(GOLDEN / FILES[family])
    assert difference() < max(0.05, 1.5 * own)


@pytest.mark.slow
def test_saved_without_it(tmp_path):
    """As a tagger, it is not saved with the pipeline, which goes on with it."""
    pipeline, arrays = pipeline_for("vosr")
    own = pipeline.decode(arrays["latent"])
    pipeline.load_decoder(GOLDEN / FILES["vosr"])
    light = pipeline.decode(arrays["latent"])
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline.decode(arrays["latent"]), light)
    assert relative_error(OSEDiffPipeline.from_pretrained(tmp_path / "saved").decode(arrays["latent"]), own) < 1e-6


def test_with_an_adapter_on_the_encoder(tmp_path):
    pipeline, arrays = pipeline_for("adcsr")
    torch.save(toys.osediff_checkpoint(golden("lightdecoder_adcsr")[0]["seed"], 4), tmp_path / "osediff.pkl")
    pipeline.load_osediff(tmp_path / "osediff.pkl")
    pipeline.load_decoder(GOLDEN / FILES["adcsr"])
    pipeline.fuse()
    image = toys.picture(2, 64, 64).movedim(-1, 1)
    latents = pipeline.encode(image)
    assert relative_error(pipeline.decode(arrays["latent"]) * 2 - 1, arrays["image"]) < TOLERANCE
    pipeline.unload_decoder()
    assert torch.equal(pipeline.encode(image), latents)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"1.conv.0.weight": torch.zeros(1)}, "TAESD, a tiny autoencoder for previews"),
        ({"encoder.layers.0.weight": torch.zeros(1)}, "TAESD"),
        ({"lora_unet_a.lora_down.weight": torch.zeros(1)}, "a LoRA"),
    ],
)
def test_what_is_no_decoder_is_refused(tmp_path, content, found):
    pipeline, arrays = pipeline_for("vosr")
    own = pipeline.decode(arrays["latent"])
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"decoder: found {found}.* in other.pth, expected AdcSR's or VOSR's decoder, or a VAE"):
        pipeline.load_decoder(tmp_path / "other.pth")
    assert torch.equal(pipeline.decode(arrays["latent"]), own)


@pytest.mark.slow
def test_on_the_command_line(tmp_path, capsys):
    """``--decoder`` reaches the pipeline, and a result knows it."""
    base = PiSASRPipeline(**pipeline_toys.components(2, tmp_path / "tokenizer"))
    base.save_pretrained(tmp_path / "base")
    torch.save(toys.adapter_checkpoint(golden("pisasr_square")[0]), tmp_path / "pisa_sr.pkl")
    Image.fromarray((toys.picture(1, 16, 16)[0] * 255).byte().numpy()).save(tmp_path / "a.png")
    command = ["upscale", str(tmp_path / "a.png"), "--method", "pisasr", "--base", str(tmp_path / "base"), "--weights", str(tmp_path / "pisa_sr.pkl")]
    command += ["--device", "cpu", "--scale", "1"]
    assert main([*command, "-o", str(tmp_path / "own.png")]) == 0
    assert main([*command, "-o", str(tmp_path / "light.png"), "--decoder", str(GOLDEN / FILES["vosr"])]) == 0
    assert (tmp_path / "own.png").read_bytes() != (tmp_path / "light.png").read_bytes()
    assert main([*command, "-o", str(tmp_path / "b.png"), "--decoder", str(tmp_path / "none.pth")]) == 2
    assert "--decoder: there is no file" in capsys.readouterr().err
    assert main(["upscale", str(tmp_path / "a.png"), "--demo", "--decoder", str(GOLDEN / FILES["vosr"])]) == 2
    assert "--demo: found --decoder" in capsys.readouterr().err


def test_results_of_another_decoder_are_done_again(tmp_path):
    settings = {"inputs": ("a.png",), "output": None, "method": PiSASRPipeline.method, "options": {}}
    path = GOLDEN / FILES["vosr"]
    record = settings_to_record(Settings(**settings, decoder=path), tmp_path / "a.png")
    assert record["decoder"].startswith("lightdecoder_vosr.pth (") and "decoder" not in settings_to_record(Settings(**settings), tmp_path / "a.png")
