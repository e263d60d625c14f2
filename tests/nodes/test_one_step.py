"""Few-Step SR One Step among other nodes, and what loader and step say of the wrong file, model or setting.

Whatever is put on, PiSA-SR's step at any two knobs must be its equation on the predictions of two models: one with both sets, and one whose adapter file
has a semantic set of zeros.
"""

import re
import shutil

import pytest
import torch
import toys
from sampling import local, tiled, with_options
from toys import conditioning, golden, picture, relative_error

from fewstep_sr.methods import pisasr

SEED = 5
KNOBS = {"pixel": 0.5, "semantic": 1.5}


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.fixture(scope="module")
def put_on(comfy, base):
    """A MODEL with an adapter of a golden case's layout, from the file of that name."""

    def load(case: str, name: str = "", change=lambda weights: None, **inputs):
        settings, family = golden(case)[0], case.partition("_")[0]
        checkpoint = toys.adapter_checkpoint(settings | {"seed": SEED}) if family != "osediff" else toys.osediff_checkpoint(SEED, 4)
        change(checkpoint.get("state_dict_unet", checkpoint))
        file = comfy.folder(family) / (name or "step.pkl")
        torch.save(checkpoint, file)
        return comfy.run("FewStepSRAdapterLoader", model=base[0], vae=base[1], adapter_name=f"{family}/{file.name}", **inputs)[0]

    return load


@pytest.fixture(scope="module")
def full(put_on):
    return put_on("pisasr_square")


@pytest.fixture(scope="module")
def pixel_alone(put_on):
    def without_semantic(weights):
        for key, weight in weights.items():
            if "_sem." in key:
                weight.zero_()

    return put_on("pisasr_square", "pixel_alone.pkl", without_semantic)


@pytest.fixture(scope="module")
def hypir(put_on):
    return put_on("hypir_square")


LATENT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def step(comfy, model, latent=LATENT, positive=None, **inputs) -> torch.Tensor:
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    return comfy.run("FewStepSROneStep", model=model, positive=positive or conditioning(SEED), latent=latent, **inputs)[0]["samples"]


def require_equation(comfy, full, pixel_alone, put, latent=LATENT, tolerance=1e-4, **inputs):
    """``put`` puts something on a MODEL; ``inputs`` are of the step."""
    eps_full, eps_pix = (latent - step(comfy, put(model), latent, **inputs) for model in (full, pixel_alone))
    found = step(comfy, put(full), latent, **KNOBS, **inputs)
    assert relative_error(found, pisasr.residual_step(latent, eps_pix, eps_full, **KNOBS)) < tolerance
    plain = step(comfy, full, latent, **KNOBS)
    assert relative_error(found, plain) > 1e-3  # it acts
    assert torch.equal(step(comfy, full, latent, **KNOBS), plain)  # and leaves nothing behind


KEY = "diffusion_model.middle_block.1.proj_in"


def with_lora(model):
    from comfy.weight_adapter import LoRAAdapter

    patched, draw = model.clone(), torch.Generator().manual_seed(3)
    halves = (torch.randn(64, 2, generator=draw), torch.randn(2, 64, generator=draw))
    assert patched.add_patches({f"{KEY}.weight": LoRAAdapter(set(), (*halves, None, None, None, None))})
    return patched


def test_lora_after_the_adapter(comfy, full, pixel_alone):
    require_equation(comfy, full, pixel_alone, with_lora)


@pytest.mark.slow
def test_lora_before_the_adapter(comfy, base, full, pixel_alone):
    first = {}
    for model in (full, pixel_alone):
        patched = with_lora(base[0])
        for key, patches in model.patches.items():
            patched.patches.setdefault(key, []).extend(patches)
        first[id(model)] = patched
    require_equation(comfy, full, pixel_alone, lambda model: first[id(model)])


@pytest.mark.slow
def test_merged_with_another_model(comfy, full, pixel_alone):
    other = toys.comfy_model(SEED + 1)
    require_equation(comfy, full, pixel_alone, lambda model: comfy.run("ModelMergeSimple", model1=model, model2=other, ratio=0.7)[0])
    require_equation(comfy, full, pixel_alone, lambda model: comfy.run("ModelMergeSimple", model1=other, model2=model, ratio=0.3)[0])


