"""The nodes' behaviour in a real ComfyUI: every kind of picture, refusals, native features, memory management."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
import toys
from conftest import ROOT
from toys import conditioning, picture, relative_error

SCALE = 0.18215
SEED = 5


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.fixture(scope="module")
def adapter_name(comfy):
    torch.save(toys.osediff_checkpoint(SEED, rank=4), comfy.folder("osediff") / "adapter.pkl")
    return "adapter.pkl"


@pytest.fixture(scope="module")
def osediff(comfy, base, adapter_name):
    return comfy.run("OSEDiffLoader", model=base[0], vae=base[1], osediff_name=adapter_name).args


@pytest.fixture(scope="module")
def predictor(comfy):
    torch.save(toys.predictor_state_dict(SEED), comfy.folder("invsr") / "predictor.pth")
    return comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="predictor.pth")[0]


def run_osediff(comfy, osediff, image, scale=4.0):
    model, vae = osediff
    enlarged = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=scale)[0]
    latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae)[0]
    restored = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]
    decoded = comfy.run("FewStepSRVAEDecode", samples=restored, vae=vae)[0]
    return comfy.run("FewStepSRColorFix", image=decoded, reference=image, method="adain")[0]


def run_invsr(comfy, base, predictor, image, scale=4.0, steps=2):
    model, vae = base
    enlarged = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=scale)[0]
    latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae)[0]
    sigmas = comfy.run("FewStepScheduler", model=model, steps=steps)[0]
    noise, _ = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas).args
    guider = comfy.run("CFGGuider", model=model, positive=conditioning(SEED), negative=conditioning(SEED, "negative"), cfg=1.0)[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
    sampled = comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
    decoded = comfy.run("FewStepSRVAEDecode", samples=sampled, vae=vae)[0]
    return comfy.run("FewStepSRColorFix", image=decoded, reference=image, method="wavelet")[0]


@pytest.fixture(params=["osediff", "invsr"])
def method(request, comfy, base, osediff, predictor):
    if request.param == "osediff":
        return lambda image, scale=4.0: run_osediff(comfy, osediff, image, scale)
    return lambda image, scale=4.0: run_invsr(comfy, base, predictor, image, scale)


def check(image, height, width, batch=1):
    assert image.shape == (batch, height, width, 3)
    assert image.dtype == torch.float32 and image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    assert image.std() > 0.01 or height * width < 64


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (1, 1), (1, 19), (31, 1), (2, 3)])
def test_any_size(method, height, width):
    check(method(picture(1, height, width)), 4 * height, 4 * width)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.0, 8.0])
def test_any_scale(method, scale):
    check(method(picture(1, 11, 14), scale), round(11 * scale), round(14 * scale))


def test_kinds_of_pictures(method):
    image = picture(1, 16, 12)
    plain = method(image)
    check(plain, 64, 48)
    assert relative_error(method(torch.cat([image, torch.rand(1, 16, 12, 1)], dim=-1)), plain) < 1e-5  # RGBA
    grey = image[..., :1]
    assert relative_error(method(grey), method(grey.expand(-1, -1, -1, 3))) < 1e-5
    assert relative_error(method(image.half()), plain) < 5e-3  # enlarged in float16


def test_batch_equals_singles(method):
    images = picture(1, 15, 12, batch=3)
    together = method(images)
    check(together, 60, 48, batch=3)
    for i in range(3):
        assert relative_error(together[i : i + 1], method(images[i : i + 1])) < 1e-5


def test_still_video_stays_still(method):
    frames = method(picture(1, 16, 16).expand(2, -1, -1, -1))
    assert relative_error(frames[1], frames[0]) < 1e-5


def test_overshoot_of_bicubic_enlargement_is_kept(comfy, base):
    image = torch.zeros(1, 8, 8, 3)
    image[:, 2:5, 2:5] = 1
    enlarged = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=4.0)[0]
    assert enlarged.min() < 0 and enlarged.max() > 1
    latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=base[1])[0]["samples"]
    clamped = comfy.run("FewStepSRVAEEncode", pixels=enlarged.clamp(0, 1), vae=base[1])[0]["samples"]
    assert relative_error(latent, clamped) > 1e-3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 8, 8, 3), 255.0), r"values from 255 to 255, expected \[0, 1\]"),
        (torch.full((1, 8, 8, 3), float("nan")), "not numbers"),
        (torch.zeros(1, 8, 8, 2), "expected .*channels"),
        (torch.zeros(8, 8, 3), "expected .*channels"),
        (torch.zeros(0, 8, 8, 3), "expected .*channels"),
    ],
)
def test_unusable_pictures_are_refused(comfy, base, predictor, image, message):
    latent = {"samples": torch.ones(1, 4, 4, 4)}
    with pytest.raises(ValueError, match=f"pixels: found.*{message}"):
        comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1])
    with pytest.raises(ValueError, match=f"image: found.*{message}"):
        comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=f"reference: found.*{message}"):
        comfy.run("FewStepSRColorFix", image=torch.rand(1, 8, 8, 3), reference=image)


def test_wrong_models_are_refused(comfy, base, adapter_name):
    model, vae = base
    latent = {"samples": torch.ones(1, 4, 4, 4)}

    def everywhere(model, message):
        for node, inputs in {
            "OSEDiffLoader": {"vae": vae, "osediff_name": adapter_name},
            "OSEDiffOneStep": {"positive": conditioning(SEED), "latent": latent},
            "OSEDiffStartState": {"latent": latent},
            "FewStepScheduler": {},
        }.items():
            with pytest.raises(ValueError, match=message):
                comfy.run(node, model=model, **inputs)

    everywhere(toys.comfy_model(SEED, v_prediction=True), "found v-prediction .*expected a model that predicts noise")
    everywhere(toys.comfy_model(SEED, context=768), r"cross-attention dimension of 768 \(Stable Diffusion 1.x\), expected 1024")
    everywhere(toys.comfy_model(SEED, context=2048), r"cross-attention dimension of 2048 \(Stable Diffusion XL\), expected 1024")
    other = toys.comfy_model(SEED)
    other.model.diffusion_model = torch.nn.Linear(1, 1)
    everywhere(other, "found Linear, expected the UNet of Stable Diffusion")
    flow = model.clone()
    flow.add_object_patch("model_sampling", __import__("comfy.model_sampling").model_sampling.ModelSamplingDiscreteFlow())
    everywhere(flow, "found ModelSamplingDiscreteFlow, expected a model that predicts noise")


def test_adapter_on_another_base_is_refused(comfy, base, adapter_name):
    model, vae = base
    with pytest.raises(ValueError, match="cross-attention dimension of 1024, but the adapter was trained for 64"):
        comfy.run("OSEDiffLoader", model=toys.comfy_model(SEED, context=1024), vae=vae, osediff_name=adapter_name)
    checkpoint = toys.osediff_checkpoint(SEED, rank=2)
    layer = "mid_block.resnets.0.conv1"
    checkpoint["state_dict_unet"][f"{layer}.lora_A.default_others.weight"] = torch.zeros(2, 128, 3, 3)
    torch.save(checkpoint, comfy.folder("osediff") / "other_shape.pkl")
    with pytest.raises(
        ValueError, match=r"model: layer diffusion_model\.middle_block\..* has shape \(64, 64, 3, 3\), but the adapter's is \(64, 128, 3, 3\)"
    ):
        comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name="other_shape.pkl")
    for part in ("A", "B"):
        key = f"{layer}.lora_{part}.default_others.weight"
        checkpoint["state_dict_unet"][key.replace("resnets.0", "resnets.7")] = checkpoint["state_dict_unet"].pop(key)
    torch.save(checkpoint, comfy.folder("osediff") / "other_layer.pkl")
    with pytest.raises(ValueError, match=r"model: it has no layer mid_block\.resnets\.7\.conv1"):
        comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name="other_layer.pkl")
    checkpoint = toys.osediff_checkpoint(SEED, rank=2)
    checkpoint["state_dict_vae"]["encoder.conv_in.lora_A.default_encoder.weight"] = torch.zeros(2, 4, 3, 3)
    torch.save(checkpoint, comfy.folder("osediff") / "other_vae.pkl")
    with pytest.raises(ValueError, match=r"vae: layer encoder\.conv_in\.weight has shape"):
        comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name="other_vae.pkl")


def test_other_vaes_latents_and_prompts_are_refused(comfy, base, osediff, predictor, adapter_name):
    model, vae = base
    other = __import__("copy").copy(vae)
    other.latent_channels = 16
    with pytest.raises(ValueError, match="found 16 latent channels at a reduction of 8, expected 4"):
        comfy.run("FewStepSRVAEEncode", pixels=picture(1, 8, 8), vae=other)
    with pytest.raises(ValueError, match="found 16 latent channels"):
        comfy.run("OSEDiffLoader", model=model, vae=other, osediff_name=adapter_name)
    wide = {"samples": torch.zeros(1, 16, 4, 4)}
    sigmas = comfy.run("FewStepScheduler", model=model)[0]
    for node, inputs in {
        "OSEDiffOneStep": {"model": model, "positive": conditioning(SEED), "latent": wide},
        "OSEDiffStartState": {"model": model, "latent": wide},
        "InvSRStartState": {"noise_predictor": predictor, "image": picture(1, 8, 8), "latent": wide, "sigmas": sigmas},
        "FewStepSRVAEDecode": {"samples": wide, "vae": vae},
    }.items():
        with pytest.raises(ValueError, match=r"found a latent of shape \(1, 16, 4, 4\)"):
            comfy.run(node, **inputs)
    latent = {"samples": torch.ones(1, 4, 4, 4)}
    with pytest.raises(ValueError, match=r"positive: found conditioning of embedding size 768 \(Stable Diffusion 1.x\), expected 64"):
        comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED, width=768), latent=latent)
    with pytest.raises(ValueError, match="cfg: found 2.0 without a negative"):
        comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent, cfg=2.0)


def test_start_state_refuses_what_does_not_belong(comfy, base, predictor):
    model, _ = base
    latent, image = {"samples": torch.ones(2, 4, 16, 16)}, picture(1, 32, 32)
    sigmas = comfy.run("FewStepScheduler", model=model)[0]

    def start(**inputs):
        return comfy.run("InvSRStartState", **({"noise_predictor": predictor, "image": image, "latent": latent, "sigmas": sigmas} | inputs))

    with pytest.raises(ValueError, match="found no step to take"):
        start(sigmas=torch.tensor([]))
    with pytest.raises(ValueError, match="outside Stable Diffusion's noise schedule"):
        start(sigmas=torch.tensor([0.0, 0.0]))
    with pytest.raises(ValueError, match="first is timestep 1000 .* expected at most 250"):
        start(sigmas=comfy.run("FewStepScheduler", model=model, method="OSEDiff")[0])
    with pytest.raises(ValueError, match="image: found 3 pictures, expected 1 or 2"):
        start(image=picture(1, 32, 32, batch=3))
    with pytest.raises(ValueError, match="other proportions"):
        start(image=picture(1, 32, 64))
    noise, _ = start().args
    with pytest.raises(ValueError, match="made for a 16 x 16 latent, but the sampler.s latent is 8 x 16"):
        noise.generate_noise({"samples": torch.ones(1, 4, 16, 8)})
    assert noise.generate_noise({"samples": torch.ones(5, 4, 16, 16)}).shape == (5, 4, 16, 16)


def test_strength(comfy, base, adapter_name, osediff):
    """Strength 0 is the base, 1 the adapter, and a half lies between: the replaced conv_in is blended like the rest."""
    from comfy.lora import calculate_weight

    model, vae = base
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    image = picture(1, 32, 32)

    def outputs(model, vae):
        step = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]
        return step, comfy.run("FewStepSRVAEEncode", pixels=image, vae=vae)[0]["samples"]

    off = comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name=adapter_name, strength_model=0.0, strength_vae=0.0).args
    for found, plain, adapted in zip(outputs(*off), outputs(model, vae), outputs(*osediff), strict=True):
        assert relative_error(found, plain) < 1e-5 and relative_error(adapted, plain) > 0.05
    half = comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name=adapter_name, strength_model=0.5).args[0]
    plain, key = toys.unet_state_dict(SEED)["conv_in.weight"], "diffusion_model.input_blocks.0.0.weight"
    patched = [calculate_weight(patcher.patches[key], plain.clone(), key) for patcher in (half, osediff[0])]
    assert relative_error(patched[0], (plain + patched[1]) / 2) < 1e-5


def test_the_given_model_and_vae_stay_as_they_are(comfy, base, osediff):
    image = picture(1, 32, 32)
    before = comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1])[0]["samples"]
    adapted = comfy.run("FewStepSRVAEEncode", pixels=image, vae=osediff[1])[0]["samples"]
    after = comfy.run("VAEEncode", pixels=image, vae=base[1])[0]["samples"]
    assert torch.equal(before, after) and relative_error(adapted, before) > 0.01
    assert base[1].first_stage_model.regularization.__class__.__name__ == "DiagonalGaussianRegularizer"


def test_sampled_posterior(comfy, base):
    image = picture(1, 32, 32, batch=2)
    encode = lambda **kw: comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1], **kw)[0]["samples"]  # noqa: E731
    mean, first, again, other = encode(), encode(posterior="sample", seed=1), encode(posterior="sample", seed=1), encode(posterior="sample", seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, mean)
    assert torch.equal(encode(seed=3), mean)


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [128, 192])
def test_tiled_vae_is_close_to_whole(comfy, base, tile_size):
    image = picture(1, 201, 310)
    whole = comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1])[0]
    tiled = comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1], tile_size=tile_size)[0]
    assert relative_error(tiled["samples"], whole["samples"]) < 0.2
    decoded = comfy.run("FewStepSRVAEDecode", samples=whole, vae=base[1])[0]
    in_tiles = comfy.run("FewStepSRVAEDecode", samples=whole, vae=base[1], tile_size=tile_size)[0]
    assert decoded.shape == in_tiles.shape == (1, 201, 310, 3) and relative_error(in_tiles, decoded) < 0.2
    with pytest.raises(ValueError, match="tile_size: found 100"):
        comfy.run("FewStepSRVAEEncode", pixels=image, vae=base[1], tile_size=100)


def test_size_survives_core_nodes(comfy, base, osediff):
    """Core's samplers carry the real size along; a resized latent is decoded whole."""
    latent = comfy.run("FewStepSRVAEEncode", pixels=picture(1, 50, 70), vae=base[1])[0]
    sampled = comfy.run(
        "KSampler",
        model=base[0],
        seed=1,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
        positive=conditioning(SEED),
        negative=conditioning(SEED),
        latent_image=latent,
        denoise=0.5,
    )[0]
    assert comfy.run("FewStepSRVAEDecode", samples=sampled, vae=base[1])[0].shape == (1, 50, 70, 3)
    larger = comfy.run("LatentUpscaleBy", samples=sampled, upscale_method="bilinear", scale_by=2.0)[0]
    assert comfy.run("FewStepSRVAEDecode", samples=larger, vae=base[1])[0].shape == (1, 112, 144, 3)
    plain = comfy.run("VAEEncode", pixels=picture(1, 48, 64), vae=base[1])[0]
    assert comfy.run("FewStepSRVAEDecode", samples=plain, vae=base[1])[0].shape == (1, 48, 64, 3)


