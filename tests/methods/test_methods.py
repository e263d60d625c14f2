"""fewstep_sr/ alone, without ComfyUI and diffusers: schedule, noise predictor, colour, canvas, posterior."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from toys import gaussian, golden, relative_error

from fewstep_sr.diffusion import alphas_cumprod, sigma_to_index, sigmas
from fewstep_sr.image.color import COLOR_FIXES, fix_color, lab, lab_to_rgb, rgb_to_lab
from fewstep_sr.image.sizes import pad_for_vae, reflect_pad
from fewstep_sr.methods import INVSR as METHOD
from fewstep_sr.methods import METHODS, OSEDIFF, osediff
from fewstep_sr.methods.schedule import parse_timesteps
from fewstep_sr.networks.noise_predictor import NoisePredictor, NoisePredictorConfig
from fewstep_sr.networks.posterior import Posterior, draw_noise

INVSR = ["invsr_steps1", "invsr_steps2", "invsr_steps3", "invsr_steps4", "invsr_steps5", "invsr_cfg"]


@pytest.mark.slow
def test_imports_nothing_but_torch():
    root = Path(__file__).resolve().parents[2]
    modules = [".".join(path.relative_to(root).with_suffix("").parts) for path in (root / "fewstep_sr").rglob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('comfy', 'diffusers', 'peft', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("case", INVSR)
def test_golden_schedule(case):
    settings, arrays = golden(case)
    indices = METHOD.schedule.indices(len(settings["timesteps"]), () if case != "invsr_cfg" else settings["timesteps"])
    assert indices == [t - 1 for t in settings["timesteps"]]
    assert relative_error(sigmas()[indices], arrays["sigmas"][:-1]) < 1e-5
    assert [sigma_to_index(s.item()) for s in arrays["sigmas"][:-1]] == indices


def test_noise_table_is_stable_diffusions():
    assert alphas_cumprod()[0].item() == pytest.approx(1 - 0.00085)
    assert sigmas()[-1].item() == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize("case", ["osediff_square", "osediff_tall"])
def test_golden_one_step_formula(case):
    """OSEDiff's x0 from its noise prediction at index 999: the table's last entry, not another."""
    settings, arrays = golden(case)
    [index] = OSEDIFF.schedule.indices(1)
    assert index == settings["timestep"]
    x0 = osediff.one_step(arrays["latent"], arrays["noise_pred"], alphas_cumprod()[index])
    assert relative_error(x0, arrays["x0"]) < 1e-4


def test_schedules():
    for steps, published in {1: [200], 2: [200, 100], 3: [200, 100, 50], 4: [200, 150, 100, 50], 5: [250, 200, 150, 100, 50]}.items():
        assert METHOD.schedule.indices(steps) == [t - 1 for t in published]
    assert METHOD.schedule.indices(10) == [249, 224, 199, 174, 149, 124, 99, 74, 49, 24]
    assert METHOD.schedule.indices(250) == list(range(249, -1, -1))
    assert METHOD.schedule.indices(3, parse_timesteps("250; 120 1")) == [249, 119, 0]
    assert OSEDIFF.schedule.indices(1) == [999]
    assert OSEDIFF.schedule.indices(2, parse_timesteps("999, 500")) == [999, 500]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("invsr", 0), "steps: found 0"),
        (("invsr", 251), "steps: found 251"),
        (("invsr", 1, "300"), "from 250 down to 1"),
        (("invsr", 1, "0"), "from 250 down to 1"),
        (("invsr", 1, "100, 200"), "smaller than the one before"),
        (("invsr", 1, "200, x"), "whole numbers"),
        (("osediff", 1, "1000"), "from 999 down to 0"),
        (("osediff", 1, "500"), "expected 999 first"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        key, steps, *timesteps = arguments
        METHODS[key].schedule.indices(steps, parse_timesteps("".join(timesteps)))


@pytest.mark.parametrize(
    ("steps", "timesteps", "message"),
    [
        ("3", (), "steps: found '3', expected a whole number"),
        (2.5, (), "steps: found 2.5"),
        (1, 200, "timesteps: found 200, expected a list"),
        (1, [200.5], "timesteps: found .200.5., expected a list of whole numbers"),
        (1, ["200"], "expected a list of whole numbers"),
    ],
)
def test_schedules_are_of_whole_numbers(steps, timesteps, message):
    with pytest.raises(ValueError, match=message):
        METHODS["invsr"].schedule.indices(steps, timesteps)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 100.0, float("nan")])
def test_sigma_outside_the_schedule(sigma):
    with pytest.raises(ValueError, match="noise schedule"):
        sigma_to_index(sigma)


@pytest.mark.parametrize("case", INVSR)
def test_golden_noise_predictor(case):
    settings, arrays = golden(case)
    seed = settings["seed"]
    state_dict = toys.predictor_state_dict(seed, settings)
    network = NoisePredictor(NoisePredictorConfig.from_state_dict(state_dict))
    network.load_state_dict(state_dict)
    image = toys.picture(seed, *settings["size"]).movedim(-1, 1) * 2 - 1
    with torch.no_grad():
        predicted = network(image, int(arrays["timestep"][0]))
    assert relative_error(predicted.mean, arrays["noise_mean"]) < 1e-4
    assert relative_error(predicted.logvar, arrays["noise_logvar"]) < 1e-4
    assert relative_error(predicted.sample(gaussian(seed, "noise_posterior:0", predicted.mean.shape)), arrays["noise"]) < 1e-4


def test_noise_predictor_dimensions_come_from_the_weights():
    config = NoisePredictorConfig(block_out_channels=(64, 128, 192), layers_per_block=(2, 1, 3), time_channels=128, temb_channels=96)
    assert NoisePredictorConfig.from_state_dict(NoisePredictor(config).state_dict()) == config


def test_noise_predictor_refuses_odd_sides():
    network = NoisePredictor(NoisePredictorConfig(block_out_channels=(64, 64), layers_per_block=(1, 1), time_channels=128, temb_channels=64))
    with pytest.raises(ValueError, match="7 x 6 pixels, expected multiples of 2"):
        network(torch.zeros(1, 3, 6, 7), 199)


@pytest.mark.parametrize("method", ["adain", "wavelet", "ycbcr"])
def test_golden_color(method):
    content, reference = (toys.picture(seed, 64, 48).movedim(-1, 1) for seed in (3, 4))
    with np.load(toys.GOLDEN / "color.npz") as arrays:
        expected = torch.from_numpy(arrays[method])
    assert relative_error(COLOR_FIXES[method](content, reference), expected) < 1e-4


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_fix_color(method):
    content, reference = torch.rand(2, 3, 9, 7), torch.rand(1, 3, 5, 5)
    assert torch.equal(fix_color(content, reference, method, strength=0.0), content)
    assert fix_color(torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1), method).isfinite().all()
    same = fix_color(content, content, method)
    assert relative_error(same, content) < 1e-3
    fixed = fix_color(content * 0.2, reference, method)
    assert abs(fixed.mean() - reference.mean()) < abs(content.mean() * 0.2 - reference.mean()) or method in ("ycbcr", "luma")


def test_lab_is_cielab():
    """Values of sRGB's primaries, of white and of a dark grey on the linear part of both curves (CIE 15:2004, IEC 61966-2-1; D65)."""
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0.02, 0.02, 0.02]]).T.reshape(1, 3, 5, 1)
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0.02 / 12.92 * 903.3, 0, 0]]
    found = rgb_to_lab(colors)
    assert (found[0, :, :, 0].T - torch.tensor(expected)).abs().max() < 0.03
    picture = torch.rand(1, 3, 9, 7)
    assert relative_error(lab_to_rgb(rgb_to_lab(picture)), picture) < 1e-4


