"""Every equation of the ground floor against numbers worked out by hand or by the authors' own code: no network runs here, so that it takes a second."""

import dataclasses
import math

import pytest
import torch
from toys import gaussian, golden, relative_error

from fewstep_sr import diffusion
from fewstep_sr.diffusion import add_noise, alpha_bar_at, alpha_bar_of, from_sigma_space, predict_x0, sigma_of, sigma_to_index, to_sigma_space
from fewstep_sr.methods import INVSR, METHODS, OSEDIFF, invsr, osediff
from fewstep_sr.networks.noise_predictor import NoisePredictorConfig

Z, NOISE = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-3.0]]]])


def test_schedule_is_stable_diffusions():
    """Values of diffusers' and ComfyUI's table (the published ones of the golden cases are checked below)."""
    table = diffusion.alphas_cumprod()
    assert table.shape == (1000,) and table.dtype == torch.float32
    expected = {0: 0.99915, 100: 0.8942232, 199: 0.7549882, 200: 0.7536917, 999: 0.0046601}
    for index, value in expected.items():
        assert table[index].item() == pytest.approx(value, rel=2e-3 if index == 199 else 1e-4)
    assert (table.diff() < 0).all() and diffusion.NUM_TRAIN_TIMESTEPS == 1000
    sigmas = diffusion.sigmas()
    assert sigmas.dtype == torch.float32 and (sigmas.diff() > 0).all()
    assert sigmas[0].item() == pytest.approx(0.029167, rel=1e-4) and sigmas[999].item() == pytest.approx(14.6146, rel=1e-4)


def test_forward_process():
    assert add_noise(Z, NOISE, 0.64).item() == pytest.approx(0.8 * 2 - 0.6 * 3)
    assert add_noise(Z, NOISE, 1.0).item() == 2 and add_noise(Z, NOISE, 0.0).item() == -3
    assert predict_x0(torch.tensor(-0.2), torch.tensor(-3.0), 0.64).item() == pytest.approx(2)
    assert predict_x0(torch.tensor(5.0), torch.tensor(1.0), 0.36).item() == pytest.approx((5 - 0.8) / 0.6)


def test_sigma_space():
    assert sigma_of(0.2) == pytest.approx(2) and alpha_bar_of(2.0) == pytest.approx(0.2)
    assert alpha_bar_of(3.0) == pytest.approx(0.1) and sigma_of(0.1) == pytest.approx(3)
    assert to_sigma_space(Z, 0.25).item() == 4 and from_sigma_space(Z, 0.25).item() == 1
    state = to_sigma_space(add_noise(Z, NOISE, 0.2), 0.2)
    assert state.item() == pytest.approx(2 + 2 * -3, rel=1e-5)  # z + sigma eps


def test_levels_of_a_batch():
    levels = alpha_bar_at(torch.tensor([0, 999, 200]), torch.zeros(3, 4, 2, 2, dtype=torch.float64))
    assert levels.shape == (3, 1, 1, 1) and levels.dtype == torch.float64
    assert torch.equal(levels.flatten().float(), diffusion.alphas_cumprod()[[0, 999, 200]])
    assert alpha_bar_at(999, Z).shape == (1, 1, 1, 1)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert relative_error(predict_x0(add_noise(latents, noise, levels.float()), noise, levels.float()), latents) < 1e-4


def test_nearest_timestep():
    sigmas = diffusion.sigmas()
    for index in (0, 1, 199, 500, 998, 999):
        assert sigma_to_index(sigmas[index].item()) == index
    between = math.exp(0.6 * math.log(sigmas[300]) + 0.4 * math.log(sigmas[301]))
    assert sigma_to_index(between) == 300  # nearest in log sigma
    assert sigma_to_index(sigmas[999].item() * 1.0005) == 999 and sigma_to_index(sigmas[0].item() * 0.9995) == 0
    for outside in (sigmas[999].item() * 1.002, sigmas[0].item() * 0.998, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="outside Stable Diffusion's noise schedule"):
            sigma_to_index(outside)


