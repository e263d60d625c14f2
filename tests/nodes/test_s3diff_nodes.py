"""S3Diff through the nodes against the authors' own code, each image of a batch with its own adapter, and what cannot give it one."""

import shutil
from functools import cache

import pytest
import torch
import toys
from toys import GOLDEN, conditioning, gaussian, golden, picture, relative_error

TOLERANCE = 1e-4
SCALE = 0.18215
CASES = ["s3diff_square", "s3diff_tall"]


@pytest.fixture(scope="module")
def load(comfy):
    """Settings, arrays, MODEL and VAE with a golden case's adapter on, and its estimator."""

    @cache
    def run(case: str):
        settings, arrays = golden(case)
        for name in (f"{case}.pkl", f"{case}_de_net.pth"):
            shutil.copy(GOLDEN / name, comfy.folder("s3diff") / name)
        base = {"model": toys.comfy_model(settings["seed"]), "vae": toys.comfy_vae(settings["seed"])}
        model, vae = comfy.run("FewStepSRAdapterLoader", **base, adapter_name=f"s3diff/{case}.pkl").args
        (estimator,) = comfy.run("S3DiffEstimatorLoader", estimator_name=f"{case}_de_net.pth").args
        return settings, arrays, model, vae, estimator

    return run


def step(comfy, model, latent, seed: int, **inputs) -> torch.Tensor:
    inputs = {"positive": conditioning(seed), "negative": conditioning(seed, "negative_prompt_embeds")} | inputs
    return comfy.run("FewStepSROneStep", model=model, latent={"samples": latent / SCALE}, **inputs)[0]["samples"] * SCALE


def pixels(arrays) -> torch.Tensor:
    return (arrays["picture"] / 2 + 0.5).movedim(1, -1)


@pytest.mark.parametrize("case", CASES)
def test_golden(comfy, load, case, monkeypatch):
    settings, arrays, model, vae, estimator = load(case)
    seed = settings["seed"]
    low = picture(seed, *settings["low_size"])
    output = comfy.run("S3DiffDegradation", estimator=estimator, image=low)
    assert relative_error(output[0], arrays["d"]) < TOLERANCE
    blur, noise = arrays["d"][0].tolist()
    assert output.ui.as_dict()["text"] == (f"blur {blur:.3f}, noise {noise:.3f}",)
    model, vae = comfy.run("S3DiffAdapt", model=model, vae=vae, scores=output[0]).args
    monkeypatch.setattr(
        f"{comfy.nodes['FewStepSRVAEEncode'].__module__}.draw_noise", lambda shape, _: gaussian(seed, "vae_posterior", arrays["latent"].shape)
    )
    mean, latent = (comfy.run("FewStepSRVAEEncode", pixels=pixels(arrays), vae=vae, posterior=kind)[0]["samples"] for kind in ("mean", "sample"))
    assert relative_error(mean, arrays["posterior_mean"]) < TOLERANCE
    assert relative_error(latent * SCALE, arrays["latent"]) < TOLERANCE
    x0 = step(comfy, model, arrays["latent"], seed)
    assert relative_error(x0, arrays["x0"]) < TOLERANCE
    assert relative_error(step(comfy, model, arrays["latent"], seed, cfg=1.0), arrays["x0_cfg1"]) < TOLERANCE
    assert relative_error(step(comfy, model, arrays["latent"], seed, cfg=1.08), arrays["x0"]) > TOLERANCE
    (image,) = comfy.run("FewStepSRVAEDecode", samples={"samples": x0 / SCALE}, vae=vae).args
    assert relative_error(image.movedim(-1, 1) * 2 - 1, arrays["image"]) < TOLERANCE


@pytest.fixture(scope="module")
def batch(comfy, load):
    """Three images, two of them alike, and MODEL and VAE adapted to them."""
    settings, _, model, vae, estimator = load("s3diff_square")
    low = picture(settings["seed"], *settings["low_size"])
    low = torch.cat([low, low.flip(2) * 0.5, low])
    (scores,) = comfy.run("S3DiffDegradation", estimator=estimator, image=low).args
    upscaled = torch.nn.functional.interpolate(low.movedim(-1, 1), scale_factor=4, mode="bilinear").movedim(1, -1)
    adapted = comfy.run("S3DiffAdapt", model=model, vae=vae, scores=scores).args
    return settings, model, vae, scores, upscaled, *adapted


def single(comfy, batch, i: int):
    _, model, vae, scores, upscaled, *_ = batch
    return (*comfy.run("S3DiffAdapt", model=model, vae=vae, scores=scores[i : i + 1]).args, upscaled[i : i + 1])


