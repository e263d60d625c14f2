"""The nodes in a real ComfyUI against the outputs of the authors' own code, stage by stage."""

import shutil

import pytest
import torch
import toys
from toys import GOLDEN, conditioning, gaussian, golden, relative_error

TOLERANCE = 1e-4
SCALE = 0.18215


@pytest.fixture(scope="module")
def draw(comfy):
    """Replaces the random draw of the posteriors by given ones: the golden draws are procedural, not a generator's."""
    patch = pytest.MonkeyPatch()

    def use(node_module: str, noise: torch.Tensor):
        patch.setattr(comfy.module(f".nodes.{node_module}"), "draw_noise", lambda shape, seed: noise)

    yield use
    patch.undo()


@pytest.fixture(scope="module")
def osediff(comfy):
    """The adapted MODEL and VAE of a golden case, through OSEDiffLoader."""
    loaded = {}

    def load(case: str):
        if case not in loaded:
            settings, _ = golden(case)
            seed = settings["seed"]
            name = f"{case}.pkl"
            if (GOLDEN / name).exists():
                shutil.copy(GOLDEN / name, comfy.folder("osediff"))
            else:
                torch.save(toys.osediff_checkpoint(seed, settings["rank"]), comfy.folder("osediff") / name)
            loaded[case] = comfy.run("OSEDiffLoader", model=toys.comfy_model(seed), vae=toys.comfy_vae(seed), osediff_name=name).args
        return loaded[case]

    return load


OSEDIFF = ["osediff_square", "osediff_tall"]


@pytest.mark.parametrize("case", OSEDIFF)
def test_osediff_encode(comfy, osediff, draw, case):
    settings, arrays = golden(case)
    _, vae = osediff(case)
    pixels = toys.picture(settings["seed"], *settings["size"])
    (mean,) = comfy.run("FewStepSRVAEEncode", pixels=pixels, vae=vae).args
    assert relative_error(mean["samples"], arrays["posterior_mean"]) < TOLERANCE
    draw("vae", gaussian(settings["seed"], "vae_posterior", arrays["latent"].shape))
    (sample,) = comfy.run("FewStepSRVAEEncode", pixels=pixels, vae=vae, posterior="sample").args
    assert relative_error(sample["samples"] * SCALE, arrays["latent"]) < TOLERANCE


@pytest.mark.parametrize("case", OSEDIFF)
def test_osediff_one_step(comfy, osediff, case):
    settings, arrays = golden(case)
    model, _ = osediff(case)
    latent = {"samples": arrays["latent"] / SCALE}
    (restored,) = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(settings["seed"]), latent=latent).args
    assert relative_error(restored["samples"] * SCALE, arrays["x0"]) < TOLERANCE


@pytest.mark.parametrize("case", OSEDIFF)
def test_osediff_noise_prediction(comfy, osediff, case):
    """The UNet's output itself: 999 is index 999."""
    settings, arrays = golden(case)
    model, _ = osediff(case)
    seen = []

    def record(apply_model, options):
        seen.append((options["timestep"], options["input"], result := apply_model(options["input"], options["timestep"], **options["c"])))
        return result

    watched = model.clone()
    watched.set_model_unet_function_wrapper(record)
    comfy.run("OSEDiffOneStep", model=watched, positive=conditioning(settings["seed"]), latent={"samples": arrays["latent"] / SCALE})
    [(sigma, state, denoised)] = seen
    assert model.get_model_object("model_sampling").timestep(sigma).item() == settings["timestep"] == 999
    assert relative_error((state - denoised) / sigma, arrays["noise_pred"]) < TOLERANCE


@pytest.mark.parametrize("case", OSEDIFF)
def test_osediff_through_core_sampler(comfy, osediff, case):
    settings, arrays = golden(case)
    model, _ = osediff(case)
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent={"samples": arrays["latent"] / SCALE}).args
    (sigmas,) = comfy.run("FewStepScheduler", model=model, method="OSEDiff").args
    restored = sample(comfy, model, conditioning(settings["seed"]), noise, sigmas, blank)
    assert relative_error(restored["samples"] * SCALE, arrays["x0"]) < TOLERANCE


@pytest.mark.parametrize("case", OSEDIFF)
def test_osediff_decode(comfy, osediff, case):
    _, arrays = golden(case)
    _, vae = osediff(case)
    (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": arrays["x0"] / SCALE}, vae=vae).args
    assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays["image"]) < TOLERANCE


