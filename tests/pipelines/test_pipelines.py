"""The pipelines as diffusers' users handle them: saving, loading, pictures in and out, generators, callbacks, offloading, wrong bases."""

from dataclasses import replace

import pipeline_toys
import pytest
import safetensors.torch
import torch
import toys
from diffusers import UNet2DConditionModel
from toys import gaussian, picture, relative_error

from fewstep_sr.methods import INVSR, OSEDIFF, load_weights
from fewstep_sr.methods.osediff import save_adapter
from pipelines import InvSRNoisePredictor, InvSRPipeline, OSEDiffPipeline
from pipelines.base import DTYPE
from pipelines.single_file import find_tokenizer, require_noise_prediction

IMAGE = picture(3, 24, 17).movedim(-1, 1)
EMBEDS = gaussian(3, "prompt_embeds", (1, 77, 64))


def osediff(tmp_path, seed=3, rank=4, text=False, narrow=False, **strengths) -> OSEDiffPipeline:
    if narrow:
        adapter = pipeline_toys.narrow_adapter(tmp_path / "adapter.safetensors")
    else:
        torch.save(toys.osediff_checkpoint(seed, rank), adapter := tmp_path / "adapter.pkl")
    pipeline = OSEDiffPipeline(**pipeline_toys.components(seed, tmp_path / "clip" if text else None, narrow))
    pipeline.load_osediff(adapter, **strengths)
    return pipeline


def invsr(tmp_path, seed=3, text=False) -> InvSRPipeline:
    torch.save(toys.predictor_state_dict(seed), tmp_path / "predictor.pth")
    pipeline = InvSRPipeline(**pipeline_toys.components(seed, tmp_path / "clip" if text else None))
    pipeline.load_noise_predictor(tmp_path / "predictor.pth")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = pytest.mark.parametrize("make", [osediff, invsr])
SLOW_OSEDIFF = pytest.mark.parametrize("make", [pytest.param(osediff, marks=pytest.mark.slow), invsr])
NARROW = pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict:
    """A pipeline of each, for tests that leave it as it is."""
    return {make: make(tmp_path_factory.mktemp("loaded")) for make in (osediff, invsr)}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return relative_error(found, expected) < 1e-5


def restore(pipeline, image=IMAGE, **kwargs) -> torch.Tensor:
    return pipeline(image, **{"prompt_embeds": EMBEDS, "scale": 2, "output_type": "pt"} | kwargs).images


@SLOW_OSEDIFF
def test_saved_and_loaded(make, tmp_path):
    pipeline = make(tmp_path, text=True)
    expected = restore(pipeline, prompt_embeds=None, prompt="a cat")
    pipeline.save_pretrained(tmp_path / "saved")
    assert same(restore(pipeline, prompt_embeds=None, prompt="a cat"), expected)
    again = type(pipeline).from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert same(restore(again, prompt_embeds=None, prompt="a cat"), expected)
    half = type(pipeline).from_pretrained(tmp_path / "saved", **{DTYPE: torch.bfloat16})
    assert {half.unet.dtype, half.vae.dtype} == {torch.bfloat16}
    assert relative_error(restore(half, prompt_embeds=None, prompt="a cat"), expected) < 0.05


@NARROW
def test_osediff_saves_base_and_adapter_apart(tmp_path, narrow):
    pipeline = osediff(tmp_path, narrow=narrow, strength_model=0.8, strength_vae=0.5)
    expected = restore(pipeline)
    pipeline.fuse()
    pipeline.save_pretrained(tmp_path / "saved")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "saved", subfolder="unet").state_dict()
    base = pipeline_toys.components(3, narrow=narrow)["unet"].state_dict()
    assert all(torch.allclose(unet[k], v, rtol=1e-6, atol=1e-7) for k, v in base.items())
    assert same(restore(pipeline), expected)
    assert same(restore(OSEDiffPipeline.from_pretrained(tmp_path / "saved")), expected)


@NARROW
def test_osediff_comes_off(tmp_path, narrow):
    pipeline, base = osediff(tmp_path, narrow=narrow), pipeline_toys.components(3, narrow=narrow)
    (file,) = tmp_path.glob("adapter.*")
    pipeline.unload_osediff()
    for part in ("unet", "vae"):
        state, weights = getattr(pipeline, part).state_dict(), base[part].state_dict()
        assert state.keys() == weights.keys() and all(torch.equal(state[k], v) for k, v in weights.items())
    with pytest.raises(ValueError, match="no adapter is loaded"):
        restore(pipeline)
    pipeline.load_osediff(file)
    first = restore(pipeline)
    pipeline.load_osediff(file)
    assert same(restore(pipeline), first)


