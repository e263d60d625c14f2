"""The miniature: that it is whole and small, the same in nodes and pipelines, and that it restores."""

import importlib.util

import pytest
import torch
from conftest import ROOT
from toys import relative_error

from fewstep_sr import miniature

PHOTOS = ROOT / "tests" / "data" / "photos"


def picture(name: str = "chelsea") -> torch.Tensor:
    """A quarter of a photo, IMAGE (1, h, w, 3)."""
    import numpy as np
    from PIL import Image

    photo = Image.open(PHOTOS / f"{name}.png").resize((48, 40), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(photo).copy())[None].float() / 255


def test_at_most_24_mb():
    files = list(miniature.FOLDER.rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 24e6
    assert miniature.find(miniature.PHOTO) and (miniature.FOLDER / "README.md").is_file()


def test_an_incomplete_copy_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(miniature, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="unet/x.safetensors is not in .* install it again"):
        miniature.find("unet/x.safetensors")


@pytest.mark.slow
def test_osediff_in_nodes_and_pipeline(comfy):
    from pipelines.demo import load_demo

    image = picture("coffee")
    model, vae, prompt, _, photo = comfy.run("FewStepSRDemoLoader", method="OSEDiff").args
    assert photo.shape == (1, 75, 112, 3)
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=4.0)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae).args
    (restored,) = comfy.run("OSEDiffOneStep", model=model, positive=prompt, latent=latent, timestep=249).args
    (found,) = comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae).args

    pipeline, prompt_embeds = load_demo("osediff")
    expected = pipeline(image.movedim(-1, 1), prompt_embeds=prompt_embeds, color_fix=None, output_type="pt").images
    assert relative_error(found.movedim(-1, 1), expected) < 1e-4


def test_wrong_timestep_is_said(comfy, caplog):
    """Left at the published adapters' timestep, the demo's would restore badly without a word."""
    model, _, prompt, _, _ = comfy.run("FewStepSRDemoLoader", method="OSEDiff").args
    latent = {"samples": torch.zeros(1, 4, 8, 8).index_fill(3, torch.tensor([0]), 1.0)}
    comfy.run("OSEDiffOneStep", model=model, positive=prompt, latent=latent, timestep=249)
    assert "timestep" not in caplog.text
    comfy.run("OSEDiffOneStep", model=model, positive=prompt, latent=latent)
    assert "timestep: found 999, expected 249, this adapter's. Set it to 249." in caplog.text


def test_nodes_and_pipeline(comfy):
    from pipelines.demo import load_demo

    image = picture("coffee")
    model, vae, prompt, predictor, _ = comfy.run("FewStepSRDemoLoader").args
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=4.0)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae).args
    (sigmas,) = comfy.run("FewStepScheduler", model=model, method="InvSR", steps=2).args
    start = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, seed=77)
    (guider,) = comfy.run("BasicGuider", model=model, conditioning=prompt)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
    sampled = comfy.run("SamplerCustomAdvanced", noise=start[0], guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
    (found,) = comfy.run("FewStepSRVAEDecode", samples=sampled, vae=vae).args

    pipeline, prompt_embeds = load_demo()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(77)
    settings = {"num_inference_steps": 2, "generator": generator, "prompt_embeds": prompt_embeds, "output_type": "pt"}
    assert relative_error(found.movedim(-1, 1), pipeline(image.movedim(-1, 1), **settings).images) < 1e-4


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["published degradations", "mild ones"])
def figures(request):
    pytest.importorskip("piq", reason="piq is not installed (pip install -r requirements-dev.txt)")
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)
    names = {"bicubic", "OSEDiff", "InvSR"}
    # with fewer seeds, chance decides about the third digit
    return request.param, quality.measure(sorted(PHOTOS.glob("*.png")), seeds=12, names=names, mild=request.param)


LIMITS = {
    ("OSEDiff", 0.0): {"GMSD": 0.0, "HaarPSI": 0.01, "FSIM": 0.005, "PSNR": -1.5},
    ("OSEDiff", 1.0): {"GMSD": 0.007, "HaarPSI": -0.012, "FSIM": -0.006, "PSNR": -0.5},
    ("InvSR", 0.0): {"GMSD": 0.004, "HaarPSI": -0.004, "FSIM": 0.007, "PSNR": -0.3},
    ("InvSR", 1.0): {"GMSD": 0.0, "HaarPSI": -0.012, "FSIM": 0.006, "PSNR": -0.5},
}
"""Beyond bicubic enlargement: OSEDiff restores strong degradations, InvSR is for those that cameras have; the other way round they may cost a little."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["OSEDiff", "InvSR"])
def test_restores_held_out_photos(figures, method):
    """More of the structure than bicubic enlargement, by GMSD (better when lower) and FSIM, where the method is at home; nowhere at fidelity's cost."""
    mild, table = figures
    gain = {metric: table[method][metric] - table["bicubic"][metric] for metric in LIMITS[method, mild]}
    assert gain.pop("GMSD") < LIMITS[method, mild]["GMSD"]
    assert all(gain[metric] > LIMITS[method, mild][metric] for metric in gain), gain


@pytest.mark.slow
@pytest.mark.parametrize("method", [[], ["--method", "osediff"]], ids=["invsr", "osediff"])
def test_command(tmp_path, method):
    from PIL import Image

    from pipelines.cli import main

    with Image.open(miniature.find(miniature.PHOTO)) as photo:
        photo.save(tmp_path / "photo.png")
        width, height = photo.size
    assert main(["upscale", str(tmp_path / "photo.png"), "--demo", *method]) == 0
    assert Image.open(tmp_path / "photo_x4.png").size == (4 * width, 4 * height)


def test_no_such_method():
    from pipelines.demo import load_demo

    with pytest.raises(ValueError, match="method: found 'osedif', expected 'invsr' or 'osediff'"):
        load_demo("osedif")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--demo", "--prompt", "cat"], "--demo: found --prompt, but the miniature is a base of its own with one prompt"),
        (["--demo", "--cfg", "2"], "--cfg: found 2, expected 1 with --demo"),
    ],
)
def test_command_refuses_what_the_miniature_lacks(options, message, capsys, tmp_path):
    from pipelines.cli import main

    assert main(["upscale", str(miniature.find(miniature.PHOTO)), "-o", str(tmp_path / "out.png"), *options]) == 2
    assert message in capsys.readouterr().err
