"""S3Diff among other nodes, in batches of different images: each must be what its own adapter, put on as patches like any other, gives it alone."""

import shutil

import pytest
import torch
import toys
from sampling import tiled, with_options
from toys import GOLDEN, conditioning, gaussian, golden, relative_error

from fewstep_sr.methods import S3DIFF, load_weights

CASE = "s3diff_square"
SEED = golden(CASE)[0]["seed"]
SCORES = torch.tensor([[0.2, 0.7], [0.9, 0.1], [0.2, 0.7], [0.5, 0.5]])
LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
KEY = "diffusion_model.middle_block.1.proj_in"


@pytest.fixture(scope="module")
def base(comfy):
    return toys.comfy_model(SEED), toys.comfy_vae(SEED)


@pytest.fixture(scope="module")
def load(comfy, base):
    """MODEL and VAE with the adapter on, on another base if one is given."""
    shutil.copy(GOLDEN / f"{CASE}.pkl", comfy.folder("s3diff") / "mixed.pkl")

    def run(model=None, vae=None, **strengths):
        return comfy.run("FewStepSRAdapterLoader", model=model or base[0], vae=vae or base[1], adapter_name="s3diff/mixed.pkl", **strengths).args

    return run


@pytest.fixture(scope="module")
def adapter():
    return load_weights(S3DIFF, GOLDEN / f"{CASE}.pkl")


@pytest.fixture(scope="module")
def own(comfy, base, adapter):
    """Each image's adapter as patches on a base."""
    method = comfy.module(".fewstep_sr.methods").S3DIFF
    adapt_model = comfy.module(".nodes.adapter").adapt_model

    def put(model=None, strength=1.0):
        return [adapt_model(model or base[0], method, adapter.for_image("unet", scores), strength) for scores in SCORES]

    return put


def step(comfy, model, latent, **inputs):
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    prompts = {"positive": conditioning(SEED), "negative": conditioning(SEED, "negative_prompt_embeds")} | inputs
    return comfy.run("FewStepSROneStep", model=model, latent=latent, **prompts)[0]["samples"]


def carried(comfy, loaded, scores=SCORES):
    return comfy.run("S3DiffAdapt", model=loaded[0], vae=loaded[1], scores=scores)[0]


def require_own(comfy, load, own, put, **inputs):
    """``put`` puts something on a MODEL, after the adapter; ``inputs`` are of the step."""
    expected = torch.cat([step(comfy, put(model), LATENTS[i : i + 1], **inputs) for i, model in enumerate(own())])
    plain = step(comfy, carried(comfy, load()), LATENTS)
    after = step(comfy, put(carried(comfy, load())), LATENTS, **inputs)
    assert relative_error(after, expected) < 1e-4
    between = put(load()[0]), load()[1]
    assert relative_error(step(comfy, carried(comfy, between), LATENTS, **inputs), expected) < 1e-4
    assert relative_error(after, plain) > 1e-3  # it acts
    assert torch.equal(step(comfy, carried(comfy, load()), LATENTS), plain)  # and leaves nothing behind


def with_lora(model, strength=1.0):
    from comfy.weight_adapter import LoRAAdapter

    patched, draw = model.clone(), torch.Generator().manual_seed(3)
    halves = (torch.randn(64, 2, generator=draw), torch.randn(2, 64, generator=draw))
    assert patched.add_patches({f"{KEY}.weight": LoRAAdapter(set(), (*halves, None, None, None, None))}, strength)
    return patched


@pytest.mark.slow
def test_lora_after_the_adapter(comfy, load, own):
    require_own(comfy, load, own, with_lora)


@pytest.mark.slow
def test_lora_before_the_adapter(comfy, base, load, own):
    patched = with_lora(base[0])
    expected = torch.cat([step(comfy, model, LATENTS[i : i + 1]) for i, model in enumerate(own(patched))])
    assert relative_error(step(comfy, carried(comfy, load(patched)), LATENTS), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.7, 0.0])
def test_merged_with_another_model(comfy, load, own, ratio):
    other = toys.comfy_model(SEED + 1)
    require_own(comfy, load, own, lambda model: comfy.run("ModelMergeSimple", model1=model, model2=other, ratio=ratio)[0])


