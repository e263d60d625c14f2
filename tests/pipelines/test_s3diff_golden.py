"""S3Diff, headless, against the authors' own code stage by stage, and each wrong turn that its formulas invite."""

import dataclasses
from functools import cache
from pathlib import Path

import pipeline_toys
import pytest
import torch
import torch.nn.functional as F
from toys import GOLDEN, gaussian, golden, picture, relative_error

from fewstep_sr.diffusion import alpha_bar_at
from fewstep_sr.image.color import wavelet
from fewstep_sr.methods import OSEDIFF, S3DIFF, load_weights, s3diff
from fewstep_sr.weights.lora import LowRank
from pipelines import S3DiffPipeline

TOLERANCE = 1e-4
CASES = ["s3diff_square", "s3diff_tall"]


def files(case: str) -> tuple[Path, Path]:
    return GOLDEN / f"{case}.pkl", GOLDEN / f"{case}_de_net.pth"


@cache
def load(name: str):
    """Settings, arrays, a pipeline, the low-quality image and the text embeddings of a golden case."""
    settings, arrays = golden(name)
    seed = settings["seed"]
    pipeline = S3DiffPipeline(**pipeline_toys.components(seed))
    pipeline.load_s3diff(*files(name))
    pipeline.set_progress_bar_config(disable=True)
    low = picture(seed, *settings["low_size"]).movedim(-1, 1)
    texts = [gaussian(seed, name, (1, 77, 64)) for name in ("prompt_embeds", "negative_prompt_embeds")]
    return settings, arrays, pipeline, low, texts


@pytest.fixture(params=CASES)
def case(request):
    return load(request.param)


@pytest.fixture
def square():
    return load("s3diff_square")


@pytest.fixture
def drawn(case, monkeypatch):
    """The case's posterior draw in place of a generator's."""
    settings, arrays, *_ = case
    noise = gaussian(settings["seed"], "vae_posterior", arrays["latent"].shape)
    monkeypatch.setattr("pipelines.base.draw_noise", lambda shape, seed: noise)


def test_stages(case, drawn):
    settings, arrays, pipeline, low, (positive, negative) = case
    assert relative_error(pipeline.degradation(low), arrays["d"]) < TOLERANCE
    pipeline.adapt(arrays["d"])
    _, enlarged = pipeline.preprocess(low)
    for image in (enlarged, arrays["picture"] / 2 + 0.5):  # padded by the pipeline, and already
        assert relative_error(pipeline.encode(image) / 0.18215, arrays["posterior_mean"]) < TOLERANCE
    latent = pipeline.encode(enlarged, posterior="sample")
    assert relative_error(latent, arrays["latent"]) < TOLERANCE
    for name, text in (("positive", positive), ("negative", negative)):
        assert relative_error(pipeline.predict_noise(latent, s3diff.TIMESTEP, text), arrays[f"noise_pred_{name}"]) < TOLERANCE
    guided = pipeline.predict_noise(latent, s3diff.TIMESTEP, positive, negative, settings["cfg"])
    assert relative_error(guided, arrays["noise_pred"]) < TOLERANCE
    x0 = pipeline.one_step(latent, positive, negative)
    assert relative_error(x0, arrays["x0"]) < TOLERANCE
    assert relative_error(pipeline.one_step(latent, positive, negative, 1.0), arrays["x0_cfg1"]) < TOLERANCE
    assert relative_error(pipeline.decode(x0) * 2 - 1, arrays["image"]) < TOLERANCE
    assert relative_error(pipeline.decode(arrays["x0_cfg1"]) * 2 - 1, arrays["image_cfg1"]) < TOLERANCE