def test_mask_keeps_the_low_quality_picture_outside(comfy, osediff):
    model, vae = osediff
    latent = comfy.run("FewStepSRVAEEncode", pixels=picture(1, 64, 64), vae=vae)[0]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    masked = comfy.run("SetLatentNoiseMask", samples=latent, mask=mask)[0]
    whole = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]
    part = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=masked)[0]["samples"]
    # Outside the mask core starts from sigma instead of sqrt(1 + sigma^2), 0.2 % less, which attention sees.
    assert relative_error(part[..., 4:], whole[..., 4:]) < 0.02
    assert relative_error(part[..., :4], latent["samples"][..., :4]) < 1e-4


@pytest.mark.parametrize("timestep", [0, 250, 998, 999])
def test_one_step_at_any_timestep(comfy, osediff, timestep):
    """x0 = (z - sqrt(1 - a) * eps(z)) / sqrt(a), with the low-quality latent as z at every timestep."""
    from fewstep_sr.diffusion import alphas_cumprod

    model = osediff[0].clone()
    z, seen = torch.randn(1, 4, 8, 8), []

    def record(apply_model, o):
        denoised = apply_model(o["input"], o["timestep"], **o["c"])
        seen.append((o["input"] - denoised) / o["timestep"].reshape(-1, 1, 1, 1))
        return denoised

    model.set_model_unet_function_wrapper(record)
    x0 = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent={"samples": z / SCALE}, timestep=timestep)[0]["samples"]
    a = alphas_cumprod()[timestep]
    assert relative_error(x0 * SCALE, (z - (1 - a).sqrt() * seen[0]) / a.sqrt()) < 1e-3