def test_neither_saved_nor_merged_into_another_model(comfy, base, load, tmp_path):
    """Both take a model's patches, and the adapter is none before it is an image's: said, never left out."""
    from comfy.sd import save_checkpoint

    for model in (load()[0], carried(comfy, load()), with_lora(carried(comfy, load()))):
        assert isinstance(model, type(base[0]))
        with pytest.raises(ValueError, match="model: found S3Diff's, whose weights are others for each image, expected one that can be merged into"):
            comfy.run("ModelMergeSimple", model1=toys.comfy_model(SEED + 1), model2=model, ratio=0.3)
        with pytest.raises(ValueError, match="model: found S3Diff's, whose weights are others for each image, expected one that can be saved"):
            save_checkpoint(str(tmp_path / "x.safetensors"), model)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hooked_lora_in_cores_sampler(comfy, load, own):
    from comfy import hooks

    draw = torch.Generator().manual_seed(4)
    lora = {f"{KEY}.lora_up.weight": torch.randn(64, 2, generator=draw), f"{KEY}.lora_down.weight": torch.randn(2, 64, generator=draw)}
    hooked = hooks.set_hooks_for_conditioning(conditioning(SEED), hooks.create_hook_lora(lora, 1.0, 0.0))
    settings = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "negative": conditioning(SEED)}

    def sample(model, positive):
        return comfy.run("KSampler", model=model, positive=positive, latent_image={"samples": LATENTS[:1]}, **settings)[0]["samples"]

    model = carried(comfy, load(), SCORES[:1])
    expected, plain = (sample(own()[0], positive) for positive in (hooked, conditioning(SEED)))
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(sample(model, hooked), expected) < 1e-4 and relative_error(sample(model, conditioning(SEED)), plain) < 1e-4


@pytest.mark.slow
def test_hooked_lora(comfy, load, own):
    from comfy import hooks

    draw = torch.Generator().manual_seed(4)
    lora = {f"{KEY}.lora_up.weight": torch.randn(64, 2, generator=draw), f"{KEY}.lora_down.weight": torch.randn(2, 64, generator=draw)}
    hooked = hooks.set_hooks_for_conditioning(conditioning(SEED), hooks.create_hook_lora(lora, 1.0, 0.0))
    require_own(comfy, load, own, lambda model: model, positive=hooked)


@pytest.mark.slow
def test_control_net(comfy, load, own):
    from comfy import controlnet

    class Control(controlnet.ControlBase):
        def get_control(self, x, t, cond, batched_number, transformer_options):
            return self.control_merge({"middle": [torch.full((1, 64, 1, 1), 3.0)], "output": []}, None, None)

    controlled = with_options(conditioning(SEED), control=Control(), control_apply_to_uncond=True)
    require_own(comfy, load, own, lambda model: model, positive=controlled)


@pytest.mark.slow
def test_patches_of_the_sampler_and_of_attention(comfy, load, own):
    def halved(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: args["input"] - (args["input"] - args["denoised"]) * 0.5)
        model.set_model_attn1_patch(lambda q, k, v, options: (q * 1.2, k, v))
        return model

    require_own(comfy, load, own, halved)


@pytest.mark.slow
def test_strengths(comfy, load, own):
    for strength in (0.5, -1.0):
        expected = torch.cat([step(comfy, model, LATENTS[i : i + 1]) for i, model in enumerate(own(strength=strength))])
        assert relative_error(step(comfy, carried(comfy, load(strength_model=strength)), LATENTS), expected) < 1e-4


@pytest.mark.slow
def test_compiled_model(comfy, load, own):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager", keys=[KEY])
        return model

    expected = torch.cat([step(comfy, model, LATENTS[i : i + 1]) for i, model in enumerate(own())])
    for _ in range(2):
        assert relative_error(step(comfy, compiled(carried(comfy, load())), LATENTS), expected) < 1e-4


@pytest.mark.slow
def test_masks_of_each_image(comfy, load, own):
    masks = torch.stack([torch.zeros(64, 64), torch.ones(64, 64), torch.cat([torch.zeros(64, 32), torch.ones(64, 32)], 1), torch.rand(64, 64)])
    masked = comfy.run("SetLatentNoiseMask", samples={"samples": LATENTS}, mask=masks)[0]
    found = step(comfy, carried(comfy, load()), masked)
    for i, model in enumerate(own()):
        alone = comfy.run("SetLatentNoiseMask", samples={"samples": LATENTS[i : i + 1]}, mask=masks[i : i + 1])[0]
        assert relative_error(found[i : i + 1], step(comfy, model, alone)) < 1e-4