def test_from_the_image_to_the_published_programs_png(case, drawn):
    settings, arrays, pipeline, low, (positive, negative) = case
    call = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "posterior": "sample", "output_type": "pt"}
    plain = pipeline(low, color_fix=None, **call).images
    height, width = settings["size"]
    assert relative_error(plain * 2 - 1, arrays["image"][..., :height, :width]) < TOLERANCE
    # The published program cuts to 8 bits before its colour fix and after it.
    enlarged = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=False)
    content, reference = ((image * 255).floor() / 255 for image in (plain, enlarged))
    fixed = (wavelet(content, reference).clamp(0, 1) * 255).floor()[0].movedim(0, -1)
    difference = (fixed - arrays["output"].float()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    whole = pipeline(low, **call).images[0].movedim(0, -1) * 255
    assert (whole - arrays["output"].float()).abs().max() < 3


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_equations(case, part):
    settings, arrays, pipeline, *_ = case
    adapter = pipeline._adapter
    p = s3diff.fourier_embedding(arrays["d"], adapter.frequencies)
    assert relative_error(p, arrays["p"]) < TOLERANCE
    assert relative_error(s3diff.modulation_matrices(p, adapter.modulation[part]), arrays[f"M_{part}"]) < TOLERANCE
    layers = adapter.unet if part == "unet" else adapter.vae
    assert {layer: s3diff.block_of(part, layer) for layer in layers} == settings["blocks"][part]
    assert {low_rank.scale for low_rank in layers.values()} == {settings[f"scale_{part}"]}
    for name, layer in settings["weights"].items():
        if layer.startswith(f"{part}."):
            layer = layer.removeprefix(f"{part}.")
            network = pipeline.unet if part == "unet" else pipeline.vae
            base = network.get_submodule(layer).base_layer.weight
            effective = base + update(adapter.modulated(part, arrays["d"][0])[layer])
            assert relative_error(effective, arrays[f"weight_{name}"]) < TOLERANCE
            low_rank, matrix = layers[layer], arrays[f"M_{part}"][s3diff.block_of(part, layer)]
            wrong = {
                "M instead of its transpose": s3diff.fold(low_rank, matrix.T),
                "a neighbouring block": s3diff.fold(low_rank, arrays[f"M_{part}"][s3diff.block_of(part, layer) - 1]),
                "no modulation": low_rank,
                "alpha is the rank": dataclasses.replace(s3diff.fold(low_rank, matrix), alpha=low_rank.rank),
            }
            if low_rank.rank == low_rank.alpha:
                del wrong["alpha is the rank"]
            for turn, other in wrong.items():
                assert relative_error(base + update(other), arrays[f"weight_{name}"]) > 10 * TOLERANCE, turn


def update(low_rank: LowRank) -> torch.Tensor:
    return low_rank.scale * (low_rank.up.flatten(1) @ low_rank.down.flatten(1)).view(low_rank.weight_shape)


def wrong_adapter(adapter: s3diff.S3DiffAdapter, turn: str) -> s3diff.S3DiffAdapter:
    """The adapter as a wrong implementation would have it."""
    if turn == "no conv_in":
        return dataclasses.replace(adapter, unet_replaced={})
    if turn == "alpha is the rank":
        layers = {part: {k: dataclasses.replace(v, alpha=v.rank) for k, v in getattr(adapter, part).items()} for part in ("unet", "vae")}
        return dataclasses.replace(adapter, **layers)
    transposed = {
        part: {
            **weights,
            "fuse_mlp.weight": transpose(weights["fuse_mlp.weight"]),
            "fuse_mlp.bias": transpose(weights["fuse_mlp.bias"][:, None])[:, 0],
        }
        for part, weights in adapter.modulation.items()
    }
    return dataclasses.replace(adapter, modulation=transposed)


def transpose(rows: torch.Tensor) -> torch.Tensor:
    """Rows of an r x r matrix as those of its transpose."""
    rank = round(len(rows) ** 0.5)
    return rows.view(rank, rank, -1).transpose(0, 1).reshape(len(rows), -1)


@pytest.mark.parametrize("turn", ["no conv_in", "alpha is the rank", "transposed"])
def test_wrong_adapters(turn, monkeypatch):
    """Each changes what the networks give by far more than the tolerance: the stages' test fails on it."""
    settings, arrays = golden("s3diff_square")
    parse = S3DIFF.parse
    monkeypatch.setattr("pipelines.adapted.load_weights", lambda method, path: wrong_adapter(load_weights(S3DIFF, path), turn))
    pipeline = S3DiffPipeline(**pipeline_toys.components(settings["seed"]))
    pipeline.load_s3diff(files("s3diff_square")[0])
    assert S3DIFF.parse is parse
    pipeline.adapt(arrays["d"])
    text = gaussian(settings["seed"], "prompt_embeds", (1, 77, 64))
    assert relative_error(pipeline.predict_noise(arrays["latent"], 999, text), arrays["noise_pred_positive"]) > 0.1
    if turn != "no conv_in":
        assert relative_error(pipeline.encode(arrays["picture"] / 2 + 0.5) / 0.18215, arrays["posterior_mean"]) > 0.1


def test_wrong_turns(square, monkeypatch):
    _, arrays, pipeline, low, (positive, _) = square
    latent, expected = arrays["latent"], arrays["noise_pred_positive"]
    _, enlarged = pipeline.preprocess(low)
    of_the_upscaled = pipeline.degradation(enlarged)
    assert relative_error(of_the_upscaled, arrays["d"]) > 100 * TOLERANCE
    for scores in (arrays["d"].flip(1), of_the_upscaled):
        pipeline.adapt(scores)
        assert relative_error(pipeline.predict_noise(latent, 999, positive), expected) > 0.1
    pipeline.adapt(arrays["d"])
    assert relative_error(pipeline.predict_noise(latent, 998, positive), expected) > 10 * TOLERANCE
    block_of = s3diff.block_of
    monkeypatch.setattr(s3diff, "block_of", lambda part, layer: (block_of(part, layer) + 1) % s3diff.BLOCKS[part])
    assert relative_error(pipeline.predict_noise(latent, 999, positive), expected) > 0.1
    assert relative_error(pipeline.encode(enlarged) / 0.18215, arrays["posterior_mean"]) > 0.1


def test_formula_and_settings(case):
    settings, arrays, *_ = case
    x0 = s3diff.one_step(arrays["latent"], arrays["noise_pred"], alpha_bar_at(999, arrays["latent"]))
    assert relative_error(x0, arrays["x0"]) < TOLERANCE
    assert relative_error(x0.clamp(-1, 1), arrays["x0"]) > 0.5  # a scheduler that clips
    assert relative_error(x0, arrays["x0_cfg1"]) > 100 * TOLERANCE  # no guidance
    assert (S3DIFF.cfg, s3diff.TIMESTEP) == (settings["cfg"], settings["timestep"]) == (1.07, 999)
    assert (S3DIFF.prompt, S3DIFF.negative_prompt) == (settings["positive_prompt"], settings["negative_prompt"])


def test_the_estimator_computes_in_float32(square, monkeypatch):
    _, arrays, pipeline, low, _ = square
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(pipeline.degradation(low), arrays["d"]) < TOLERANCE
    half = pipeline._adapter.estimator.network().bfloat16()
    assert relative_error(half(low.bfloat16()).float(), arrays["d"]) > 10 * TOLERANCE


def test_the_estimator_in_strips(square, monkeypatch):
    pipeline = square[2]
    image = torch.rand(1, 3, 131, 9, generator=torch.Generator().manual_seed(1))
    whole = pipeline.degradation(image)
    monkeypatch.setattr("fewstep_sr.networks.degradation.STRIP", 1)
    rows = []
    seen = pipeline._estimator.conv_first[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[-2]))
    assert relative_error(pipeline.degradation(image), whole) < 1e-6 and rows == [72, 96, 59]
    seen.remove()