def test_guidance(comfy, osediff):
    model, latent = osediff[0], {"samples": torch.randn(1, 4, 8, 8)}
    step = lambda **kw: comfy.run("OSEDiffOneStep", model=model, latent=latent, **kw)[0]["samples"]  # noqa: E731
    positive, negative = conditioning(SEED), conditioning(SEED, "negative")
    guided = step(positive=positive, negative=negative, cfg=3.0)
    expected = step(positive=negative) + 3.0 * (step(positive=positive) - step(positive=negative))
    assert relative_error(guided, expected) < 1e-3
    assert relative_error(step(positive=positive, negative=negative), step(positive=positive)) < 1e-5


def test_one_step_runs_patches_previews_and_interrupts(comfy, osediff):
    from comfy import model_management, utils

    model, latent = osediff[0].clone(), {"samples": torch.randn(1, 4, 8, 8)}
    run = lambda: comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]  # noqa: E731
    plain, calls, progress = run(), [], []
    model.set_model_sampler_post_cfg_function(lambda args: calls.append(args["cond_scale"]) or args["denoised"] * 0.5)
    previous = utils.PROGRESS_BAR_HOOK
    utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: progress.append((value, total)))
    try:
        assert relative_error(run(), plain * 0.5) < 1e-5 and calls == [1.0] and progress[-1] == (1, 1)
        model_management.interrupt_current_processing(True)
        with pytest.raises(model_management.InterruptProcessingException):
            run()
    finally:
        model_management.interrupt_current_processing(False)
        utils.set_progress_bar_global_hook(previous)
    assert relative_error(run(), plain * 0.5) < 1e-5