def test_lab_takes_the_statistics_of_the_reference():
    content, reference = 0.4 + 0.2 * torch.rand(1, 3, 32, 32), 0.3 + 0.3 * torch.rand(1, 3, 32, 32)
    fixed, wanted = rgb_to_lab(lab(content, reference)), rgb_to_lab(reference)
    assert (fixed.mean((-2, -1)) - wanted.mean((-2, -1))).abs().max() < 0.05
    assert (fixed.std((-2, -1)) - wanted.std((-2, -1))).abs().max() < 0.05


def test_luma_keeps_the_luma_and_leaves_chroma_noise_behind():
    """The luma is the result's to the last digit; of the reference's chroma its mean arrives, and its noise from pixel to pixel does not."""
    weights = torch.tensor([65.481, 128.553, 24.966]) / 219
    tint = torch.tensor([0.1, -0.02, -0.1])[:, None, None]
    content = 0.3 + 0.3 * torch.rand(1, 3, 64, 64).mean(1, keepdim=True).expand(1, 3, 64, 64)
    noise = 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    reference = content + tint + noise
    fixed, by_pixel = (COLOR_FIXES[name](content, reference) for name in ("luma", "ycbcr"))
    luma_of = lambda image: torch.einsum("c,bchw->bhw", weights, image)  # noqa: E731
    assert (luma_of(fixed) - luma_of(content)).abs().max() < 1e-5
    red = lambda image: image[:, 0] - luma_of(image)  # noqa: E731
    assert abs(red(fixed).mean() - red(reference).mean()) < 0.01 < red(reference).mean()
    assert red(fixed).std() < 0.2 * red(by_pixel).std()


def test_no_method_is_the_nodes_default():
    content, reference = torch.rand(1, 3, 9, 7), torch.rand(1, 3, 9, 7)
    assert torch.equal(fix_color(content, reference), fix_color(content, reference, "adain"))


def test_fix_color_refuses():
    with pytest.raises(ValueError, match="batch of 3 pictures"):
        fix_color(torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4))
    with pytest.raises(ValueError, match="method: found 'hsv'"):
        fix_color(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), "hsv")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (16, 24), (15, 17)])
def test_padding(size):
    image = torch.rand(2, 3, *size)
    padded = pad_for_vae(image)
    assert min(padded.shape[-2:]) >= 24
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    bottom, right = padded.shape[-2] - size[0], padded.shape[-1] - size[1]
    if bottom < size[0] and right < size[1]:
        assert torch.equal(padded, torch.nn.functional.pad(image, (0, right, 0, bottom), mode="reflect"))


def test_padding_reflects_as_often_as_needed():
    assert reflect_pad(torch.tensor([[[[0.0, 1.0, 2.0]]]]), 1, 9).flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_posterior():
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 100.0)], dim=1)
    posterior = Posterior.from_moments(moments)
    assert posterior.logvar.max() == 20.0 and torch.equal(posterior.sample(torch.zeros(1, 4, 2, 2)), posterior.mean)


def test_draw_is_shared_by_a_batch_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    draw = draw_noise((5, 4, 3, 2), seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert draw.shape == (1, 4, 3, 2) and torch.equal(draw, draw_noise((1, 4, 3, 2), seed=1))
    assert not torch.equal(draw, draw_noise((1, 4, 3, 2), seed=2))