@pytest.mark.slow
def test_a_batch_is_its_images(comfy, batch):
    settings, _, _, _, upscaled, model, vae = batch
    seed = settings["seed"]
    encoded = comfy.run("FewStepSRVAEEncode", pixels=upscaled, vae=vae)[0]["samples"]
    core = comfy.run("VAEEncode", pixels=upscaled, vae=vae)[0]["samples"]
    tiled = comfy.run("VAEEncodeTiled", pixels=upscaled, vae=vae, tile_size=512, overlap=64)[0]["samples"]
    prompts = [[torch.cat([gaussian(seed, name, (1, 77, 64)) for name in ("a", "b", "a")]), {}]]
    restored = step(comfy, model, encoded * SCALE, seed, positive=prompts)
    for i in range(2):
        own_model, own_vae, image = single(comfy, batch, i)
        mean = comfy.run("FewStepSRVAEEncode", pixels=image, vae=own_vae)[0]["samples"]
        for samples in (encoded, core, tiled):
            assert relative_error(samples[i : i + 1], mean) < TOLERANCE
        alone = step(comfy, own_model, mean * SCALE, seed, positive=[[gaussian(seed, "ab"[i], (1, 77, 64)), {}]])
        assert relative_error(restored[i : i + 1], alone) < TOLERANCE
    assert relative_error(restored[2], restored[0]) < TOLERANCE
    first_model, first_vae, _ = single(comfy, batch, 0)
    with pytest.raises(ValueError, match=r"vae: found S3Diff's adapter for 1 images, but a batch of 3"):
        comfy.run("VAEEncode", pixels=upscaled, vae=first_vae)
    with pytest.raises(ValueError, match=r"model: found S3Diff's adapter for 1 images, but a batch of 3"):
        step(comfy, first_model, encoded * SCALE, seed)


def test_each_image_has_its_own_adapter(comfy, batch):
    """The same latent in each place of a batch is restored in as many ways as there are scores."""
    settings, _, _, _, _, model, _ = batch
    latent = torch.ones(1, 4, 8, 8)
    restored = step(comfy, model, latent.expand(3, -1, -1, -1), settings["seed"], cfg=1.0)
    alone = torch.cat([step(comfy, single(comfy, batch, i)[0], latent, settings["seed"], cfg=1.0) for i in (0, 1)])
    assert relative_error(alone[1], alone[0]) > 0.01
    assert relative_error(restored, alone[[0, 1, 0]]) < TOLERANCE