@pytest.mark.parametrize("case", ["osediff_square", "osediff_tall"])
def test_osediff_one_step(case):
    """Eq. 3 on the authors' arrays, and by hand."""
    settings, arrays = golden(case)
    assert settings["timestep"] == osediff.TIMESTEP == 999
    x0 = osediff.one_step(arrays["latent"], arrays["noise_pred"], alpha_bar_at(osediff.TIMESTEP, arrays["latent"]))
    assert relative_error(x0, arrays["x0"]) < 1e-5
    assert osediff.one_step(torch.tensor(5.0), torch.tensor(1.0), 0.36).item() == pytest.approx(4.2 / 0.6)


@pytest.mark.parametrize(("method", "control", "level"), [(OSEDIFF, {}, 600), (METHODS["hypir"], {"coeff_t": 300}, 300)])
def test_one_step_of_the_records(method, control, level):
    """From the first call's prediction alone, and at the level that is asked for."""
    z, first, second = torch.randn(3, 2, 4, 3, 5)
    found = method.one_step.equation(z, [first, second], 600, **control)
    assert torch.equal(found, predict_x0(z, first, alpha_bar_at(level, z)))
    assert method.one_step.calls(**control) == (("",),) and method.one_step.controls == tuple(control)


@pytest.mark.parametrize("case", ["invsr_steps1", "invsr_steps2", "invsr_steps3", "invsr_steps4", "invsr_steps5"])
def test_invsr_trajectory(case):
    """Eq. 8, then eq. 6 for each step, on the authors' arrays, which are in sigma space."""
    settings, arrays = golden(case)
    indices = INVSR.schedule.indices(len(settings["timesteps"]))
    latents = 0.18215 * (
        arrays["vae_mean"] + (0.5 * arrays["vae_logvar"]).exp() * gaussian(settings["seed"], "vae_posterior:0", arrays["vae_mean"].shape)
    )
    level = alpha_bar_at(indices[0], latents)
    state = invsr.start_state(latents, arrays["noise"], level)
    assert relative_error(to_sigma_space(state, level), arrays["start_state"]) < 1e-5
    for index, following in zip(indices, [*indices[1:], None], strict=True):
        level, after = alpha_bar_at(index, latents), torch.ones(1, 1, 1, 1) if following is None else alpha_bar_at(following, latents)
        state = invsr.trajectory_step(state, arrays[f"noise_pred_{index}"], level, after)
        assert relative_error(to_sigma_space(state, after), arrays[f"after_{index}"]) < 1e-5


def test_invsr_by_hand():
    assert invsr.start_state(Z, NOISE, 0.64).item() == invsr.intermediate_state(Z, NOISE, 0.64).item() == pytest.approx(-0.2)
    assert invsr.reverse_step(torch.tensor(-0.2), torch.tensor(-3.0), 0.64).item() == pytest.approx(2)
    assert invsr.trajectory_step(torch.tensor(-0.2), torch.tensor(-3.0), 0.64, 0.36).item() == pytest.approx(0.6 * 2 - 0.8 * 3)
    assert invsr.trajectory_step(torch.tensor(-0.2), torch.tensor(-3.0), 0.64, 1.0).item() == pytest.approx(2)


