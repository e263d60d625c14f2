"""MODEL and VAE as other nodes patch, merge, quantise and save them."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import toys
from toys import conditioning, picture, relative_error

SEED = 5


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.fixture(scope="module")
def adapter_name(comfy):
    torch.save(toys.osediff_checkpoint(SEED, rank=4), comfy.folder("osediff") / "patched.pkl")
    return "patched.pkl"


@pytest.fixture(scope="module")
def osediff(comfy, base, adapter_name):
    return comfy.run("OSEDiffLoader", model=base[0], vae=base[1], osediff_name=adapter_name).args


def step(comfy, model, latent):
    return comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]


@pytest.mark.parametrize("encode_first", [False, True])
@pytest.mark.parametrize("node", ["VAESave", "CheckpointSave"])
def test_the_adapted_vae_is_saved_as_it_acts(comfy, adapter_name, node, encode_first):
    import folder_paths
    from comfy.lora import calculate_weight

    base_vae, model = toys.comfy_vae(SEED), toys.comfy_model(SEED)
    vae = comfy.run("OSEDiffLoader", model=model, vae=base_vae, osediff_name=adapter_name)[1]
    assert isinstance(vae, type(base_vae))
    weights = {key: weight.clone() for key, weight in base_vae.first_stage_model.state_dict().items()}
    if encode_first:
        comfy.run("FewStepSRVAEEncode", pixels=picture(1, 16, 16), vae=vae)
    prefix = f"{node}_{encode_first}"
    if node == "VAESave":
        comfy.run(node, vae=vae, filename_prefix=prefix)
        expected_prefix = ""
    else:
        from comfy.sd import save_checkpoint

        class NoClip:
            def load_model(self):
                return model

            def state_dict_for_saving(self):
                return {}

        save_checkpoint(f"{folder_paths.get_output_directory()}/{prefix}.safetensors", model, NoClip(), vae)
        expected_prefix = "first_stage_model."
    [path] = saved_as(prefix)
    saved = safetensors.torch.load_file(path)
    adapted = 0
    for key, weight in weights.items():
        patches = vae.patcher.patches.get(key, [])
        expected = calculate_weight(patches, weight.clone().float(), key)
        adapted += bool(patches)
        assert relative_error(saved[expected_prefix + key], expected) < 1e-5, key
    assert adapted > 10 and relative_error(saved[expected_prefix + "encoder.conv_in.weight"], weights["encoder.conv_in.weight"]) > 1e-3


def saved_as(prefix: str) -> list[Path]:
    import folder_paths

    return list(Path(folder_paths.get_output_directory()).glob(f"{prefix}*.safetensors"))


def test_a_saved_vae_encodes_as_the_adapted_one(comfy, osediff):
    def encode(vae):
        return comfy.run("FewStepSRVAEEncode", pixels=picture(2, 24, 32), vae=vae)[0]["samples"]

    loaded = toys.comfy_vae(SEED)
    loaded.first_stage_model.load_state_dict(osediff[1].get_sd())
    assert relative_error(encode(loaded), encode(osediff[1])) < 1e-5


def test_latents_are_scaled_by_the_models_own_format(comfy, base, osediff):
    """Another branch of the same checkpoint has put its latent format on the shared network, as core's EDM playground sampling does."""
    from comfy import latent_formats

    model, network = osediff[0], base[0].model
    latent = {"samples": torch.randn(1, 4, 6, 6)}
    before, noise = step(comfy, model, latent), comfy.run("OSEDiffStartState", model=model, latent=latent)[0].noise
    own = network.latent_format
    branch = base[0].clone()
    branch.add_object_patch("latent_format", latent_formats.SDXL_Playground_2_5())
    try:
        branch.patch_model()
        assert network.latent_format is not own
        assert torch.equal(comfy.run("OSEDiffStartState", model=model, latent=latent)[0].noise, noise)
        assert relative_error(step(comfy, model, latent), before) < 1e-4
    finally:
        branch.unpatch_model()
    assert network.latent_format is own


def sampling(base, name: str, prediction: str, **settings):
    """MODEL with a ``model_sampling`` of core's classes."""
    import comfy.model_sampling as kinds

    kind = type("ModelSamplingAdvanced", (getattr(kinds, name), getattr(kinds, prediction)), {})
    model = base.clone()
    model.add_object_patch("model_sampling", kind(base.model.model_config, **settings))
    return model


