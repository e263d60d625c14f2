"""The pipelines against the outputs of the authors' own code, stage by stage."""

import pipeline_toys
import pytest
import torch
import toys
from toys import GOLDEN, gaussian, golden, picture, relative_error

import pipelines.base
from pipelines import InvSRPipeline, OSEDiffPipeline

TOLERANCE = 1e-4


@pytest.fixture
def draws(monkeypatch):
    """Replaces the random draws by given ones, in their order: the golden draws are procedural, not a generator's."""

    def use(*noises: torch.Tensor):
        queue = iter(noises)
        monkeypatch.setattr(pipelines.base, "draw_noise", lambda shape, seed: next(queue))

    return use


def low_quality(settings: dict) -> torch.Tensor:
    return picture(settings["seed"], *settings["size"]).movedim(-1, 1)


@pytest.fixture(scope="module", params=["osediff_square", "osediff_tall"])
def osediff(request, tmp_path_factory):
    settings, arrays = golden(request.param)
    pipeline = OSEDiffPipeline(**pipeline_toys.components(settings["seed"]))
    path = GOLDEN / f"{request.param}.pkl"
    if not path.exists():
        path = tmp_path_factory.mktemp("osediff") / path.name
        torch.save(toys.osediff_checkpoint(settings["seed"], settings["rank"]), path)
    pipeline.load_osediff(path)
    return pipeline, settings, arrays


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_osediff(osediff, draws, fused):
    pipeline, settings, arrays = osediff
    if fused:
        pipeline.fuse()
    seed, image = settings["seed"], low_quality(settings)
    embeds = gaussian(seed, "prompt_embeds", (1, 77, 64))
    noise = gaussian(seed, "vae_posterior", arrays["latent"].shape)

    assert relative_error(pipeline.encode(image) / 0.18215, arrays["posterior_mean"]) < TOLERANCE
    draws(noise, noise)
    assert relative_error(pipeline.encode(image, posterior="sample"), arrays["latent"]) < TOLERANCE
    assert relative_error(pipeline.predict_noise(arrays["latent"], settings["timestep"], embeds), arrays["noise_pred"]) < TOLERANCE
    assert relative_error(pipeline.one_step(arrays["latent"], embeds), arrays["x0"]) < TOLERANCE
    assert relative_error(pipeline.decode(arrays["x0"]) * 2 - 1, arrays["image"]) < TOLERANCE
    whole = pipeline(image, prompt_embeds=embeds, scale=1, posterior="sample", color_fix=None, output_type="pt").images
    assert relative_error(whole * 2 - 1, arrays["image"]) < TOLERANCE
    pipeline.unfuse()


@pytest.mark.parametrize("case", ["invsr_steps1", *(pytest.param(f"invsr_steps{n}", marks=pytest.mark.slow) for n in range(2, 6)), "invsr_cfg"])
def test_invsr(draws, tmp_path, case):
    settings, arrays = golden(case)
    seed, image, timesteps = settings["seed"], low_quality(settings), settings["timesteps"]
    pipeline = InvSRPipeline(**pipeline_toys.components(seed))
    torch.save(toys.predictor_state_dict(seed, settings), tmp_path / "predictor.pth")
    pipeline.load_noise_predictor(tmp_path / "predictor.pth")
    pipeline.set_progress_bar_config(disable=True)
    guided = settings["cfg_scale"] > 1
    embeds = gaussian(seed, "prompt_embeds", (1, 77, 64))
    negative = gaussian(seed, "negative_prompt_embeds", (1, 77, 64)) if guided else None
    vae_draw, noise_draw = (gaussian(seed, f"{name}_posterior:0", arrays["noise"].shape) for name in ("vae", "noise"))
    draws(vae_draw, noise_draw, vae_draw, noise_draw)

    _, enlarged = pipeline.preprocess(image)
    size = tuple(enlarged.shape[-2:])
    assert relative_error(pipeline.encode(enlarged) / 0.18215, arrays["vae_mean"]) < TOLERANCE
    latents = pipeline.encode(enlarged, posterior="sample")
    _, mean = pipeline.start_state(image, latents, size, timesteps[0] - 1, posterior="mean")
    assert relative_error(mean, arrays["noise_mean"]) < TOLERANCE
    state, noise = pipeline.start_state(image, latents, size, timesteps[0] - 1)
    assert relative_error(noise, arrays["noise"]) < TOLERANCE
    assert relative_error(state, arrays["start_state"]) < TOLERANCE

    seen = []
    indices = [t - 1 for t in timesteps]
    pipeline.denoise(state, indices, embeds, negative, settings["cfg_scale"], lambda _, step, t, tensors: seen.append((t, tensors["latents"])))
    assert relative_error(pipeline.scheduler.sigmas, arrays["sigmas"]) < TOLERANCE
    for (timestep, after), index in zip(seen, indices, strict=True):
        assert timestep == index and relative_error(after, arrays[f"after_{index}"]) < TOLERANCE

    steps = {"timesteps": timesteps} if guided else {"num_inference_steps": len(timesteps)}
    whole = pipeline(
        image,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        guidance_scale=settings["cfg_scale"],
        posterior="sample",
        output_type="np",
        **steps,
    ).images
    assert relative_error(torch.from_numpy(whole[0]), arrays["image"].reshape(whole[0].shape)) < TOLERANCE
