"""Nodes against pipelines on the same weights, on sizes and settings that no golden case has."""

import pipeline_toys
import pytest
import torch
import toys
from toys import conditioning, gaussian, picture, relative_error

from pipelines import HYPIRPipeline, InvSRPipeline, OSEDiffPipeline, PiSASRPipeline

TOLERANCE = 1e-4


def chw(image: torch.Tensor) -> torch.Tensor:
    return image.movedim(-1, 1)


@pytest.mark.parametrize(
    ("seed", "rank", "size", "scale", "cfg", "posterior", "strengths", "color"),
    [
        (5, 4, (27, 41), 2.0, 1.0, "mean", (1.0, 1.0), "adain"),
        pytest.param(6, 16, (45, 30), 3.0, 1.0, "sample", (1.0, 1.0), "wavelet", marks=pytest.mark.slow),
        pytest.param(7, 3, (33, 21), 1.5, 2.5, "mean", (0.7, 0.4), "ycbcr", marks=pytest.mark.slow),
    ],
)
def test_osediff(comfy, tmp_path, seed, rank, size, scale, cfg, posterior, strengths, color):
    name = f"parity_{seed}.pkl"
    torch.save(toys.osediff_checkpoint(seed, rank), comfy.folder("osediff") / name)
    image = picture(seed, *size, batch=2)

    model, vae = comfy.run(
        "OSEDiffLoader",
        model=toys.comfy_model(seed),
        vae=toys.comfy_vae(seed),
        osediff_name=name,
        strength_model=strengths[0],
        strength_vae=strengths[1],
    ).args
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=scale)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae, posterior=posterior, seed=77).args
    negative = conditioning(seed, "negative_prompt_embeds") if cfg != 1 else None
    (restored,) = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(seed), negative=negative, cfg=cfg, latent=latent).args
    (decoded,) = comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae).args
    (expected,) = comfy.run("FewStepSRColorFix", image=decoded, reference=enlarged, method=color).args

    pipeline = OSEDiffPipeline(**pipeline_toys.components(seed))
    pipeline.load_osediff(comfy.folder("osediff") / name, *strengths)
    found = pipeline(
        chw(image),
        scale=scale,
        guidance_scale=cfg,
        posterior=posterior,
        generator=torch.Generator().manual_seed(77),
        prompt_embeds=gaussian(seed, "prompt_embeds", (1, 77, 64)),
        negative_prompt_embeds=gaussian(seed, "negative_prompt_embeds", (1, 77, 64)),
        color_fix=color,
        output_type="pt",
    ).images
    assert relative_error(found, chw(expected)) < TOLERANCE