def test_one_step_is_at_the_adapters_timestep(tmp_path):
    """Where nothing is said: the file's own, as the whole pipeline takes it; without an adapter, the published 999."""
    pipeline, latents = osediff(tmp_path), gaussian(3, "latents", (1, 4, 6, 8))
    at = {timestep: pipeline.one_step(latents, EMBEDS, timestep=timestep) for timestep in (249, 999)}
    assert same(pipeline.one_step(latents, EMBEDS), at[999])
    published = load_weights(OSEDIFF, tmp_path / "adapter.pkl")
    save_adapter(replace(published, timestep=249), tmp_path / "adapter.safetensors")
    pipeline.load_osediff(tmp_path / "adapter.safetensors")
    assert same(pipeline.one_step(latents, EMBEDS), at[249]) and not same(at[249], at[999])
    assert same(pipeline.one_step(latents, EMBEDS, timestep=999), at[999])
    pipeline.unload_osediff()
    assert same(pipeline.one_step(latents, EMBEDS), pipeline.one_step(latents, EMBEDS, timestep=999))


def test_noise_predictor_component_is_a_published_file(tmp_path):
    pipeline = invsr(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "noise_predictor" / "diffusion_pytorch_model.safetensors"
    weights = load_weights(INVSR, file)
    assert all(torch.equal(weights.state_dict[k], v) for k, v in toys.predictor_state_dict(3).items())
    again = InvSRNoisePredictor.from_weights(file)
    assert again.pixels_per_cell == 2


@SLOW_OSEDIFF
def test_weights_come_along_from_the_hub(make, tmp_path):
    """A repository as the hub's client keeps it, of a pipeline that was saved with its adapter or predictor."""
    expected, commit = make(tmp_path), "0" * 40
    repository = tmp_path / "hub" / "models--someone--restorer"
    expected.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    again = type(expected).from_pretrained("someone/restorer", cache_dir=tmp_path / "hub", local_files_only=True)
    assert same(restore(again), restore(expected))


def test_invsr_without_predictor(tmp_path):
    InvSRPipeline(**pipeline_toys.components(3, tmp_path / "clip")).save_pretrained(tmp_path / "base")
    pipeline = InvSRPipeline.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no noise predictor is loaded"):
        restore(pipeline)


@SLOW_OSEDIFF
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".ckpt", marks=pytest.mark.slow)])
def test_base_in_one_file(comfy, make, suffix, tmp_path):
    """The file's keys are the original ones, as ComfyUI has them."""
    state = {f"model.diffusion_model.{k}": v for k, v in toys.comfy_model(3).model.diffusion_model.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in toys.comfy_vae(3).first_stage_model.state_dict().items()}
    path = tmp_path / f"base{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    expected = make(tmp_path)
    expected.save_pretrained(tmp_path / "config")
    pipeline = type(expected).from_single_file(path, config=tmp_path / "config", text_encoder=None, tokenizer=None)
    if make is osediff:
        pipeline.load_osediff(tmp_path / "adapter.pkl")
    else:
        pipeline.load_noise_predictor(tmp_path / "predictor.pth")
    assert relative_error(restore(pipeline), restore(expected)) < 1e-4


