"""PiSA-SR and HYPIR, headless, against the authors' own code stage by stage, with the wrong turns that the formulas invite."""

import numpy
import pipeline_toys
import pytest
import torch
import toys
from toys import gaussian, golden, picture, relative_error

from fewstep_sr.diffusion import alpha_bar_at, predict_x0
from fewstep_sr.image.color import fix_color
from fewstep_sr.methods import PISASR, hypir, pisasr
from pipelines import HYPIRPipeline, OSEDiffPipeline, PiSASRPipeline
from pipelines.find import find_weights

TOLERANCE = 1e-4


def start(case: str, kind, tmp_path, extension: str):
    settings, arrays = golden(case)
    seed = settings["seed"]
    pipeline = kind(**pipeline_toys.components(seed))
    path = tmp_path / f"adapter.{extension}"
    torch.save(toys.adapter_checkpoint(settings), path)
    pipeline.load_weights(path)
    image = picture(seed, *settings["size"]).movedim(-1, 1)
    return pipeline, arrays, image, gaussian(seed, "prompt_embeds", (1, 77, 64)), gaussian(seed, "vae_posterior", arrays["latent"].shape)


@pytest.mark.parametrize("case", ["pisasr_square", pytest.param("pisasr_tall", marks=pytest.mark.slow)])
def test_pisasr(case, tmp_path, monkeypatch):
    pipeline, arrays, image, embeds, noise = start(case, PiSASRPipeline, tmp_path, "pkl")
    monkeypatch.setattr("pipelines.base.draw_noise", lambda shape, seed: noise)
    assert relative_error(pipeline.encode(image) / 0.18215, arrays["posterior_mean"]) < TOLERANCE
    latent = pipeline.encode(image, posterior="sample")
    assert relative_error(latent, arrays["latent"]) < TOLERANCE
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    for knobs in golden(case)[0]["lambdas"]:
        name = "_".join(f"{knob:g}" for knob in knobs)
        calls.clear()
        assert relative_error(pipeline.one_step(latent, embeds, *knobs), arrays[f"x0_{name}"]) < TOLERANCE
        assert len(calls) == (1 if knobs == [1, 1] else 2)
        whole = pipeline(
            image, prompt_embeds=embeds, scale=1, posterior="sample", pixel=knobs[0], semantic=knobs[1], color_fix=None, output_type="pt"
        )
        assert relative_error(whole.images * 2 - 1, arrays[f"image_{name}"]) < TOLERANCE
    pipeline.fuse()
    assert relative_error(pipeline.one_step(latent, embeds), arrays["x0_default"]) < TOLERANCE
    assert relative_error(pipeline.one_step(latent, embeds, 0.5, 1.5), arrays["x0_0.5_1.5"]) < TOLERANCE
    pipeline.unload_pisasr()
    assert relative_error(pipeline.predict_noise(latent, 1, embeds), arrays["eps_full"]) > 0.1


def test_pisasr_wrong_turns():
    settings, arrays = golden("pisasr_square")
    latent, pix, full = (arrays[name] for name in ("latent", "eps_pix", "eps_full"))
    right = arrays["x0_0.5_1.5"]
    assert relative_error(pisasr.residual_step(latent, pix, full, 0.5, 1.5), right) < 1e-5
    assert relative_error(pisasr.residual_step(latent, pix, full, 1.5, 0.5), right) > 0.1  # the knobs swapped
    assert relative_error(predict_x0(latent, full, alpha_bar_at(1, latent)), arrays["x0_default"]) > 0.1  # the usual step at index 1
    assert pisasr.TIMESTEP == settings["timestep"] == 1


def test_pisasrs_sets_have_ranks_of_their_own(tmp_path):
    """Each set changes a layer by 8 / rank of its own product."""
    ranks = {"pix": 2, "sem": 4}
    checkpoint = toys.adapter_checkpoint(golden("pisasr_square")[0] | {f"rank_{which}": rank for which, rank in ranks.items()})
    torch.save(checkpoint, tmp_path / "adapter.pkl")
    pipeline = PiSASRPipeline(**pipeline_toys.components(2))
    pipeline.load_pisasr(tmp_path / "adapter.pkl")
    state = checkpoint["state_dict_unet"]
    downs = [key for key, tensor in state.items() if ".lora_A." in key and tensor.ndim == 2]
    assert {key.rpartition("_")[2] for key in downs} == {"pix.weight", "sem.weight"}
    for key in downs:
        layer, _, name = key.removesuffix(".weight").partition(".lora_A.")
        which = name.rpartition("_")[2]
        module = pipeline.unet.get_submodule(layer)
        (loaded,) = (adapter for adapter in module.lora_A if adapter.endswith(which))
        expected = 8 / ranks[which] * state[key.replace(".lora_A.", ".lora_B.")] @ state[key]
        assert relative_error(module.get_delta_weight(loaded), expected) < 1e-5


@pytest.mark.parametrize("kind", [PiSASRPipeline, HYPIRPipeline])
def test_the_empty_prompt_is_no_zeros(kind, tmp_path):
    """It is what the text encoder makes of an empty string, 77 tokens of beginning, end and padding."""
    pipeline = kind(**pipeline_toys.components(2, tmp_path / "tokenizer"))
    start, end, pad = 512, 513, pipeline.tokenizer.pad_token_id
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.tensor([[start, end, *[pad] * 75]]))[0]
        embeds, negative = pipeline._prompts("", "", None, None, 1.0, 1)
    assert relative_error(embeds, expected) < 1e-6 and embeds.abs().mean() > 0.1 and negative is None