def test_ranks_and_seeds_by_another_way():
    """The layer as published, base(x) + s B(A(x) M), on random halves of other ranks: linear, and a convolution with a stride."""
    generator = torch.Generator().manual_seed(3)
    for rank in (1, 3, 16):
        down, up, weight = (torch.randn(*shape, generator=generator) for shape in ((rank, 5), (7, rank), (7, 5)))
        matrix, x = torch.randn(rank, rank, generator=generator), torch.randn(4, 5, generator=generator)
        published = x @ weight.T + 8 / rank * (x @ down.T @ matrix) @ up.T
        assert relative_error(x @ (weight + update(s3diff.fold(LowRank(down, up), matrix))).T, published) < 1e-5
        down, up = torch.randn(rank, 5, 3, 3, generator=generator), torch.randn(7, rank, 1, 1, generator=generator)
        weight, x = torch.randn(7, 5, 3, 3, generator=generator), torch.randn(2, 5, 9, 9, generator=generator)
        inner = torch.einsum("bkhw,kr->brhw", F.conv2d(x, down, stride=2, padding=1), matrix)
        published = F.conv2d(x, weight, stride=2, padding=1) + 8 / rank * F.conv2d(inner, up)
        assert relative_error(F.conv2d(x, weight + update(s3diff.fold(LowRank(down, up), matrix)), stride=2, padding=1), published) < 1e-5