UNFIT = {
    "v-prediction": (("ModelSamplingDiscrete", "V_PREDICTION"), {}, "v-prediction"),
    "x0": (("ModelSamplingDiscrete", "X0"), {}, "x0 prediction"),
    "image to image": (("ModelSamplingDiscrete", "IMG_TO_IMG"), {}, "x0 prediction"),
    "zero terminal SNR": (("ModelSamplingDiscrete", "EPS"), {"zsnr": True}, "a zero-terminal-SNR noise schedule"),
    "zero terminal SNR, v": (("ModelSamplingDiscrete", "V_PREDICTION"), {"zsnr": True}, "v-prediction"),
    "continuous EDM": (("ModelSamplingContinuousEDM", "EPS"), {}, "a continuous noise schedule .ModelSamplingContinuousEDM"),
    "EDM": (("ModelSamplingContinuousEDM", "EDM"), {}, "EDM sampling"),
    "continuous v": (("ModelSamplingContinuousV", "V_PREDICTION"), {}, "v-prediction"),
    "flow": (("ModelSamplingDiscreteFlow", "CONST"), {}, "a flow"),
    "Cosmos' flow": (("ModelSamplingContinuousEDM", "COSMOS_RFLOW"), {}, "a flow"),
    "Stable Cascade": (("StableCascadeSampling", "EPS"), {}, "another noise schedule .StableCascadeSampling"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_sampling_that_does_not_fit_is_named(comfy, base, adapter_name, name):
    kinds, settings, words = UNFIT[name]
    model, latent = sampling(base[0], *kinds, **settings), {"samples": torch.ones(1, 4, 4, 4)}
    for node, inputs in {
        "OSEDiffLoader": {"vae": base[1], "osediff_name": adapter_name},
        "OSEDiffOneStep": {"positive": conditioning(SEED), "latent": latent},
        "OSEDiffStartState": {"latent": latent},
        "FewStepScheduler": {},
    }.items():
        with pytest.raises(ValueError, match=f"model: found {words}.*expected a model that predicts noise"):
            comfy.run(node, model=model, **inputs)


def test_other_noise_schedules_are_named(comfy, base):
    model = sampling(base[0], "ModelSamplingDiscrete", "EPS")
    comfy.run("FewStepScheduler", model=model)  # the same classes on the same schedule fit
    schedule = model.get_model_object("model_sampling")
    schedule.set_sigmas(schedule.sigmas * 1.5)
    with pytest.raises(ValueError, match=r"another noise schedule \(ModelSamplingDiscrete\)"):
        comfy.run("FewStepScheduler", model=model)
    for sampler in ("lcm", "x0", "img_to_img_flow"):
        patched = comfy.run("ModelSamplingDiscrete", model=base[0], sampling=sampler, zsnr=False)[0]
        with pytest.raises(ValueError, match="found (LCM sampling|x0 prediction|a flow)"):
            comfy.run("FewStepScheduler", model=patched)


def test_two_adapters_in_a_row_are_warned_of(comfy, osediff, base, adapter_name, caplog):
    again = {"osediff_name": adapter_name}
    comfy.run("OSEDiffLoader", model=base[0], vae=base[1], **again)
    assert "already" not in caplog.text
    comfy.run("OSEDiffLoader", model=osediff[0], vae=base[1], **again)
    assert "model: found an OSEDiff adapter on it already" in caplog.text and "vae: found" not in caplog.text
    comfy.run("OSEDiffLoader", model=base[0], vae=osediff[1], **again)
    assert "vae: found an OSEDiff adapter on it already" in caplog.text
    caplog.clear()
    off = comfy.run("OSEDiffLoader", model=base[0], vae=base[1], strength_model=0.0, strength_vae=0.0, **again).args
    comfy.run("OSEDiffLoader", model=off[0], vae=off[1], **again)
    assert "already" not in caplog.text


LOST, NONE = "acts with strength 0, lost in a merge", "found no OSEDiff adapter"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "ratio", "said"),
    [("adapted", 1.0, None), ("adapted", 0.5, None), ("adapted", 0.0, LOST), ("base", 0.0, None), ("base", 0.5, None), ("base", 1.0, LOST)],
)
def test_what_is_said_of_a_merge_is_true(comfy, osediff, caplog, first, ratio, said):
    other, latent = toys.comfy_model(SEED + 1), {"samples": torch.randn(1, 4, 4, 4)}
    models = (osediff[0], other) if first == "adapted" else (other, osediff[0])
    merged = comfy.run("ModelMergeSimple", model1=models[0], model2=models[1], ratio=ratio)[0]
    step(comfy, merged, latent)
    assert (LOST in caplog.text) == (said == LOST) and NONE not in caplog.text
    caplog.clear()
    step(comfy, other, latent)
    assert NONE in caplog.text


class PackedLinear(torch.nn.Linear):
    """A layer that is kept as a quantised file's blocks, as ComfyUI-GGUF's: its state dict holds their bytes."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = torch.zeros(17, dtype=torch.uint8)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def test_a_quantised_base_takes_the_adapter(comfy, base, adapter_name, osediff):
    model = toys.comfy_model(SEED)
    packed = 0
    for module in model.model.diffusion_model.modules():
        if type(module).__name__ == "Linear" and isinstance(module, torch.nn.Linear):
            module.__class__ = type("PackedLinear", (PackedLinear, type(module)), {})
            packed += 1
    assert packed > 10 and tuple(model.model.state_dict()["diffusion_model.middle_block.1.proj_in.weight"].shape) == (17,)
    adapted = comfy.run("OSEDiffLoader", model=model, vae=base[1], osediff_name=adapter_name)[0]
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    assert relative_error(step(comfy, adapted, latent), step(comfy, osediff[0], latent)) < 1e-4