@pytest.mark.slow
def test_hooked_lora(comfy, full, pixel_alone):
    from comfy import hooks

    draw = torch.Generator().manual_seed(4)
    lora = {f"{KEY}.lora_up.weight": torch.randn(64, 2, generator=draw), f"{KEY}.lora_down.weight": torch.randn(2, 64, generator=draw)}
    hooked = hooks.set_hooks_for_conditioning(conditioning(SEED), hooks.create_hook_lora(lora, 1.0, 0.0))
    require_equation(comfy, full, pixel_alone, lambda model: model, positive=hooked)


@pytest.mark.slow
def test_control_net(comfy, full, pixel_alone):
    from comfy import controlnet

    class Control(controlnet.ControlBase):
        def get_control(self, x, t, cond, batched_number, transformer_options):
            return self.control_merge({"middle": [torch.full((1, 64, 1, 1), 3.0)], "output": []}, None, None)

    controlled = with_options(conditioning(SEED), control=Control(), control_apply_to_uncond=True)
    require_equation(comfy, full, pixel_alone, lambda model: model, positive=controlled)


@pytest.mark.slow
def test_guidance_and_patches_of_the_sampler(comfy, full, pixel_alone):
    def halved(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: args["input"] - (args["input"] - args["denoised"]) * 0.5)
        return model

    require_equation(comfy, full, pixel_alone, halved)
    require_equation(comfy, full, pixel_alone, lambda model: model, negative=conditioning(SEED, "negative"), cfg=2.0)
    with pytest.raises(ValueError, match=r"cfg: found 2.0 without a negative input"):
        step(comfy, full, cfg=2.0)
    assert torch.equal(step(comfy, full, cfg=0.0), step(comfy, full, cfg=1.0))


@pytest.mark.slow
def test_tiles(comfy, full, pixel_alone):
    """Both predictions are blended over the whole canvas before they are weighed, and the weights change once, not for each tile."""
    latent = torch.randn(1, 4, 40, 28, generator=torch.Generator().manual_seed(6))
    require_equation(comfy, full, pixel_alone, lambda model: tiled(comfy, model), latent)
    for model, knobs in ((full, KNOBS), (full, {"coeff_t": 200})):
        near, calls = local(model)
        whole = step(comfy, near, latent, **knobs)
        calls.clear()
        assert relative_error(step(comfy, tiled(comfy, near), latent, **knobs), whole) < 1e-4
        assert {shape[-2:] for shape in calls} == {(16, 16)}
    loads = []
    from comfy.patcher_extension import CallbacksMP

    watched = tiled(comfy, full, batch=1)
    watched.add_callback(CallbacksMP.ON_LOAD, lambda *_: loads.append(1))
    step(comfy, watched, latent, **KNOBS)
    assert len(loads) <= 2


@pytest.mark.parametrize(("family", "knobs"), [pytest.param("pisasr", KNOBS, marks=pytest.mark.slow), ("hypir", {"coeff_t": 120})])
def test_batch_mask_and_preview(comfy, full, hypir, family, knobs, monkeypatch):
    from comfy import model_management, utils

    model = {"pisasr": full, "hypir": hypir}[family]
    latents = torch.randn(5, 4, 6, 9, generator=torch.Generator().manual_seed(7))
    together = step(comfy, model, latents, **knobs)
    for i in (0, 4):
        assert relative_error(together[i : i + 1], step(comfy, model, latents[i : i + 1], **knobs)) < 1e-5
    mask = torch.zeros(1, 48, 72)
    mask[..., 32:] = 1
    masked = comfy.run("SetLatentNoiseMask", samples={"samples": latents}, mask=mask)[0]
    part = step(comfy, model, masked, **knobs)
    assert relative_error(part[..., 4:], together[..., 4:]) < 1e-4 and relative_error(part[..., :4], latents[..., :4]) < 1e-5
    progress, previous = [], utils.PROGRESS_BAR_HOOK
    utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: progress.append((value, total)))
    try:
        assert torch.equal(step(comfy, model, latents, **knobs), together)
        steps = [step for step in progress if step[1] != len(latents)]  # between them the pictures stream through
        assert steps == ([(1, 2), (2, 2)] if family == "pisasr" else [(1, 1)])
        model_management.interrupt_current_processing(True)
        with pytest.raises(model_management.InterruptProcessingException):
            step(comfy, model, latents, **knobs)
    finally:
        model_management.interrupt_current_processing(False)
        utils.set_progress_bar_global_hook(previous)
    assert torch.equal(step(comfy, model, latents, **knobs), together)