@pytest.mark.parametrize(("part", "layer"), [("unet", "conv_in"), ("unet", "encoder.conv_in"), ("vae", "quant_conv"), ("unet", "up_blocks.4.x")])
def test_layers_in_no_block(part, layer):
    with pytest.raises(ValueError, match="in none of the"):
        s3diff.block_of(part, layer)


def test_a_batch_is_its_images(square):
    """Each image has the adapter of its own scores; images with the same scores may stand beside each other."""
    _, _, pipeline, low, (positive, negative) = square
    other = low.flip(-1) * 0.5
    images = torch.cat([low, other, other])
    scores = pipeline.degradation(images)
    _, enlarged = pipeline.preprocess(images)
    pipeline.adapt(scores)
    latents = pipeline.encode(enlarged, posterior="sample")
    restored = pipeline.one_step(latents, positive, torch.cat([negative, positive, positive]))
    for i, text in enumerate((negative, positive)):
        pipeline.adapt(scores[i : i + 1])
        assert relative_error(pipeline.encode(enlarged[i : i + 1], posterior="sample"), latents[i : i + 1]) < TOLERANCE
        assert relative_error(pipeline.one_step(latents[i : i + 1], positive, text), restored[i : i + 1]) < TOLERANCE
    assert relative_error(restored[2], restored[1]) < TOLERANCE
    pipeline.adapt(scores[:1].expand(3, -1))  # the first one's for all is another result
    assert relative_error(pipeline.encode(enlarged, posterior="sample")[1], latents[1]) > 0.01