def test_one_step_with_control_net_and_lora(comfy, osediff):
    from comfy import cldm, controlnet, ops
    from comfy.weight_adapter import LoRAAdapter

    model, latent = osediff[0], {"samples": torch.randn(1, 4, 8, 8)}
    unet = model.model.model_config.unet_config
    config = {k: unet[k] for k in ("model_channels", "num_res_blocks", "channel_mult", "context_dim", "use_linear_in_transformer", "in_channels")}
    config |= {
        "transformer_depth": [1, 1, 1, 0],
        "transformer_depth_middle": 1,
        "num_head_channels": toys.HEAD_DIM,
        "hint_channels": 3,
        "image_size": 32,
    }
    network = cldm.cldm.ControlNet(**config, use_spatial_transformer=True, dtype=torch.float32, operations=ops.disable_weight_init)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    network.load_state_dict(toys.weights(SEED, "control", shapes))
    control = controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=torch.float32)

    def step(model, positive):
        return comfy.run("OSEDiffOneStep", model=model, positive=positive, latent=latent)[0]["samples"]

    plain, nothing = step(model, conditioning(SEED)), conditioning(SEED, "negative")
    applied = {"control_net": control, "image": picture(1, 64, 64), "start_percent": 0.0, "end_percent": 1.0}
    for strength, changes in ((0.0, False), (1.0, True)):
        positive, _ = comfy.run("ControlNetApplyAdvanced", positive=conditioning(SEED), negative=nothing, strength=strength, **applied)
        assert (relative_error(step(model, positive), plain) > 0.01) == changes

    key = "diffusion_model.middle_block.1.proj_in.weight"
    with_lora = model.clone()
    assert with_lora.add_patches({key: LoRAAdapter(set(), (torch.randn(64, 2), torch.randn(2, 64), None, None, None, None))}) == [key]
    assert relative_error(step(with_lora, conditioning(SEED)), plain) > 0.01
    assert relative_error(step(model, conditioning(SEED)), plain) < 1e-5