@pytest.mark.parametrize(
    ("seed", "size", "scale", "steps", "timesteps", "cfg", "posteriors", "color"),
    [
        pytest.param(11, (27, 41), 2.0, 3, None, 1.0, ("mean", "sample"), None, marks=pytest.mark.slow),
        (12, (33, 18), 3.0, 1, [250, 120, 7], 3.0, ("sample", "mean"), "wavelet"),
        pytest.param(13, (19, 26), 4.0, 7, None, 1.0, ("mean", "mean"), "ycbcr", marks=pytest.mark.slow),
        pytest.param(14, (10, 137), 4.0, 2, None, 1.0, ("mean", "sample"), None, marks=pytest.mark.slow),  # wider than a window of the predictor
    ],
)
def test_invsr(comfy, tmp_path, seed, size, scale, steps, timesteps, cfg, posteriors, color):
    name = f"parity_{seed}.pth"
    torch.save(toys.predictor_state_dict(seed), comfy.folder("invsr") / name)
    image = picture(seed, *size, batch=2)

    model, vae = toys.comfy_model(seed), toys.comfy_vae(seed)
    (predictor,) = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name=name).args
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=scale)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae, posterior=posteriors[0], seed=77).args
    listed = ", ".join(map(str, timesteps or []))
    (sigmas,) = comfy.run("FewStepScheduler", model=model, method="InvSR", steps=steps, timesteps=listed).args
    start = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, posterior=posteriors[1], seed=77)
    if cfg == 1:
        (guider,) = comfy.run("BasicGuider", model=model, conditioning=conditioning(seed))
    else:
        negative = conditioning(seed, "negative_prompt_embeds")
        (guider,) = comfy.run("CFGGuider", model=model, positive=conditioning(seed), negative=negative, cfg=cfg)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
    sampled = comfy.run("SamplerCustomAdvanced", noise=start[0], guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
    (expected,) = comfy.run("FewStepSRVAEDecode", samples=sampled, vae=vae).args
    if color:
        (expected,) = comfy.run("FewStepSRColorFix", image=expected, reference=image, method=color).args

    pipeline = InvSRPipeline(**pipeline_toys.components(seed))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_noise_predictor(comfy.folder("invsr") / name)
    found = pipeline(
        chw(image),
        scale=scale,
        num_inference_steps=steps,
        timesteps=timesteps,
        guidance_scale=cfg,
        posterior=posteriors[0],
        noise_posterior=posteriors[1],
        generator=torch.Generator().manual_seed(77),
        prompt_embeds=gaussian(seed, "prompt_embeds", (1, 77, 64)),
        negative_prompt_embeds=gaussian(seed, "negative_prompt_embeds", (1, 77, 64)),
        color_fix=color,
        output_type="pt",
    ).images
    assert relative_error(found, chw(expected)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "size", "knobs", "color"),
    [
        pytest.param(PiSASRPipeline, {"seed": 16, "rank_pix": 5, "rank_sem": 2}, (27, 41), {"pixel": 0.8, "semantic": 1.3}, "adain"),
        pytest.param(PiSASRPipeline, {"seed": 17, "rank_pix": 2, "rank_sem": 7}, (20, 13), {"pixel": 0.7, "semantic": 0.7}, None),
        (HYPIRPipeline, {"seed": 18, "rank": 9}, (33, 18), {"coeff_t": 333}, None),
    ],
)
def test_families(comfy, kind, settings, size, knobs, color):
    seed, key = settings["seed"], kind.method.key
    name = f"parity_{seed}.pkl"
    torch.save(toys.adapter_checkpoint(settings | {"adapter_weight_prefix": f"{key}.unet"}), comfy.folder(key) / name)
    image = picture(seed, *size, batch=2)

    base = {"model": toys.comfy_model(seed), "vae": toys.comfy_vae(seed)}
    model, vae = comfy.run("FewStepSRAdapterLoader", **base, adapter_name=f"{key}/{name}").args
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=2.0)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae, posterior="sample", seed=77).args
    (restored,) = comfy.run("FewStepSROneStep", model=model, positive=conditioning(seed), latent=latent, **knobs).args
    (decoded,) = comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae).args

    pipeline = kind(**pipeline_toys.components(seed))
    pipeline.load_weights(comfy.folder(key) / name)
    embeds = gaussian(seed, "prompt_embeds", (1, 77, 64))
    found = pipeline.one_step(latent["samples"] * 0.18215, embeds.expand(2, -1, -1), **knobs) / 0.18215
    assert relative_error(found, restored["samples"]) < TOLERANCE
    if color:
        (decoded,) = comfy.run("FewStepSRColorFix", image=decoded, reference=enlarged, method=color).args
    settings = {"scale": 2.0, "posterior": "sample", "generator": torch.Generator().manual_seed(77), "output_type": "pt"}
    images = pipeline(chw(image), prompt_embeds=embeds, color_fix=color, **settings, **knobs).images
    assert relative_error(images, chw(decoded)) < TOLERANCE


@pytest.mark.slow
def test_tiled_unet(comfy):
    seed = 15
    image = picture(seed, 34, 52)
    model, vae = toys.comfy_model(seed), toys.comfy_vae(seed)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=image.repeat_interleave(8, 1).repeat_interleave(8, 2), vae=vae).args
    (tiled,) = comfy.run("FewStepSRTiledModel", model=model, tile_size=32, overlap=8).args
    (expected,) = comfy.run("OSEDiffOneStep", model=tiled, positive=conditioning(seed), latent=latent).args

    pipeline = OSEDiffPipeline(**pipeline_toys.components(seed))
    pipeline.enable_tiling(256)
    embeds = gaussian(seed, "prompt_embeds", (1, 77, 64))
    found = pipeline.one_step(latent["samples"] * 0.18215, embeds) / 0.18215
    assert relative_error(found, expected["samples"]) < TOLERANCE
    pipeline.disable_tiling()
    assert relative_error(pipeline.one_step(latent["samples"] * 0.18215, embeds) / 0.18215, expected["samples"]) > 10 * TOLERANCE