def test_what_is_published():
    """The records' constants, from the papers and the authors' programs."""
    assert list(METHODS) == ["osediff", "invsr", "pisasr", "hypir", "s3diff"]
    assert (INVSR.schedule.start, INVSR.schedule.origin, invsr.MAX_START) == (250, 1, 250)
    assert INVSR.schedule.published == {1: (200,), 2: (200, 100), 3: (200, 100, 50), 4: (200, 150, 100, 50), 5: (250, 200, 150, 100, 50)}
    assert (OSEDIFF.schedule.start, OSEDIFF.schedule.origin) == (999, 0) and OSEDIFF.schedule.fixed_start and not INVSR.schedule.fixed_start
    assert (OSEDIFF.color_fix, INVSR.color_fix) == ("adain", None)
    assert OSEDIFF.prompt == "" and INVSR.prompt.startswith("Cinematic, high-contrast") and "noisy,painting" in INVSR.negative_prompt
    assert (OSEDIFF.demo.call, INVSR.demo.call) == ({}, {"timesteps": (50,)})
    steps, timesteps = INVSR.options
    assert (steps.name, steps.parse("3"), steps.default, steps.many) == ("steps", 3, 1, False)
    assert (timesteps.name, timesteps.parse("250,100"), timesteps.default, timesteps.many) == ("timesteps", (250, 100), (), True)
    assert [(option.name, option.needed, option.default) for option in OSEDIFF.options] == [("tagger", True, None), ("dape", False, None)]
    assert not any(option.needed for option in INVSR.options)
    published = ["osediff.pkl", "noise_predictor_sd_turbo_v5.pth", "pisa_sr.pkl", "HYPIR_sd2.pth", "s3diff.pkl"]
    assert [m.published_name for m in METHODS.values()] == published
    assert [m.cfg for m in METHODS.values()] == [1, 1, 1, 1, 1.07]
    assert osediff.prompt_of(["cat", "fur"], "sharp") == "cat, fur, sharp," and osediff.prompt_of(["cat"]) == "cat, ,"
    assert OSEDIFF.weights.page.endswith("/osediff.pkl") and INVSR.weights.page == "https://huggingface.co/OAOA/InvSR"


def test_records_do_not_change():
    for record, field in (
        (OSEDIFF, "key"),
        (OSEDIFF.base, "size"),
        (OSEDIFF.paper, "title"),
        (OSEDIFF.options[0], "name"),
        (OSEDIFF.demo, "file"),
        (OSEDIFF.schedule, "start"),
        (OSEDIFF.one_step, "timestep"),
        (METHODS["s3diff"].companions[0], "option"),
        (METHODS["hypir"].options[0].widget, "low"),
        (OSEDIFF.published[0], "source"),
        (invsr.NoisePredictorWeights(NoisePredictorConfig(), {}), "config"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, None)


def test_the_published_name_is_the_last():
    weights = dataclasses.replace(OSEDIFF.weights, names=("a.safetensors", "b.safetensors", "c.pkl"))
    assert dataclasses.replace(OSEDIFF, weights=weights).published_name == "c.pkl"


@pytest.mark.parametrize(
    ("timesteps", "message"), [([100, 300], "from 250 down"), ([300, 100], "from 250 down"), ([100, 100], "smaller than"), ([50, 0], "down to 1")]
)
def test_timesteps_in_order_and_in_range(timesteps, message):
    with pytest.raises(ValueError, match=message):
        INVSR.schedule.indices(1, timesteps)


def test_summaries():
    low_rank = osediff.LowRank(torch.zeros(4, 1024), torch.zeros(320, 4))
    adapter = osediff.OSEDiffAdapter({"x.attn2.to_k": low_rank}, {"encoder.conv_in": low_rank}, {"conv_in.weight": torch.zeros(320, 4, 3, 3)})
    assert OSEDIFF.summary(dataclasses.replace(adapter, unet_replaced={}))[1] == "  replaces: nothing"
    assert OSEDIFF.summary(adapter) == [
        "  rank: 4 on the UNet (1 layers), 4 on the VAE's encoder (1 layers); scale 2",
        "  replaces: the UNet's conv_in",
        "  fits: Stable Diffusion 2.x, cross-attention dimension 1024",
    ]
    config = NoisePredictorConfig()
    network, fits = INVSR.summary(invsr.NoisePredictorWeights(config, {}))
    assert "3 layers of 256, 3 layers of 512 (as published)" in network and "fits: SD-Turbo" in fits
    network, fits = INVSR.summary(invsr.NoisePredictorWeights(NoisePredictorConfig(block_out_channels=(64, 64)), {}))
    assert "not the published dimensions" in network and fits == "  fits: the base that it was trained with"