def test_one_step_with_hooks(comfy, osediff):
    """A LoRA that a hook puts on for one conditioning alone."""
    from comfy import hooks

    model, latent = osediff[0], {"samples": torch.randn(1, 4, 8, 8)}
    step = lambda positive: comfy.run("OSEDiffOneStep", model=model, positive=positive, latent=latent)[0]["samples"]  # noqa: E731
    plain, layer = step(conditioning(SEED)), "diffusion_model.middle_block.1.proj_in"
    lora = {f"{layer}.lora_up.weight": torch.randn(64, 2), f"{layer}.lora_down.weight": torch.randn(2, 64)}
    hooked = hooks.set_hooks_for_conditioning(conditioning(SEED), hooks.create_hook_lora(lora, 1.0, 0.0))
    assert relative_error(step(hooked), plain) > 0.01
    assert relative_error(step(conditioning(SEED)), plain) < 1e-5


def test_start_state_interrupts(comfy, base, predictor):
    from comfy import model_management

    sigmas = comfy.run("FewStepScheduler", model=base[0])[0]
    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        comfy.run("InvSRStartState", noise_predictor=predictor, image=picture(1, 8, 8), latent={"samples": torch.ones(1, 4, 4, 4)}, sigmas=sigmas)


def test_noise_map_preview(comfy, base, predictor):
    sigmas = comfy.run("FewStepScheduler", model=base[0])[0]
    output = comfy.run(
        "InvSRStartState", noise_predictor=predictor, image=picture(1, 32, 48), latent={"samples": torch.randn(1, 4, 16, 24)}, sigmas=sigmas
    )
    [entry] = output.ui.as_dict()["images"]
    import folder_paths
    from PIL import Image

    assert entry["type"] == "temp"
    preview = Image.open(f"{folder_paths.get_temp_directory()}/{entry['subfolder']}/{entry['filename']}")
    assert preview.size == (24 * 16, 16 * 16) and len(set(preview.convert("L").tobytes())) > 50