def test_scores_that_do_not_fit(square):
    _, arrays, pipeline, low, (positive, negative) = square
    pipeline.adapt(arrays["d"])
    with pytest.raises(ValueError, match=r"scores: found those of 1 images, expected 2.*Repeat a row"):
        pipeline.encode(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="scores: found those of 1 images, expected 3"):
        pipeline.one_step(torch.rand(3, 4, 8, 8), positive, negative)
    for scores, words in (
        (torch.tensor([[0.1, 1.2]]), "from 0.1 to 1.2"),
        (torch.tensor([[float("nan"), 0]]), "expected 0"),
        (torch.rand(2), r"\(batch, 2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.adapt(scores)
    with pytest.raises(ValueError, match="negative_prompt_embeds: found none with a guidance_scale of 1.07"):
        pipeline.one_step(arrays["latent"], positive, None)
    with pytest.raises(ValueError, match="differs for each image"):
        pipeline.fuse()
    with pytest.raises(ValueError, match=r"scores: found values from 0 to 2, expected 0 \(none\) to 1"):
        pipeline(low, blur=0.0, noise=2.0, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_overruled_scores(square, monkeypatch):
    _, arrays, pipeline, low, texts = square
    call = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "output_type": "pt"}
    seen = []
    monkeypatch.setattr(pipeline, "one_step", lambda latents, *_: seen.append(pipeline._scores) or latents)
    blur, noise = arrays["d"][0].tolist()
    pipeline(low, **call)
    assert relative_error(seen.pop(), arrays["d"]) < TOLERANCE
    assert pipeline.notes() == (f"blur {blur:.2f}, noise {noise:.2f} (--blur and --noise overrule them)",)
    pipeline(low, blur=0.25, **call)
    assert relative_error(seen.pop(), torch.tensor([[0.25, noise]])) < TOLERANCE
    monkeypatch.setattr(pipeline, "_estimator", None)
    pipeline(torch.cat([low, low]), blur=0.25, noise=1.0, **call)
    assert seen.pop().tolist() == [[0.25, 1.0]] * 2
    with pytest.raises(ValueError, match=r"degradation: no estimator is loaded. Give load_s3diff the file de_net.pth"):
        pipeline(low, blur=0.5, **call)


def test_what_is_not_loaded():
    bare = S3DiffPipeline(**pipeline_toys.components(0))
    assert bare.notes() == ()
    for call in (lambda: bare.adapt(torch.zeros(1, 2)), lambda: bare.encode(torch.rand(1, 3, 64, 64)), lambda: bare(torch.rand(1, 3, 16, 16))):
        with pytest.raises(ValueError, match=r"no adapter is loaded.*Call load_s3diff first"):
            call()
    bare.load_s3diff(files("s3diff_square")[0])
    with pytest.raises(ValueError, match="scores: found none"):
        bare.encode(torch.rand(1, 3, 64, 64))


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    """The base's weights, which no image may change."""
    parts = {"unet": pipeline.unet, "vae": pipeline.vae}
    return {f"{part}.{k}": v.clone() for part, network in parts.items() for k, v in network.state_dict().items() if "lora_" not in k}


def test_the_base_stays_as_it_is(monkeypatch):
    settings, arrays = golden("s3diff_square")
    pipeline = S3DiffPipeline(**pipeline_toys.components(settings["seed"]))
    bare = weights_of(pipeline)
    pipeline.load_s3diff(*files("s3diff_square"))
    loaded = weights_of(pipeline)
    pipeline.adapt(arrays["d"])
    text = gaussian(settings["seed"], "prompt_embeds", (1, 77, 64))
    expected = pipeline.predict_noise(arrays["latent"], 999, text)
    pipeline.adapt(torch.tensor([[0.9, 0.1]]))
    pipeline.predict_noise(arrays["latent"], 999, text)
    pipeline.adapt(arrays["d"])  # from the unmodulated adapter, not from the last image's
    assert torch.equal(pipeline.predict_noise(arrays["latent"], 999, text), expected)

    fail = pipeline.unet.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory, say")))
    for call in (lambda: pipeline.one_step(arrays["latent"], text, text), lambda: pipeline.load_s3diff(GOLDEN / "osediff_square.pkl")):
        with pytest.raises((RuntimeError, ValueError)):
            call()
    with pytest.raises(ValueError, match="found an S3Diff adapter; expected S3Diff's degradation estimator"):
        pipeline.load_s3diff(files("s3diff_tall")[0], files("s3diff_tall")[0])
    fail.remove()
    assert all(torch.equal(value, loaded[key]) for key, value in weights_of(pipeline).items())
    assert torch.equal(pipeline.predict_noise(arrays["latent"], 999, text), expected)
    pipeline.unload_s3diff()
    unloaded = weights_of(pipeline)
    assert unloaded.keys() == bare.keys() and all(torch.equal(value, bare[key]) for key, value in unloaded.items())


@pytest.mark.slow
def test_another_base_is_refused_before_anything_is_changed(monkeypatch):
    settings, arrays = golden("s3diff_square")
    pipeline = S3DiffPipeline(**pipeline_toys.components(settings["seed"]))
    pipeline.load_s3diff(*files("s3diff_square"))
    adapter = load_weights(S3DIFF, files("s3diff_tall")[0])
    narrow = dataclasses.replace(adapter, unet_replaced={"conv_in.weight": torch.zeros(16, 4, 3, 3), "conv_in.bias": torch.zeros(16)})
    monkeypatch.setattr("pipelines.adapted.load_weights", lambda method, path: narrow)
    with pytest.raises(ValueError, match=r"unet: layer conv_in.weight has shape \(32, 4, 3, 3\), but the adapter's is \(16, 4, 3, 3\).*SD-Turbo"):
        pipeline.load_s3diff("another.pkl")
    pipeline.adapt(arrays["d"])
    assert relative_error(pipeline.encode(arrays["picture"] / 2 + 0.5) / 0.18215, arrays["posterior_mean"]) < TOLERANCE


@pytest.mark.slow
def test_saved_and_loaded(square, tmp_path):
    _, arrays, pipeline, low, (positive, negative) = square
    pipeline.adapt(arrays["d"])
    expected = pipeline.one_step(arrays["latent"], positive, negative)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline.one_step(arrays["latent"], positive, negative), expected)
    again = S3DiffPipeline.from_pretrained(tmp_path / "saved")
    assert relative_error(again.degradation(low), arrays["d"]) < TOLERANCE
    again.adapt(again.degradation(low))
    assert relative_error(again.one_step(arrays["latent"], positive, negative), expected) < 1e-5
    with pytest.raises(ValueError, match=f"found {S3DIFF.kind.phrase}; expected {OSEDIFF.kind.phrase}"):
        load_weights(OSEDIFF, tmp_path / "saved" / "s3diff.safetensors")