def sampler(model, samples, seed):
    positive, negative = conditioning(seed), conditioning(seed, "negative_prompt_embeds")
    settings = {"seed": 1, "steps": 1, "cfg": 1.07, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {"model": model, "positive": positive, "negative": negative, "latent_image": {"samples": samples}, **settings}


def test_cores_sampler(comfy, batch):
    """One image, or images with the same scores, have one adapter; others are refused, never restored with the first one's."""
    settings, carrying, vae, scores, _, model, _ = batch
    seed, latent = settings["seed"], torch.ones(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"found S3Diff's adapters of 2 different images, expected one.*Few-Step SR One Step"):
        comfy.run("KSampler", **sampler(model, latent.expand(3, -1, -1, -1), seed))
    with pytest.raises(ValueError, match=r"without the images' scores.*'S3Diff Adapt'"):
        comfy.run("KSampler", **sampler(carrying, latent, seed))
    one, _, _ = single(comfy, batch, 0)
    (same, _) = comfy.run("S3DiffAdapt", model=carrying, vae=vae, scores=scores[[0, 2]]).args
    alone = comfy.run("KSampler", **sampler(one, latent, seed))[0]["samples"]
    other = comfy.run("KSampler", **sampler(single(comfy, batch, 1)[0], latent, seed))[0]["samples"]
    assert relative_error(other, alone) > 0.01
    both = comfy.run("KSampler", **sampler(same, latent.expand(2, -1, -1, -1), seed))[0]["samples"]
    assert relative_error(both[:1], alone) < TOLERANCE
    assert relative_error(comfy.run("KSampler", **sampler(one, latent, seed))[0]["samples"], alone) < 1e-6


def test_overruled(comfy, batch):
    settings, carrying, vae, scores, upscaled, model, adapted_vae = batch
    output = comfy.run("S3DiffAdapt", model=carrying, vae=vae, scores=scores, noise=0.25)
    lines = [f"{i}: blur {blur:.3f}, noise 0.250" for i, blur in enumerate(scores[:, 0].tolist(), 1)]
    assert output.ui.as_dict()["text"] == ("\n".join(lines),)
    both = comfy.run("S3DiffAdapt", model=carrying, vae=vae, blur=0.5, noise=0.0).args
    again = comfy.run("S3DiffAdapt", model=model, vae=adapted_vae, scores=torch.tensor([[0.5, 0.0]])).args  # in place of the scores before
    found, expected = (comfy.run("FewStepSRVAEEncode", pixels=upscaled[:1], vae=pair[1])[0]["samples"] for pair in (both, again))
    assert torch.equal(found, expected)
    assert len(comfy.run("FewStepSRVAEEncode", pixels=upscaled, vae=both[1])[0]["samples"]) == 3  # for whatever batch comes
    latent = torch.ones(1, 4, 8, 8)
    assert relative_error(step(comfy, both[0], latent, settings["seed"]), step(comfy, again[0], latent, settings["seed"])) < 1e-6


def test_refused(comfy, load, batch):
    _, carrying, vae, scores, upscaled, *_ = batch
    with pytest.raises(ValueError, match=r"noise: found neither a value nor scores, expected 0 to 1"):
        comfy.run("S3DiffAdapt", model=carrying, vae=vae, blur=0.5)
    with pytest.raises(ValueError, match="blur: found -0.5, expected a number from 0 to 1"):
        comfy.run("S3DiffAdapt", model=carrying, vae=vae, scores=scores, blur=-0.5)
    with pytest.raises(ValueError, match=r"model: found no adapter on it that follows the images' scores, expected S3Diff's"):
        comfy.run("S3DiffAdapt", model=toys.comfy_model(0), vae=vae, scores=scores)
    with pytest.raises(ValueError, match=r"vae: found S3Diff's adapter without the images' scores"):
        comfy.run("FewStepSRVAEEncode", pixels=upscaled, vae=vae)
    with pytest.raises(ValueError, match=r"negative: found none, expected S3Diff's negative prompt, since its published cfg is 1.07"):
        comfy.run("FewStepSROneStep", model=carrying, positive=conditioning(0), latent={"samples": torch.ones(1, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"found S3Diff's adapter on it, expected OSEDiff's"):
        comfy.run("OSEDiffOneStep", model=carrying, positive=conditioning(0), latent={"samples": torch.ones(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="whose encoder is another one for each image, expected one that can be saved"):
        vae.get_sd()
    with pytest.raises(ValueError, match=r"found an S3Diff adapter; expected S3Diff's degradation estimator"):
        comfy.run("S3DiffEstimatorLoader", estimator_name="s3diff_square.pkl")
    with pytest.raises(ValueError, match=r"found S3Diff's degradation estimator; expected an adapter of one of these methods: .*S3Diff"):
        comfy.run("FewStepSRAdapterLoader", model=toys.comfy_model(0), vae=toys.comfy_vae(0), adapter_name="s3diff/s3diff_square_de_net.pth")


def test_the_base_stays_as_it_is(comfy, load, batch, monkeypatch):
    settings, _, _, _, _, model, _ = batch
    seed, latent = settings["seed"], torch.ones(3, 4, 8, 8)
    expected = step(comfy, model, latent, seed)
    base = toys.unet_state_dict(seed)
    fail = model.model.diffusion_model.out[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        step(comfy, model, latent, seed)
    fail.remove()
    assert torch.equal(step(comfy, model, latent, seed), expected)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    weights = model.model.diffusion_model.state_dict()
    assert torch.equal(weights["input_blocks.0.0.weight"], base["conv_in.weight"]) and torch.equal(weights["out.2.weight"], base["conv_out.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("tile", [16])
def test_tiles(comfy, batch, tile):
    """Tiled Model before or after: each image's tiles with its own adapter."""
    settings, carrying, vae, scores, *_ = batch
    seed = settings["seed"]
    latents = gaussian(seed, "tiles", (2, 4, 24, 16)) * 0.5
    tiling = {"tile_size": tile, "overlap": 8, "batch": 2}
    (adapted, _) = comfy.run("S3DiffAdapt", model=carrying, vae=vae, scores=scores[:2]).args
    (after,) = comfy.run("FewStepSRTiledModel", model=adapted, **tiling).args
    (before,) = comfy.run("FewStepSRTiledModel", model=carrying, **tiling).args
    (before, _) = comfy.run("S3DiffAdapt", model=before, vae=vae, scores=scores[:2]).args
    restored = step(comfy, after, latents, seed)
    assert relative_error(step(comfy, before, latents, seed), restored) < 1e-6
    assert relative_error(restored, step(comfy, adapted, latents, seed)) > 1e-3  # it was tiled
    for i in range(2):
        (own, _) = comfy.run("S3DiffAdapt", model=after, vae=vae, scores=scores[i : i + 1]).args
        assert relative_error(step(comfy, own, latents[i : i + 1], seed), restored[i : i + 1]) < TOLERANCE