def sample(comfy, model, positive, noise, sigmas, latent, negative=None, cfg=1.0):
    """Core's SamplerCustomAdvanced with euler."""
    if negative is None:
        guider = comfy.run("BasicGuider", model=model, conditioning=positive)[0]
    else:
        guider = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
    return comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]


INVSR = ["invsr_steps1", "invsr_steps2", "invsr_steps3", "invsr_steps4", "invsr_steps5", "invsr_cfg"]


@pytest.fixture(scope="module")
def invsr(comfy):
    """MODEL, VAE and NOISE_PREDICTOR of a golden case."""
    loaded = {}

    def load(case: str):
        settings, _ = golden(case)
        seed = settings["seed"]
        if seed not in loaded:
            torch.save(toys.predictor_state_dict(seed, settings), comfy.folder("invsr") / f"predictor_{seed}.pth")
            (predictor,) = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name=f"predictor_{seed}.pth").args
            loaded[seed] = toys.comfy_model(seed), toys.comfy_vae(seed), predictor
        return loaded[seed]

    return load


@pytest.mark.parametrize("case", INVSR)
def test_invsr(comfy, invsr, draw, case):
    settings, arrays = golden(case)
    seed = settings["seed"]
    model, vae, predictor = invsr(case)
    image = toys.picture(seed, *settings["size"])

    # Schedule: the published 200 is index 199.
    steps = len(settings["timesteps"])
    own = ", ".join(map(str, settings["timesteps"]))
    (sigmas,) = comfy.run("FewStepScheduler", model=model, method="InvSR", steps=steps, timesteps=own if case == "invsr_cfg" else "").args
    assert sigmas.shape == arrays["sigmas"].shape and relative_error(sigmas, arrays["sigmas"]) < TOLERANCE

    # Encode: core's bicubic enlargement, then the posterior.
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=4.0)
    (mean,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae).args
    assert relative_error(mean["samples"], arrays["vae_mean"]) < TOLERANCE
    draw("vae", gaussian(seed, "vae_posterior:0", arrays["vae_mean"].shape))
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae, posterior="sample").args

    # Start state (eq. 8).
    (mean_noise, _) = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, posterior="mean").args
    assert relative_error(mean_noise.generate_noise(latent), arrays["noise_mean"]) < TOLERANCE
    draw("invsr", gaussian(seed, "noise_posterior:0", arrays["noise"].shape))
    (noise, start) = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas).args
    assert relative_error(noise.generate_noise(latent), arrays["noise"]) < TOLERANCE
    assert relative_error(start["samples"] * SCALE, arrays["start_state"]) < TOLERANCE

    # Every step, then the picture; the negative prompt only where there is guidance.
    negative = conditioning(seed, "negative_prompt_embeds") if settings["cfg_scale"] > 1 else None
    states = []
    watched = model.clone()
    watched.set_model_unet_function_wrapper(
        lambda apply, o: (states.append((o["timestep"], o["input"])), apply(o["input"], o["timestep"], **o["c"]))[1]
    )
    result = sample(comfy, watched, conditioning(seed), noise, sigmas, latent, negative, settings["cfg_scale"])
    inputs = [arrays["start_state"]] + [arrays[f"after_{t - 1}"] for t in settings["timesteps"][:-1]]
    table = model.get_model_object("model_sampling")
    assert [table.timestep(sigma[:1]).item() for sigma, _ in states] == [t - 1 for t in settings["timesteps"]]
    for (_, state), expected in zip(states, inputs, strict=True):
        assert relative_error(state[:1], expected) < TOLERANCE
    assert relative_error(result["samples"] * SCALE, arrays[f"after_{settings['timesteps'][-1] - 1}"]) < TOLERANCE
    (decoded,) = comfy.run("FewStepSRVAEDecode", samples=result, vae=vae).args
    assert relative_error(decoded, arrays["image"]) < TOLERANCE

    # The start state goes through a sampler that adds no noise just as well.
    silent = comfy.run("DisableNoise")[0]
    again = sample(comfy, model, conditioning(seed), silent, sigmas, start, negative, settings["cfg_scale"])
    assert relative_error(again["samples"], result["samples"]) < TOLERANCE
