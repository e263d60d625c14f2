"""PiSA-SR and HYPIR through the one loader and the one step node, against the outputs of the authors' own code, with the README's wrong turns."""

from functools import cache

import pytest
import torch
import toys
from toys import conditioning, golden, picture, relative_error

TOLERANCE = 1e-4
SCALE = 0.18215


@pytest.fixture(scope="module")
def load(comfy):
    """MODEL and VAE of a golden case, its adapter put on by the loader; ``strength_model`` and others as inputs."""

    def run(case: str, **inputs):
        settings, _ = golden(case)
        seed, family = settings["seed"], case.partition("_")[0]
        file = comfy.folder(family) / f"{case}.pkl"
        if not file.exists():
            torch.save(toys.adapter_checkpoint(settings), file)
        base = {"model": toys.comfy_model(seed), "vae": toys.comfy_vae(seed)}
        return comfy.run("FewStepSRAdapterLoader", **base, adapter_name=f"{family}/{file.name}", **inputs).args

    return run


@pytest.fixture(scope="module")
def loaded(load):
    """:func:`load` once for each case."""
    return cache(load)


def step(comfy, model, latent: torch.Tensor, seed: int, **inputs) -> torch.Tensor:
    """The restored latents of scaled ones."""
    inputs = {"positive": conditioning(seed), "latent": {"samples": latent / SCALE}} | inputs
    return comfy.run("FewStepSROneStep", model=model, **inputs)[0]["samples"] * SCALE


def counted(model):
    """The model, and the list of its calls' timesteps and network inputs."""
    watched, calls = model.clone(), []

    def record(apply_model, options):
        sigma = options["timestep"]
        state = options["input"]
        denoised = apply_model(state, sigma, **options["c"])
        calls.append((model.get_model_object("model_sampling").timestep(sigma).item(), (state - denoised) / sigma.view(-1, 1, 1, 1)))
        return denoised

    watched.set_model_unet_function_wrapper(record)
    return watched, calls


@pytest.mark.parametrize("case", ["pisasr_square", pytest.param("pisasr_tall", marks=pytest.mark.slow)])
def test_pisasr(comfy, loaded, case):
    settings, arrays = golden(case)
    seed, (model, vae) = settings["seed"], loaded(case)
    enlarged = picture(seed, *settings["size"])
    assert relative_error(comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae)[0]["samples"], arrays["posterior_mean"]) < TOLERANCE
    watched, calls = counted(model)
    for pixel, semantic in settings["lambdas"]:
        calls.clear()
        name = f"{pixel:g}_{semantic:g}"
        x0 = step(comfy, watched, arrays["latent"], seed, pixel=pixel, semantic=semantic)
        assert relative_error(x0, arrays[f"x0_{name}"]) < TOLERANCE
        expected = {"1_1": ["eps_full"], "1_0": ["eps_pix"]}.get(name, ["eps_pix", "eps_full"])
        assert [timestep for timestep, _ in calls] == [1] * len(expected)
        for (_, noise_pred), array in zip(calls, expected, strict=True):
            assert relative_error(noise_pred, arrays[array]) < TOLERANCE
        (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": x0 / SCALE}, vae=vae).args
        assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays[f"image_{name}"]) < TOLERANCE
    assert relative_error(step(comfy, model, arrays["latent"], seed), arrays["x0_default"]) < TOLERANCE


def test_pisasr_wrong_turns(comfy, load, loaded):
    settings, arrays = golden("pisasr_square")
    seed, latent, (model, _) = settings["seed"], arrays["latent"], loaded("pisasr_square")
    right = arrays["x0_0.5_1.5"]
    assert relative_error(step(comfy, model, latent, seed, pixel=1.5, semantic=0.5), right) > 0.1  # the knobs swapped
    half = load("pisasr_square", strength_model=0.5)[0]
    assert relative_error(step(comfy, half, latent, seed), step(comfy, model, latent, seed, pixel=0.5, semantic=0.5)) > 0.1  # weights for outputs
    # The usual step at index 1, which OSEDiff's node would take.
    assert relative_error(comfy.run("KSampler", **sampler(model, latent, seed))[0]["samples"] * SCALE, arrays["x0_default"]) > 0.1


def sampler(model, latent, seed):
    positive, settings = conditioning(seed), {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.01}
    return {"model": model, "positive": positive, "negative": positive, "latent_image": {"samples": latent / SCALE}, **settings}


@pytest.mark.parametrize("case", ["hypir_square", pytest.param("hypir_tall", marks=pytest.mark.slow)])
def test_hypir(comfy, loaded, case):
    settings, arrays = golden(case)
    seed, (model, vae) = settings["seed"], loaded(case)
    enlarged = picture(seed, *settings["size"])
    watched, calls = counted(model)
    for model_t, coeff_t in settings["model_t_coeff_t"]:
        calls.clear()
        x0 = step(comfy, watched, arrays["latent"], seed, coeff_t=coeff_t)
        assert relative_error(x0, arrays[f"x0_{model_t}_{coeff_t}"]) < TOLERANCE
        [(timestep, noise_pred)] = calls
        assert timestep == model_t == 200 and relative_error(noise_pred, arrays["noise_pred"]) < TOLERANCE
        clamped, image = (comfy.run("FewStepSRVAEDecode", samples={"samples": x0 / SCALE}, vae=vae, clamp=clamp)[0] for clamp in (True, False))
        assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays[f"image_{model_t}_{coeff_t}"]) < TOLERANCE
        fixed, cut_first = (comfy.run("FewStepSRColorFix", image=i, reference=enlarged, method="wavelet")[0].movedim(-1, 1) for i in (image, clamped))
        assert relative_error(fixed, arrays[f"picture_{model_t}_{coeff_t}"]) < TOLERANCE
        assert relative_error(cut_first, arrays[f"picture_{model_t}_{coeff_t}"]) > 1e-3
    assert relative_error(step(comfy, model, arrays["latent"], seed), arrays["x0_200_200"]) < TOLERANCE


def test_hypir_wrong_turns(comfy, load, loaded):
    settings, arrays = golden("hypir_square")
    seed, latent, (model, _) = settings["seed"], arrays["latent"], loaded("hypir_square")
    twice = load("hypir_square", strength_model=2.0)[0]  # 8 / rank at rank 4
    assert relative_error(step(comfy, twice, latent, seed), arrays["x0_200_200"]) > 0.01
    assert relative_error(step(comfy, model, latent, seed, coeff_t=201), arrays["x0_200_200"]) > 1e-3
    assert relative_error(step(comfy, model, latent, seed, coeff_t=100), arrays["x0_200_200"]) > 0.05


def test_osediff_is_osediff_one_steps(comfy):
    settings, arrays = golden("osediff_square")
    seed = settings["seed"]
    torch.save(toys.osediff_checkpoint(seed, settings["rank"]), comfy.folder("osediff") / "family.pkl")
    base = {"model": toys.comfy_model(seed), "vae": toys.comfy_vae(seed)}
    model, vae = comfy.run("FewStepSRAdapterLoader", **base, adapter_name="osediff/family.pkl").args
    assert relative_error(step(comfy, model, arrays["latent"], seed), arrays["x0"]) < TOLERANCE
    frozen = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(seed), latent={"samples": arrays["latent"] / SCALE})[0]["samples"]
    assert relative_error(frozen * SCALE, arrays["x0"]) < TOLERANCE
    mean = comfy.run("FewStepSRVAEEncode", pixels=picture(seed, *settings["size"]), vae=vae)[0]["samples"]
    assert relative_error(mean, arrays["posterior_mean"]) < TOLERANCE