def test_v_prediction_in_one_file():
    """The file of the base for 768 pixels has the same keys and shapes as the one for 512: one layer's biases are spread wider."""
    sizes = {"block_out_channels": (32,) * 4, "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 8}
    unet = UNet2DConditionModel(**sizes, use_linear_projection=True)
    require_noise_prediction(unet, "v2-1_512-ema-pruned.safetensors")
    torch.nn.init.normal_(unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias, std=0.2)
    with pytest.raises(
        ValueError, match=r"v2-1_768-ema-pruned.safetensors: found Stable Diffusion 2.1 at 768 pixels .*expected a base that predicts noise"
    ):
        require_noise_prediction(unet, "v2-1_768-ema-pruned.safetensors")


@pytest.mark.parametrize("make", [pytest.param(osediff, marks=pytest.mark.slow), invsr])
def test_pictures_in_and_out(make, loaded):
    pipeline = loaded[make]
    expected = restore(pipeline)
    (pil,) = pipeline.image_processor.postprocess(IMAGE, "pil", do_denormalize=[False])
    array = IMAGE.movedim(1, -1).numpy()
    eight_bit = restore(pipeline, torch.from_numpy(pipeline.image_processor.pil_to_numpy(pil)).movedim(-1, 1))
    for image in (array, array[0], [array[0]], [IMAGE[0]]):
        assert same(restore(pipeline, image), expected)
    for image in (pil, [pil], pil.convert("RGBA")):
        assert same(restore(pipeline, image), eight_bit)
    assert restore(pipeline, output_type="pil")[0].size == (34, 48)
    assert same(torch.from_numpy(restore(pipeline, output_type="np")).movedim(-1, 1), expected)
    assert same(pipeline(IMAGE, prompt_embeds=EMBEDS, scale=2, output_type="pt", return_dict=False)[0], expected)


@PIPELINES
def test_generators(make, loaded):
    pipeline = loaded[make]
    two = IMAGE.repeat(2, 1, 1, 1)

    def run(image, generator):
        return restore(pipeline, image, posterior="sample", generator=generator)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    shared = run(two, seeded(1))
    assert same(shared[1], shared[0])
    apart = run(two, [seeded(1), seeded(2)])
    assert same(apart[0], shared[0]) and relative_error(apart[1], apart[0]) > 1e-3
    assert same(run(IMAGE, seeded(2))[0], apart[1])
    assert same(run(IMAGE, None), run(IMAGE, None))
    with pytest.raises(ValueError, match="generator: found 2, expected 1 or 3"):
        run(IMAGE.repeat(3, 1, 1, 1), [seeded(1), seeded(2)])


@PIPELINES
def test_callback(make, loaded):
    pipeline = loaded[make]
    seen = []

    def grey(_, step, timestep, tensors):
        seen.append((step, int(timestep), list(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = restore(pipeline, callback_on_step_end=grey, color_fix=None)
    assert seen == [(0, 999 if make is osediff else 199, ["latents"])]
    assert same(result, pipeline.decode(torch.zeros(1, 4, 6, 5), result.shape[-2:]))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        restore(pipeline, callback_on_step_end=grey, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.slow
@SLOW_OSEDIFF
def test_cpu_offload(make, tmp_path):
    """The hooks that move whole networks, from the CPU to the CPU: every network that runs must have one."""
    pipeline = make(tmp_path, text=True)
    expected = restore(pipeline, prompt_embeds=None, prompt="a cat")
    pipeline.enable_model_cpu_offload(device="cpu")
    networks = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
    assert len(pipeline._all_hooks) == len(networks) == len(pipeline.model_cpu_offload_seq.split("->"))
    assert same(restore(pipeline, prompt_embeds=None, prompt="a cat"), expected)
    assert same(restore(pipeline, prompt_embeds=None, prompt="a cat"), expected)


@pytest.mark.parametrize("make", [pytest.param(osediff, marks=pytest.mark.slow), invsr])
def test_tiled_vae(make, tmp_path):
    pipeline = make(tmp_path)
    whole = restore(pipeline, scale=4)
    pipeline.vae.enable_tiling()
    tiled = restore(pipeline, scale=4)
    assert tiled.shape == whole.shape and not same(tiled, whole)


def test_wrong_bases(tmp_path):
    parts = pipeline_toys.components(3)
    with pytest.raises(ValueError, match="v_prediction .*expected epsilon"):
        OSEDiffPipeline(**parts | {"scheduler": pipeline_toys.scheduler(prediction_type="v_prediction")})
    config = dict(parts["unet"].config)
    for change, message in (
        ({"cross_attention_dim": 768}, "768 .Stable Diffusion 1.x., expected 1024"),
        ({"in_channels": 9}, "found 9 input channels"),
    ):
        with pytest.raises(ValueError, match=message):
            InvSRPipeline(**parts | {"unet": UNet2DConditionModel.from_config(config | change)})


@pytest.mark.slow
def test_wrong_adapter_changes_nothing(tmp_path):
    pipeline = osediff(tmp_path)
    expected = restore(pipeline)
    checkpoint = toys.osediff_checkpoint(3, 4)
    layer = "mid_block.attentions.0.proj_in.lora_A.default_others.weight"
    checkpoint["state_dict_unet"][layer] = checkpoint["state_dict_unet"][layer][:, :-1]
    torch.save(checkpoint, tmp_path / "other.pkl")
    with pytest.raises(ValueError, match=r"layer mid_block.attentions.0.proj_in has shape \(64, 64\), but the adapter's is \(64, 63\)"):
        pipeline.load_osediff(tmp_path / "other.pkl")
    assert same(restore(pipeline), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE * 255, "Divide 8-bit values by 255"),
        (IMAGE * float("nan"), "not numbers"),
        (torch.zeros(1, 1, 8, 8), "expected .batch, 3, height, width."),
    ],
)
def test_wrong_pictures(loaded, image, message):
    with pytest.raises(ValueError, match=message):
        restore(loaded[osediff], image)


def test_text_of_another_width(loaded):
    with pytest.raises(ValueError, match="embedding size 768, expected 64"):
        restore(loaded[osediff], prompt_embeds=torch.zeros(1, 77, 768))
    with pytest.raises(ValueError, match="Pass prompt_embeds"):
        restore(loaded[osediff], prompt_embeds=None)


@pytest.mark.slow
def test_tokenizer_without_a_length(tmp_path):
    """ComfyUI's and some bases' tokenizers do not say how long a text may be."""
    pipeline = osediff(tmp_path, text=True)
    expected = pipeline.encode_prompt("a cat")
    pipeline.tokenizer.model_max_length = int(1e30)
    assert same(pipeline.encode_prompt("a cat"), expected) and pipeline.encode_prompt("a cat " * 100).shape == (1, 77, 64)


def test_tokenizer_for_a_base_in_one_file(comfyui_path, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("pipelines.single_file.TOKENIZER_REPOSITORIES", ("nobody/nothing",))
    tokenizer = find_tokenizer(local_files_only=True, comfyui=comfyui_path)
    tokens = tokenizer("a cat", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert tokens == [49406, 320, 2368, 49407] + [0] * 73  # padded with "!"
    with pytest.raises(FileNotFoundError, match="Name your ComfyUI"):
        find_tokenizer(local_files_only=True)