@pytest.mark.parametrize("case", ["hypir_square", pytest.param("hypir_tall", marks=pytest.mark.slow)])
def test_hypir(case, tmp_path, monkeypatch):
    pipeline, arrays, image, embeds, noise = start(case, HYPIRPipeline, tmp_path, "pth")
    monkeypatch.setattr("pipelines.base.draw_noise", lambda shape, seed: noise)
    latent = pipeline.encode(image, posterior="sample")
    assert relative_error(latent, arrays["latent"]) < TOLERANCE
    assert relative_error(pipeline.predict_noise(latent, 200, embeds), arrays["noise_pred"]) < TOLERANCE
    for model_t, coeff_t in golden(case)[0]["model_t_coeff_t"]:
        assert model_t == hypir.TIMESTEP
        x0 = pipeline.one_step(latent, embeds, coeff_t)
        assert relative_error(x0, arrays[f"x0_{model_t}_{coeff_t}"]) < TOLERANCE
        assert relative_error(pipeline.decode(x0) * 2 - 1, arrays[f"image_{model_t}_{coeff_t}"]) < TOLERANCE  # not clamped
        whole = pipeline(image, prompt_embeds=embeds, scale=1, posterior="sample", coeff_t=coeff_t, output_type="pt").images
        assert relative_error(whole, arrays[f"picture_{model_t}_{coeff_t}"]) < TOLERANCE
        clamped = fix_color((arrays[f"image_{model_t}_{coeff_t}"] / 2 + 0.5).clamp(0, 1), image, "wavelet")
        assert relative_error(clamped, arrays[f"picture_{model_t}_{coeff_t}"]) > 1e-3  # clamped before the colour fix
    pipeline.fuse()
    assert relative_error(pipeline.one_step(latent, embeds), arrays["x0_200_200"]) < TOLERANCE


@pytest.mark.parametrize("scale", [4, 0.5])
def test_hypirs_enlargement(scale):
    """As the published program's: cubic convolution with a = -0.75 at the pixels' centres, no antialiasing."""

    def kernel(x, a=-0.75):
        x = x.abs()
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))

    point = torch.zeros(1, 3, 10, 10)
    point[..., 4, 5] = 1
    _, enlarged = HYPIRPipeline(**pipeline_toys.components(2)).preprocess(point, scale)
    centres = (torch.arange(round(10 * scale)) + 0.5) / scale - 0.5
    expected = kernel(centres - 4)[:, None] * kernel(centres - 5)[None]
    assert (enlarged - expected).abs().max() < 1e-6


def test_hypir_wrong_turns(tmp_path):
    pipeline, arrays, _, embeds, _ = start("hypir_square", HYPIRPipeline, tmp_path, "pth")
    assert relative_error(pipeline.predict_noise(arrays["latent"], 199, embeds), arrays["noise_pred"]) > 0.01
    pipeline.load_hypir(tmp_path / "adapter.pth", 2.0)  # 8 / rank at rank 4
    assert relative_error(pipeline.predict_noise(arrays["latent"], 200, embeds), arrays["noise_pred"]) > 0.05
    for value in (1000, -1, 12.5, float("nan"), True, "200", None):
        with pytest.raises(ValueError, match=f"coeff_t: found {value!r}, expected a whole number from 0 to 999"):
            pipeline.one_step(arrays["latent"], embeds, value)


@pytest.mark.slow
def test_numbers_that_are_none_are_named(tmp_path):
    """Before anything is computed, and never as an overflow of half precision."""
    pipeline, arrays, image, embeds, _ = start("pisasr_square", PiSASRPipeline, tmp_path, "pkl")
    for value in (float("nan"), float("inf"), "1", None, True):
        for name in ("pixel", "semantic"):
            with pytest.raises(ValueError, match=f"{name}: found {value!r}, expected a finite number"):
                pipeline.one_step(arrays["latent"], embeds, **{name: value})
    osediff = OSEDiffPipeline(**pipeline_toys.components(0))
    osediff.load_osediff(toys.GOLDEN / "osediff_square.pkl")
    for value in (float("nan"), "2", None):
        with pytest.raises(ValueError, match=f"guidance_scale: found {value!r}, expected a finite number"):
            osediff(image, prompt_embeds=embeds, negative_prompt_embeds=embeds, guidance_scale=value)
    assert torch.isfinite(pipeline.one_step(arrays["latent"], embeds, 1, numpy.float32(0.5))).all()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), [("pisasr_tall", PiSASRPipeline), ("hypir_tall", HYPIRPipeline)])
def test_saved_and_loaded(case, kind, tmp_path):
    pipeline, arrays, _, embeds, _ = start(case, kind, tmp_path, "pth")
    expected = pipeline.one_step(arrays["latent"], embeds)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline.one_step(arrays["latent"], embeds), expected)
    again = kind.from_pretrained(tmp_path / "saved")
    assert relative_error(again.one_step(arrays["latent"], embeds), expected) < 1e-5  # the sets may be added in another order
    with pytest.raises(ValueError, match="found an OSEDiff adapter; expected"):
        again.load_weights(toys.GOLDEN / "osediff_square.pkl")


def test_what_only_a_person_can_download_is_not_fetched(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PiSA-SR's adapter .* It is linked from https://github.com/csslc/PiSA-SR"):
        find_weights(PISASR, None, None, download=True)