@pytest.mark.parametrize(
    ("flag", "dtype", "tolerance"),
    [("fp16_unet", torch.float16, 0.02), ("bf16_unet", torch.bfloat16, 0.05), ("fp8_e4m3fn_unet", torch.float8_e4m3fn, 0.2)],
)
def test_predictor_in_the_dtype_that_comfyui_chooses(comfy, base, predictor, flag, dtype, tolerance, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, flag, True)
    half = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="predictor.pth")[0]
    assert half.network.encoder.conv_in.weight.dtype == dtype
    sigmas = comfy.run("FewStepScheduler", model=base[0])[0]
    inputs = {"image": picture(1, 32, 32), "latent": {"samples": torch.ones(1, 4, 16, 16)}, "sigmas": sigmas}
    found, expected = (comfy.run("InvSRStartState", noise_predictor=p, **inputs)[0].noise for p in (half, predictor))
    assert found.dtype == torch.float32 and relative_error(found, expected) < tolerance
    with torch.inference_mode():
        half.network.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not numbers .*Restart ComfyUI with --fp32-unet"):
        comfy.run("InvSRStartState", noise_predictor=half, **inputs)


def test_nan_is_said_and_not_saved_as_black(comfy, base):
    model, vae = toys.comfy_model(SEED), toys.comfy_vae(SEED)
    latent = {"samples": torch.randn(1, 4, 4, 4)}
    with torch.inference_mode():
        model.model.diffusion_model.out[2].bias[0] = float("nan")
        vae.first_stage_model.decoder.conv_out.bias[0] = float("nan")
        vae.first_stage_model.encoder.conv_out.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="OSEDiff One Step gave values that are not numbers"):
        comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)
    with pytest.raises(RuntimeError, match=r"VAE Decode .* --fp32-vae"):
        comfy.run("FewStepSRVAEDecode", samples=latent, vae=vae)
    with pytest.raises(RuntimeError, match=r"VAE Encode .* --fp32-vae"):
        comfy.run("FewStepSRVAEEncode", pixels=picture(1, 16, 16), vae=vae)