@pytest.mark.slow
def test_any_order(comfy, load, own):
    alone = torch.cat([step(comfy, model, LATENTS[i : i + 1]) for i, model in enumerate(own())])
    for order in ([3, 2, 1, 0], [1, 0, 1, 3], [0, 2, 0, 2], [1]):
        found = step(comfy, carried(comfy, load(), SCORES[order]), LATENTS[order])
        assert relative_error(found, alone[order]) < 1e-4
    prompts = [[torch.cat([gaussian(SEED, name, (1, 77, 64)) for name in "abcd"]), {}]]
    found = step(comfy, tiled(comfy, carried(comfy, load()), batch=3), LATENTS, positive=prompts)
    for i, model in enumerate(own()):
        single = step(comfy, model, LATENTS[i : i + 1], positive=[[gaussian(SEED, "abcd"[i], (1, 77, 64)), {}]])
        assert relative_error(found[i : i + 1], single) < 1e-4


@pytest.mark.slow
def test_other_loaders_before_and_after(comfy, base, load, caplog):
    torch.save(toys.adapter_checkpoint(golden("hypir_square")[0] | {"seed": SEED}), comfy.folder("hypir") / "mixed.pth")
    torch.save(toys.osediff_checkpoint(SEED, 4), comfy.folder("osediff") / "mixed.pkl")

    def hypir(model, vae):
        return comfy.run("FewStepSRAdapterLoader", model=model, vae=vae, adapter_name="hypir/mixed.pth").args

    def osediff(model, vae):
        return comfy.run("OSEDiffLoader", model=model, vae=vae, osediff_name="mixed.pkl").args

    for other, title in ((hypir, "HYPIR"), (osediff, "OSEDiff")):
        for found, models in ((title, lambda other=other: load(*other(*base))), ("S3Diff", lambda other=other: other(*load()))):
            caplog.clear()
            model, vae = models()
            kind = {"HYPIR": "a HYPIR", "OSEDiff": "an OSEDiff", "S3Diff": "an S3Diff"}[found]
            assert f"model: found {kind} adapter on it already, expected the base's own" in caplog.text
            assert (f"vae: found {kind} adapter on it already" in caplog.text) == (found != "HYPIR")
            for mixed in (model, comfy.run("S3DiffAdapt", model=model, vae=vae, scores=SCORES)[0]):
                with pytest.raises(ValueError, match=rf"model: found adapters of ({title} and S3Diff|S3Diff and {title}) on it, expected one"):
                    step(comfy, mixed, LATENTS)
    caplog.clear()
    twice = load(*load())
    assert "model: found an S3Diff adapter on it already" in caplog.text and "Both act" not in caplog.text
    assert torch.equal(step(comfy, carried(comfy, twice), LATENTS), step(comfy, carried(comfy, load()), LATENTS))
    off = hypir(*load(strength_model=0.0, strength_vae=0.0))
    caplog.clear()
    assert torch.equal(step(comfy, off[0], LATENTS, cfg=1.0), step(comfy, hypir(*base)[0], LATENTS, cfg=1.0))


@pytest.mark.slow
def test_an_adapter_that_nothing_is_left_of(comfy, load, caplog):
    other = toys.comfy_model(SEED + 1)
    lost = carried(comfy, load())
    for model in (
        carried(comfy, load(strength_model=0.0)),
        *(comfy.run("ModelMergeSimple", model1=lost, model2=other, ratio=ratio)[0] for ratio in (0.0, 0.5)),
    ):
        caplog.clear()
        step(comfy, model, LATENTS)
        said = "model: the S3Diff adapter on it acts with strength 0, lost in a merge or by strength_model" in caplog.text
        assert said == (model.patches == {} or next(iter(model.patches.values()))[0][2] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "float8_e4m3fn", "packed"])
def test_other_weights_of_the_base(comfy, load, own, kind):
    """In half, in eight bits, and in a quantised file's blocks, as any other patches act on them."""
    model = toys.comfy_model(SEED, dtype=torch.float32 if kind == "packed" else getattr(torch, kind))
    if kind == "packed":
        for module in model.model.diffusion_model.modules():
            if type(module).__name__ == "Linear" and isinstance(module, torch.nn.Linear):
                module.__class__ = type("PackedLinear", (PackedLinear, type(module)), {})
    found = step(comfy, carried(comfy, load(model)), LATENTS)
    expected = torch.cat([step(comfy, each, LATENTS[i : i + 1]) for i, each in enumerate(own(model))])
    assert torch.isfinite(found).all() and relative_error(found, expected) < (1e-4 if kind == "packed" else 2e-2)
    plain = step(comfy, carried(comfy, load()), LATENTS)
    assert relative_error(found, plain) < {"packed": 1e-4, "float16": 0.05, "float8_e4m3fn": 1.0}[kind]


class PackedLinear(torch.nn.Linear):
    """A layer that is kept as a quantised file's blocks, as ComfyUI-GGUF's: its state dict holds their bytes."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = torch.zeros(17, dtype=torch.uint8)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias
