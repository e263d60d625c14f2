"""PiSA-SR's two stages on tiny real networks: what learns and what stays to the last bit, the published settings, the files, and going on."""

import argparse
import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import relative_error

from fewstep_sr.diffusion import add_noise, alpha_bar_at, predict_x0
from fewstep_sr.methods import PISASR, load_weights
from fewstep_sr.methods.osediff import NEGATIVE_PROMPT, unet_group
from fewstep_sr.weights.lora import PEFT_ALPHA
from pipelines import PiSASRPipeline
from pipelines.cli import main
from pipelines.training import distillation
from pipelines.training.bases import Base, Prompts, load_base
from pipelines.training.common import enlarge
from pipelines.training.data import TrainingPictures
from pipelines.training.degradation import Degradation
from pipelines.training.loop import train
from pipelines.training.methods import add_methods
from pipelines.training.options import LoopOptions, PiSASROptions
from pipelines.training.pisasr import ADAPTER_FILE, PUBLISHED_FILE, PiSASRTask, read_pixel_set
from pipelines.training.settings import PiSASRSettings
from tools.miniature.autoencoder import small_vae
from tools.miniature.base_unet import small_unet, stable_diffusion_scheduler

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base without text encoder, in diffusers' layout, and three pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pisasr")
    for name, network in (("unet", small_unet((32, 64), WIDTH)), ("vae", small_vae((8, 8, 16, 16)))):
        for parameter in network.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)  # no layer is zero, as some are at the start
        network.save_pretrained(folder / "base" / name)
    stable_diffusion_scheduler().save_pretrained(folder / "base" / "scheduler")
    names = ("prompt_embeds", "negative_prompt_embeds", "empty_prompt_embeds")
    save_file({name: torch.randn(1, 8, WIDTH) for name in names}, folder / "base" / "prompt_embeds.safetensors")
    (folder / "photos").mkdir()
    for i in range(3):
        picture = enlarge(torch.rand(1, 3, 9, 9), (80, 80)).clamp(0, 1)[0]
        Image.fromarray((picture * 255).byte().movedim(0, -1).numpy()).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def base(folder) -> Base:
    return load_base(str(folder / "base"))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    hq = enlarge(torch.rand(2, 3, 8, 8), (64, 64)).clamp(0, 1)
    return {"hq": hq, "lq": enlarge(hq, (16, 16)).clamp(0, 1)}


@pytest.fixture(scope="module")
def pixel_run(folder):
    """The output folder of a first stage whose weights have moved."""
    task = make(load_base(str(folder / "base")), rank_pixel=3)
    learn(task, a_batch(), 3)
    output = folder / "pixel"
    output.mkdir()
    task.save(output)
    return output


def a_batch() -> dict[str, torch.Tensor]:
    hq = enlarge(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), (64, 64)).clamp(0, 1)
    return {"hq": hq, "lq": enlarge(hq, (16, 16)).clamp(0, 1)}


class Distance(torch.nn.Module):
    """In LPIPS's place, whose weights are not at hand."""

    def forward(self, a, b):
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def make(base: Base, pixel=None, lpips=None, **options) -> PiSASRTask:
    torch.manual_seed(2)
    stage = "semantic" if pixel else "pixel"
    return PiSASRTask(base, Prompts(base), PiSASROptions(stage=stage, **options), read_pixel_set(pixel) if pixel else None, lpips)


def learn(task: PiSASRTask, batch, steps: int, lr: float = 1e-2) -> None:
    parameters = [parameter for parameter in task.generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    for seed in range(steps):
        optimizer.zero_grad()
        task.loss("generator", batch, torch.Generator().manual_seed(seed))[0].backward()
        optimizer.step()


def pictures(folder) -> TrainingPictures:
    return TrainingPictures(sorted((folder / "photos").iterdir()), 64, 0, seed=3, degradation=Degradation())


def test_published_settings():
    """PiSA-SR's scripts/train/train_pisasr.sh and the defaults of src/my_utils/training_utils.py (csslc/PiSA-SR, 9c76e12)."""
    published = {"learning_rate": 5e-5, "train_batch_size": 4, "cfg_csd": 7.5, "lambda_lpips": 2.0, "lambda_l2": 1.0, "lambda_csd": 1.0}
    published |= {"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4, "null_text_ratio": 0.5, "adam_weight_decay": 1e-2, "max_grad_norm": 1.0}
    parser = argparse.ArgumentParser()
    add_methods(parser.add_subparsers(), argparse.ArgumentParser(add_help=False))
    given = ["pisasr", "--data", "photos", "-o", "run", "--steps", "4000"]
    settings = PiSASRSettings.from_arguments(parser.parse_args(given))
    options, loop = settings.options, settings.data.loop
    found = {"learning_rate": loop.lr, "train_batch_size": loop.batch, "cfg_csd": options.guidance, "lambda_lpips": options.lpips}
    found |= {"lambda_l2": options.mse, "lambda_csd": options.csd, "lora_rank_unet_pix": options.rank_pixel, "null_text_ratio": options.null_prompt}
    found |= {"lora_rank_unet_sem": options.rank_semantic, "adam_weight_decay": loop.weight_decay, "max_grad_norm": loop.max_grad_norm}
    assert found == published
    assert (options.stage, loop.optimizer, loop.betas, loop.warmup, loop.cosine, loop.ema) == ("pixel", "adamw", (0.9, 0.999), 0, False, 0.0)
    assert (int(1000 * 0.02), int(1000 * 0.5)) == distillation.CLASSIFIER_TIMESTEPS
    assert NEGATIVE_PROMPT.startswith("painting, oil painting, illustration, drawing, art, sketch,") and settings.negative_prompt is None


def test_pixel_stage_learns_the_pixel_set_by_squared_distance_alone(base, batch):
    task = make(base, lpips=Distance())
    before = copy.deepcopy(base.unet.state_dict()), copy.deepcopy(base.vae.state_dict())
    loss, figures = task.loss("generator", batch, torch.Generator().manual_seed(0))
    assert set(figures) == {"mse"} and loss.item() == figures["mse"].item() and not task.measures and not hasattr(task, "judge")
    learn(task, batch, 2)
    changed = {name for name, tensor in base.unet.state_dict().items() if not torch.equal(tensor, before[0][name])}
    assert changed == {name for name in base.unet.state_dict() if ".lora_" in name}
    assert all("_pix.weight" in name for name in changed) and any(name.startswith("conv_in.") for name in changed)
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in base.vae.state_dict().items())
    groups = {name.rpartition(".lora_A.")[2] for name in changed if ".lora_A." in name}
    assert groups == {f"default_{group}_pix.weight" for group in ("encoder", "decoder", "others")}


def test_semantic_stage_leaves_the_pixel_set_to_the_last_bit(base, batch, pixel_run, tmp_path):
    task = make(base, pixel_run, Distance(), rank_semantic=2)
    _, figures = task.loss("generator", batch, torch.Generator().manual_seed(0))
    assert set(figures) == {"mse", "lpips", "csd"} and task.measures == [task.lpips]
    judge = copy.deepcopy(task.judge.state_dict())
    learn(task, batch, 3)
    task.save(tmp_path)
    pixel, both = load_file(pixel_run / ADAPTER_FILE), load_file(tmp_path / ADAPTER_FILE)
    pix = {name for name in both if "_pix.weight" in name}
    assert pix and pix == {name for name in pixel if "_pix.weight" in name} and all(torch.equal(both[name], pixel[name]) for name in pix)
    sem = {name for name in both if "_sem.weight" in name and ".lora_B." in name}
    assert sem and all(both[name].any() for name in sem) and len(sem) == len(pix) / 2
    assert all(torch.equal(tensor, judge[name]) for name, tensor in task.judge.state_dict().items())
    adapter = load_weights(PISASR, tmp_path / ADAPTER_FILE)
    assert (adapter.rank_unet, next(iter(adapter.semantic.values())).rank) == (3, 2)


def test_both_sets_act_in_the_semantic_stage(base, batch, pixel_run):
    """Before it has learned anything the second stage restores as the first one did at its end."""
    first = make(base, rank_pixel=3)
    first.generator.unet.load_state_dict(
        {name.removeprefix("unet."): tensor for name, tensor in load_file(pixel_run / ADAPTER_FILE).items() if "_pix." in name}, strict=False
    )
    second = make(load_base(str(pixel_run.parent / "base")), pixel_run)
    embeds = Prompts(base)(batch["hq"])
    with torch.no_grad():
        expected, found = (task.generator(enlarge(batch["lq"], (64, 64)), embeds)[0] for task in (first, second))
    assert relative_error(found, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pixel", "semantic"])
def test_loss_falls(base, batch, pixel_run, stage):
    task = make(base, pixel_run if stage == "semantic" else None, csd=0.0)
    figure = lambda: task.loss("generator", batch, torch.Generator().manual_seed(99))[0].item()  # noqa: E731
    before = figure()
    learn(task, batch, 15, lr=6e-3)
    assert figure() < 0.97 * before


@pytest.mark.slow
def test_files_restore_as_what_was_trained(folder, base, batch, pixel_run, tmp_path):
    task = make(base, pixel_run, Distance())
    learn(task, batch, 2)
    task.save(tmp_path)
    embeds = Prompts(base)(batch["hq"])
    with torch.no_grad():
        expected, restored = task.generator(enlarge(batch["lq"], (64, 64)), embeds)
    fresh = load_base(str(folder / "base"))
    scheduler = EulerDiscreteScheduler.from_config(stable_diffusion_scheduler().config)
    pipeline = PiSASRPipeline(vae=fresh.vae, text_encoder=None, tokenizer=None, unet=fresh.unet, scheduler=scheduler)
    latents = pipeline.encode(pipeline.preprocess(batch["lq"])[1])
    for file in (ADAPTER_FILE, PUBLISHED_FILE):
        pipeline.load_pisasr(tmp_path / file)
        assert relative_error(pipeline.one_step(latents, embeds), expected) < 1e-5
    images = pipeline(batch["lq"], prompt_embeds=embeds, color_fix=None, output_type="pt").images
    assert (images - (restored / 2 + 0.5)).abs().max() < 1e-4
    assert relative_error(pipeline.one_step(latents, embeds, 1, 0), expected) > 1e-4  # the semantic set has learned something


def test_published_layout(pixel_run):
    """What PiSASR.save_model of the authors writes, and their program loads: names of the layers by place and set, ranks, tensors."""
    state = torch.load(pixel_run / PUBLISHED_FILE, weights_only=True)
    places = [f"unet_lora_{place}_modules_{which}" for which in ("pix", "sem") for place in ("encoder", "decoder", "others")]
    assert set(state) == {*places, "lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet"}
    assert (state["lora_rank_unet_pix"], state["lora_rank_unet_sem"]) == (3, 3)
    for which in ("pix", "sem"):
        for place in ("encoder", "decoder", "others"):
            layers = state[f"unet_lora_{place}_modules_{which}"]
            assert layers and all(unet_group(layer) == f"default_{place}" for layer in layers)
            names = {f"{layer}.lora_{half}.default_{place}_{which}.weight" for layer in layers for half in "AB"}
            assert names <= set(state["state_dict_unet"])
    assert all(not tensor.any() for name, tensor in state["state_dict_unet"].items() if "_sem." in name and ".lora_B." in name)


def test_classifier_score_distillation_follows_the_formula():
    """The gradient, (x0 of the negative prompt - x0 with guidance) / mean distance of the latents to the latter, times 2 / their number."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2))
    positive, negative = torch.randn(1, 3, 4, generator=generator), torch.randn(1, 3, 4, generator=generator)
    timesteps, guidance = torch.tensor([20, 499]), 7.5
    calls = []

    def frozen(noisy, timesteps, embeds):
        calls.append(embeds)
        return noisy * 0.3 + embeds.mean() * torch.sin(noisy * 3)

    latents.requires_grad_()
    distillation.classifier_distillation_loss(latents, noise, timesteps, frozen, positive, negative, guidance).backward()
    alpha_bar = alpha_bar_at(timesteps, latents)
    noisy = add_noise(latents, noise, alpha_bar).detach()
    eps = {name: frozen(noisy, timesteps, embeds) for name, embeds in (("pos", positive), ("neg", negative))}
    real = predict_x0(noisy, eps["neg"] + guidance * (eps["pos"] - eps["neg"]), alpha_bar)
    fake = predict_x0(noisy, eps["neg"], alpha_bar)
    expected = (fake - real) / (latents.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True) * 2 / latents.numel()
    assert len(calls) == 4 and relative_error(latents.grad, expected) < 1e-5
    same = torch.zeros(1, 3, 4)
    latents.grad = None
    distillation.classifier_distillation_loss(latents, noise, timesteps, frozen, same, same, guidance).backward()
    assert latents.grad.abs().max() < 1e-6  # both prompts say the same, and nothing pulls


def test_share_of_batches_with_the_empty_prompt(base, batch, pixel_run):
    """The generator's alone: the distillation sees what the pictures show in each batch."""
    task = make(base, pixel_run, Distance(), null_prompt=0.5)
    judged = []
    task.judge.register_forward_pre_hook(lambda _, arguments, more: judged.append(more["encoder_hidden_states"]), with_kwargs=True)
    prompts = Prompts(base)
    full, empty, negative = prompts(batch["hq"]), prompts.empty(batch["hq"]), prompts.negative(batch["hq"])
    seen = [task._emptied(full, batch["hq"], torch.Generator().manual_seed(seed)) for seed in range(200)]
    emptied = [torch.equal(embeds, empty) for embeds in seen]
    assert 70 <= sum(emptied) <= 130 and all(torch.equal(embeds, full) for embeds, none in zip(seen, emptied, strict=True) if not none)
    used = []
    task.generator.register_forward_pre_hook(lambda _, arguments: used.append(arguments[1]))
    for seed in (emptied.index(True), emptied.index(False)):
        with torch.no_grad():
            task.loss("generator", batch, torch.Generator().manual_seed(seed))
    assert torch.equal(used[0], empty) and torch.equal(used[1], full)
    assert all(torch.equal(embeds, full) for embeds in judged[::2]) and all(torch.equal(embeds, negative) for embeds in judged[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pixel", "semantic"])
def test_resumed_run_is_the_uncut_one(folder, pixel_run, tmp_path, stage):
    """Three steps, and one with two more after a restart: the same losses to the last bit, and the same file."""

    def run(name, **more):
        task = make(load_base(str(folder / "base")), pixel_run if stage == "semantic" else None, Distance())
        return train(task, pictures(folder), LoopOptions(output=tmp_path / name, **{"steps": 3, "batch": 1, "lr": 1e-3, "log_every": 3} | more))

    uncut = run("uncut")
    assert run("cut", max_minutes=0) == []
    assert run("cut", resume=True) == uncut
    cut, whole = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("cut", "uncut"))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in whole)
    kept = load_file(tmp_path / "cut" / "checkpoint" / "model.safetensors")
    assert kept and all(
        f"_{'sem' if stage == 'semantic' else 'pix'}.weight" in name for name in kept
    )  # what learns, and not the base or the other set
    if stage == "semantic":
        other = tmp_path / "other"
        other.mkdir()
        tensors = {name: tensor + 1e-3 * ("_pix." in name) for name, tensor in load_file(pixel_run / ADAPTER_FILE).items()}
        save_file(tensors, other / ADAPTER_FILE, {"lora_alpha": "8"})
        task = make(load_base(str(folder / "base")), other, Distance())
        with pytest.raises(ValueError, match="was begun with pixel"):
            train(task, pictures(folder), LoopOptions(output=tmp_path / "cut", steps=4, batch=1, lr=1e-3, resume=True))


@pytest.mark.slow
def test_command(folder, tmp_path, capfd):
    """As a newcomer starts it: one stage, the other on top of it, and a file that ``info`` knows."""
    common = ["--base", str(folder / "base"), "--data", str(folder / "photos"), "--batch", "1", "--patch", "64", "--gradient-checkpointing"]
    assert main(["train", "pisasr", *common, "-o", str(tmp_path / "one"), "--steps", "1", "--rank-pixel", "2"]) == 0
    AcceleratorState._reset_state()
    semantic = ["train", "pisasr", "--stage", "semantic", *common, "-o", str(tmp_path / "two"), "--steps", "1"]
    assert main([*semantic, "--weights", str(tmp_path / "one"), "--mixed-precision", "bf16"]) == 0
    assert Image.open(tmp_path / "two" / "samples" / "0000001.png").size == (3 * 64, 64)
    for name in (ADAPTER_FILE, PUBLISHED_FILE):
        assert main(["info", str(tmp_path / "two" / name)]) == 0
        text = capfd.readouterr().out
        assert "a PiSA-SR adapter" in text and "rank: 2 for pixels, 4 for semantics" in text
    one, two = (load_file(tmp_path / run / ADAPTER_FILE) for run in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one if "_pix." in name)


def test_what_does_not_fit_is_said(folder, base, pixel_run, tmp_path, capfd):
    command = ["train", "pisasr", "--base", str(folder / "base"), "--data", str(folder / "photos"), "-o", str(tmp_path / "run"), "--steps", "1"]
    for more, message in (
        (["--stage", "semantic"], "--weights: found none, expected the pixel stage's run"),
        (["--weights", str(pixel_run)], "but --stage pixel begins anew"),
        (["--stage", "semantic", "--weights", str(tmp_path)], f"--weights: found no {ADAPTER_FILE} in"),
        (["--stage", "semantic", "--weights", str(tmp_path / "none.pkl")], "there is no such file"),
        (["--patch", "100"], "multiple of 64"),
    ):
        assert main([*command, *more]) == 2 and message in capfd.readouterr().err
    tensors = load_file(pixel_run / ADAPTER_FILE)
    save_file(tensors, tmp_path / "alpha.safetensors", {"lora_alpha": "16"})
    with pytest.raises(ValueError, match=f"--weights: found lora_alpha 16, expected {PEFT_ALPHA:g}"):
        make(base, tmp_path / "alpha.safetensors")
    with pytest.raises(ValueError, match="losses: found none that has a weight above 0"):
        make(load_base(str(folder / "base")), mse=0.0)
    with pytest.raises(ValueError, match="pixel: found none in the semantic stage"):
        PiSASRTask(base, Prompts(base), PiSASROptions(stage="semantic"))