def test_out_of_memory_halves_the_group(comfy, base, predictor, monkeypatch):
    sigmas = comfy.run("FewStepScheduler", model=base[0])[0]
    inputs = {"noise_predictor": predictor, "image": picture(1, 16, 16, batch=5), "latent": {"samples": torch.ones(5, 4, 8, 8)}, "sigmas": sigmas}
    expected = comfy.run("InvSRStartState", **inputs)[0].noise
    network, groups = predictor.network, []
    forward = network.forward

    def small_card(image, timestep):
        groups.append(len(image))
        if len(image) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(image, timestep)

    monkeypatch.setattr(network, "forward", small_card)
    assert relative_error(comfy.run("InvSRStartState", **inputs)[0].noise, expected) < 1e-5
    assert groups == [5, 2, 2, 1]


def test_color_fix_node(comfy):
    image, reference = picture(3, 64, 48, batch=2), picture(4, 16, 12)
    for name in ("adain", "wavelet", "ycbcr", "lab", "luma"):
        fixed = comfy.run("FewStepSRColorFix", image=image, reference=reference, method=name)[0]
        check(fixed, 64, 48, batch=2)
    assert torch.equal(comfy.run("FewStepSRColorFix", image=image, reference=reference, strength=0.0)[0], image)
    assert torch.equal(comfy.run("FewStepSRColorFix", image=image, reference=picture(4, 24, 96), method="none")[0], image)
    for name in ("wavelet", "ycbcr", "luma"):
        with pytest.raises(ValueError, match=f"found 96 x 24 pixels, expected the aspect ratio of image, 48 x 64: {name} needs both"):
            comfy.run("FewStepSRColorFix", image=image, reference=picture(4, 24, 96), method=name)
    with pytest.raises(ValueError, match="reference: found 3 pictures, expected 1 or 2"):
        comfy.run("FewStepSRColorFix", image=image, reference=picture(4, 16, 12, batch=3))


def test_model_folders(comfy):
    """The user's own folders come first, ComfyUI's models folder counts too, and only weight files are offered."""
    import folder_paths

    for kind in ("osediff", "invsr"):
        assert folder_paths.get_folder_paths(kind) == [str(comfy.folder(kind)), f"{folder_paths.models_dir}/{kind}"]
        (comfy.folder(kind) / "notes.txt").write_text("not weights")
        (comfy.folder(kind) / "weights.safetensors").write_bytes(b"")
        assert [n for n in folder_paths.get_filename_list(kind) if n in ("notes.txt", "weights.safetensors")] == ["weights.safetensors"]


CONTRACT = {
    "OSEDiffLoader": (["model", "vae", "osediff_name", "strength_model", "strength_vae"], ["MODEL", "VAE"]),
    "OSEDiffOneStep": (["model", "positive", "latent", "negative", "cfg", "timestep"], ["LATENT"]),
    "OSEDiffStartState": (["model", "latent"], ["NOISE", "LATENT"]),
    "InvSRNoisePredictorLoader": (["noise_predictor_name"], ["NOISE_PREDICTOR"]),
    "InvSRStartState": (["noise_predictor", "image", "latent", "sigmas", "posterior", "seed"], ["NOISE", "LATENT"]),
    "FewStepScheduler": (["model", "method", "steps", "timesteps"], ["SIGMAS"]),
    "FewStepSRVAEEncode": (["pixels", "vae", "posterior", "seed", "tile_size"], ["LATENT"]),
    "FewStepSRVAEDecode": (["samples", "vae", "tile_size", "clamp"], ["IMAGE"]),
    "FewStepSRAdapterLoader": (["model", "vae", "adapter_name", "strength_model", "strength_vae"], ["MODEL", "VAE"]),
    "FewStepSROneStep": (["model", "positive", "latent", "negative", "cfg", "pixel", "semantic", "coeff_t"], ["LATENT"]),
    "S3DiffEstimatorLoader": (["estimator_name"], ["DEGRADATION_ESTIMATOR"]),
    "S3DiffDegradation": (["estimator", "image"], ["DEGRADATION_SCORES"]),
    "S3DiffAdapt": (["model", "vae", "scores", "blur", "noise"], ["MODEL", "VAE"]),
    "FewStepSRColorFix": (["image", "reference", "method", "strength"], ["IMAGE"]),
    "FewStepSRTiledModel": (["model", "tile_size", "overlap", "batch"], ["MODEL"]),
    "DAPETaggerLoader": (["tagger_name", "dape_name"], ["DAPE_TAGGER"]),
    "FewStepSRFillTransparent": (["image", "mask"], ["IMAGE"]),
    "FewStepSRQuality": (["image", "reference"], ["FLOAT", "FLOAT", "FLOAT"]),
    "FewStepSRVideo": (
        [
            "video",
            "model",
            "positive",
            "vae",
            "noise_predictor",
            "scale_by",
            "frames",
            "color_fix",
            "steady",
            "clamp",
            "steps",
            "seed",
            "crf",
        ],
        ["VIDEO"],
    ),
    "FewStepSRDemoLoader": (["method"], ["MODEL", "VAE", "CONDITIONING", "NOISE_PREDICTOR", "IMAGE"]),
    "DAPETagger": (["tagger", "image", "threshold", "max_tags", "exclude", "prefix", "suffix"], ["STRING"]),
}


@pytest.mark.parametrize("node_id", CONTRACT)
def test_contract(comfy, node_id):
    """Ids and input names are the saved workflows' format. Every input is explained; Python's defaults are the schema's."""
    node = comfy.nodes[node_id]
    schema = node.define_schema()
    inputs, outputs = CONTRACT[node_id]
    assert [i.id for i in schema.inputs] == inputs
    assert [o.io_type for o in schema.outputs] == outputs
    assert schema.category.startswith("FewStepSR") and schema.description and schema.search_aliases and schema.display_name
    parameters = inspect.signature(node.execute).parameters
    for entry in schema.inputs:
        assert entry.tooltip, f"{node_id}.{entry.id} has no tooltip"
        default = getattr(entry, "default", None)
        if default is not None:
            own = parameters[entry.id].default if entry.id in parameters else importlib.import_module(node.__module__).DEFAULTS[entry.id]
            assert own == default
    assert all(o.tooltip for o in schema.outputs)
    for page in (f"{node_id}.md", f"{node_id}/zh.md"):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        assert all(entry.id in text for entry in schema.inputs if hasattr(entry, "default")), f"{page} does not explain every input"


def test_contract_is_complete(comfy):
    ours = {node_id for node_id, node in comfy.nodes.items() if getattr(node, "RELATIVE_PYTHON_MODULE", "").startswith("custom_nodes.")}
    assert ours == set(CONTRACT)


@pytest.mark.slow
def test_blocked_packages(comfyui_path):
    """The pack loads and all its nodes run, and give the authors' numbers, where diffusers and peft cannot be imported."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "peft"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
sys.argv = ["pytest"]
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "{ROOT}/tests/nodes/test_golden_nodes.py", "{ROOT}/tests/nodes/test_nodes.py::test_any_size"]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout and "skipped" not in found.stdout, found.stdout + found.stderr