@pytest.mark.slow
def test_compiled_model(comfy, full):
    """As TorchCompileModel compiles it, without a C++ compiler and one layer alone: the weights are swapped under it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = full.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=[KEY])
    for knobs in (KNOBS, {}, {"semantic": 0.0}):
        assert relative_error(step(comfy, compiled, **knobs), step(comfy, full, **knobs)) < 1e-4


def test_weights_are_patched_anew_only_where_they_change(comfy, full):
    with_sets = comfy.module(".nodes.marks").with_sets
    assert with_sets(full, pisasr.SETS) is full
    pix, again = with_sets(full, ("pix",)), with_sets(full, ("pix",))
    assert pix.clone_has_same_weights(again) and not pix.clone_has_same_weights(full)


@pytest.mark.parametrize(("knobs", "calls"), [((1, 1), 1), ((0.6, 0.6), 1), ((1, 0), 1), ((0, 0), 1), ((1, 0.6), 2), ((0, 1), 2)])
def test_as_few_calls_as_the_equation_needs(knobs, calls):
    eps_pix, eps_full, z = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    acting = pisasr.calls(*knobs)
    predicted = [{("pix",): eps_pix, pisasr.SETS: eps_full}[sets] for sets in acting]
    assert len(acting) == calls
    found = pisasr.PISASR.one_step.equation(z, predicted, 1, pixel=knobs[0], semantic=knobs[1])
    assert torch.allclose(found, pisasr.residual_step(z, eps_pix, eps_full, *knobs))


# What the nodes say.


def test_step_without_an_adapter(comfy, base):
    with pytest.raises(ValueError, match="model: found no adapter of a few-step method on it, expected one. Put 'Load Few-Step SR Adapter' before"):
        step(comfy, base[0])


@pytest.mark.parametrize("case", ["pisasr_square", "hypir_square"])
def test_the_frozen_nodes_meet_another_family(comfy, put_on, case):
    model, title = put_on(case), {"pisasr": "PiSA-SR", "hypir": "HYPIR"}[case.partition("_")[0]]
    inputs = {"model": model, "latent": {"samples": LATENT}}
    for node, more in {"OSEDiffOneStep": {"positive": conditioning(SEED)}, "OSEDiffStartState": {}}.items():
        with pytest.raises(ValueError, match=f"model: found {title}'s adapter on it, expected OSEDiff's. Wire it into 'Few-Step SR One Step'"):
            comfy.run(node, **inputs, **more)
    comfy.run("OSEDiffOneStep", **(inputs | {"model": put_on(case, strength_model=0.0)}), positive=conditioning(SEED))


def test_adapters_of_two_families(comfy, base, full, put_on, caplog):
    both = comfy.run("FewStepSRAdapterLoader", model=full, vae=base[1], adapter_name="hypir/step.pkl")[0]
    assert "model: found a PiSA-SR adapter on it already, expected the base's own" in caplog.text
    with pytest.raises(ValueError, match="model: found adapters of PiSA-SR and HYPIR on it, expected one"):
        step(comfy, both)


def test_settings_of_another_family(comfy, full, hypir, put_on, caplog):
    plain = step(comfy, hypir)
    assert not caplog.text
    assert torch.equal(step(comfy, hypir, pixel=0.5), plain)
    assert "pixel: found 0.5, but the adapter is HYPIR's, which has no such setting" in caplog.text
    step(comfy, full, coeff_t=100)
    assert "coeff_t: found 100, but the adapter is PiSA-SR's" in caplog.text
    step(comfy, full, semantic=3.0)
    assert "semantic: found 3, expected 1 (0 to 2)" in caplog.text
    put_on("pisasr_square", strength_vae=0.5)
    assert "strength_vae: found 0.5, but PiSA-SR's adapter leaves the VAE unchanged" in caplog.text
    for name, value in {"pixel": float("nan"), "semantic": 11.0, "coeff_t": 1000}.items():
        with pytest.raises(ValueError, match=f"{name}: found {value}, expected a number from"):
            step(comfy, full, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pisasr_square", "hypir_square"])
def test_strength_0_and_merges_that_lose_the_adapter(comfy, base, put_on, caplog, case):
    model = put_on(case)
    for lost in (put_on(case, strength_model=0.0), comfy.run("ModelMergeSimple", model1=base[0], model2=model, ratio=1.0)[0]):
        caplog.clear()
        step(comfy, lost)
        assert "acts with strength 0, lost in a merge or by strength_model" in caplog.text


def test_an_adapter_written_over_is_read_again(comfy, put_on):
    loader = comfy.nodes["FewStepSRAdapterLoader"]
    first = step(comfy, put_on("hypir_square", "again.pkl"))
    [before] = loader.fingerprint_inputs(adapter_name="hypir/again.pkl")
    changed = put_on("hypir_square", "again.pkl", lambda weights: [weight.mul_(1.5) for weight in weights.values()])
    assert loader.fingerprint_inputs(adapter_name="hypir/again.pkl") != [before]
    assert relative_error(step(comfy, changed), first) > 1e-3
    assert {path for path, *_ in loader.fingerprint_inputs()} >= {before[0]}
    assert loader.fingerprint_inputs(adapter_name=["x"]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, None),
        ("hypir/step.pkl", None),
        (
            "hypir/none.pth",
            r"expected none.pth. HYPIR_sd2.pth is at huggingface.co/lxq007/HYPIR; non-commercial use only. Download it into that folder",
        ),
        ("none.pth", r"found none.pth, expected one of: .*Put it into models/osediff, models/pisasr, models/hypir"),
        (["x"], r"found \['x'\], expected one of: "),
    ],
)
def test_files_that_are_not_there(comfy, put_on, name, message):
    put_on("hypir_square")
    answer = comfy.nodes["FewStepSRAdapterLoader"].validate_inputs(adapter_name=name)
    assert answer is True if message is None else re.search(message, answer)


def test_other_files_are_named(comfy, base):
    files = {
        "predictor.pth": (
            toys.predictor_state_dict(SEED),
            "found an InvSR noise predictor; expected an adapter of one of these methods: OSEDiff, PiSA-SR",
        ),
        "adcsr.pkl": ({"unet": {"conv_in.weight": torch.zeros(1)}, "vae": {}}, "AdcSR's merged OSEDiff"),
        "tadsr.pkl": (
            {"state_dict_vae_time": {}, "state_dict_unet": {}, "state_dict_vae": {}},
            "found a TADSR adapter.*not run here: its VAE encoder takes the timestep.*; expected an adapter",
        ),
        "lora.pth": ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "found a LoRA"),
    }
    for name, (content, message) in files.items():
        torch.save(content, comfy.folder("pisasr") / name)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            comfy.run("FewStepSRAdapterLoader", model=base[0], vae=base[1], adapter_name=f"pisasr/{name}")
        (comfy.folder("pisasr") / name).unlink()


def test_an_adapter_in_another_methods_folder_is_recognised(comfy, base, put_on, caplog):
    put_on("hypir_square")
    shutil.copy(comfy.folder("hypir") / "step.pkl", comfy.folder("pisasr") / "misplaced.pkl")
    with caplog.at_level("INFO"):
        model, vae = comfy.run("FewStepSRAdapterLoader", model=base[0], vae=base[1], adapter_name="pisasr/misplaced.pkl").args
    assert vae is base[1] and "a HYPIR adapter" in caplog.text and "licence: non-commercial use only" in caplog.text
    assert torch.equal(step(comfy, model), step(comfy, put_on("hypir_square")))
    (comfy.folder("pisasr") / "misplaced.pkl").unlink()


def test_the_vae_of_osediff_is_adapted(comfy, base, put_on):
    image = picture(SEED, 16, 24)
    put_on("osediff_square")
    vae = comfy.run("FewStepSRAdapterLoader", model=base[0], vae=base[1], adapter_name="osediff/step.pkl")[1]
    mean, plain = (comfy.run("FewStepSRVAEEncode", pixels=image, vae=v)[0]["samples"] for v in (vae, base[1]))
    assert relative_error(mean, plain) > 0.01
