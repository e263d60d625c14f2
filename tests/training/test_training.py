"""Both trainings on tiny real networks: what learns and what does not, what is written, and that a run that is cut goes on as if it had not been."""

import copy
import math

import numpy as np
import pipeline_toys
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import EulerDiscreteScheduler
from forked import Forked
from PIL import Image
from safetensors.torch import load_file, save_file
from tagger_toys import golden_picture, golden_tags, write_ram

from fewstep_sr.networks.noise_predictor import NoisePredictorConfig
from pipelines import InvSRPipeline, OSEDiffPipeline
from pipelines.cli import main
from pipelines.tagger import PromptTagger
from pipelines.training import distillation
from pipelines.training.bases import Base, Prompts, load_base
from pipelines.training.common import enlarge
from pipelines.training.data import TrainingPictures
from pipelines.training.degradation import Degradation
from pipelines.training.invsr import PREDICTOR_FILE, InvSROptions, InvSRTask
from pipelines.training.loop import LoopOptions, train
from pipelines.training.osediff import ADAPTER_FILE, OSEDiffOptions, OSEDiffTask
from tools.miniature.autoencoder import small_vae
from tools.miniature.base_unet import small_unet, stable_diffusion_scheduler

PREDICTOR = NoisePredictorConfig(block_out_channels=(64, 64), layers_per_block=(1, 1), time_channels=64, temb_channels=64)
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base without text encoder, in diffusers' layout, and six pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("training")
    for name, network in (("unet", small_unet((32, 64), WIDTH)), ("vae", small_vae((8, 8, 16, 16)))):
        for parameter in network.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)  # no layer is zero, as some are at the start
        network.save_pretrained(folder / "base" / name)
    stable_diffusion_scheduler().save_pretrained(folder / "base" / "scheduler")
    embeds = {name: torch.randn(1, 8, WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")}
    save_file(embeds, folder / "base" / "prompt_embeds.safetensors")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        small.resize((96, 96), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Runs in one process may differ in precision, but accelerate keeps the first one's for the process."""
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


def pictures(folder) -> TrainingPictures:
    return TrainingPictures(sorted((folder / "photos").iterdir()), 64, 0, seed=3, degradation=Degradation())


def osediff(base: Base, **options) -> OSEDiffTask:
    torch.manual_seed(2)
    return OSEDiffTask(base, Prompts(base), OSEDiffOptions(**options))


def invsr(base: Base, **options) -> InvSRTask:
    torch.manual_seed(2)
    return InvSRTask(base, Prompts(base), InvSROptions(**options, discriminator_channels=(32, 64)), PREDICTOR)


def moved(task, batch, networks: dict[str, torch.nn.Module]) -> dict[str, set[str]]:
    """One step of each phase with a large learning rate. Returns the names of the parameters that changed, for each network."""
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    for phase, module in task.phases.items():
        for parameter in module.parameters():
            parameter.grad = None
        loss, _ = task.loss(phase, batch, torch.Generator().manual_seed(0))
        loss.backward()
        others = [p for other, network in task.phases.items() if other != phase for p in network.parameters()]
        assert all(p.grad is None for p in others), f"{phase} gives gradients to others"
        torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.1).step()
        for parameter in module.parameters():
            parameter.grad = None
    return {
        name: {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[name][key])}
        for name, network in networks.items()
    }


def low_rank(network) -> set[str]:
    return {name for name in network.state_dict() if ".lora_B." in name}


def test_osediff_learns_what_it_should(base, batch):
    task = osediff(base, latent=1.0, gradients=1.0)
    changed = moved(task, batch, {"unet": base.unet, "vae": base.vae, "judge": task.judge, "regulariser": task.regulariser, "target": task.target})
    # lora_B begins at zero, so that lora_A has no gradient in the first step.
    assert changed["unet"] == low_rank(base.unet) | {"conv_in.base_layer.weight", "conv_in.base_layer.bias"}
    assert changed["vae"] == low_rank(base.vae)
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in changed["vae"])
    assert changed["regulariser"] == low_rank(task.regulariser) and all("mid_block" in name for name in changed["regulariser"])
    assert not changed["judge"] and not changed["target"]


def test_invsr_learns_what_it_should(base, batch):
    task = invsr(base, adversarial=0.1, adversarial_from=0, gaussian=0.1)
    changed = moved(task, batch, {"predictor": task.predictor, "discriminator": task.discriminator, "unet": base.unet, "vae": base.vae})
    assert changed["predictor"] == set(task.predictor.state_dict())
    last_biases = {f"heads.{i}.5.bias" for i in range(3)}  # while the hinge is open everywhere, real and generated pull them equally
    assert changed["discriminator"] | last_biases == set(task.discriminator.state_dict())
    assert not changed["unet"] and not changed["vae"]


def test_timesteps_of_distillation_and_regulariser(base, batch, monkeypatch):
    """The distillation draws from 20 to 979, the regulariser learns at 0 to 999 (OSEDiff's training program)."""
    task, drawn, judged = osediff(base), [], {}

    def spy(module, name, note):
        original = getattr(module, name)

        def call(*arguments, **options):
            result = original(*arguments, **options)
            note(arguments, result)
            return result

        monkeypatch.setattr(module, name, call)

    spy(torch, "randint", lambda arguments, result: drawn.append((arguments, result)))
    spy(distillation, "distillation_loss", lambda arguments, _: judged.update(generator=arguments[2]))
    spy(distillation, "regulariser_loss", lambda arguments, _: judged.update(regulariser=arguments[2]))
    for phase, low, high in (("generator", 20, 980), ("regulariser", 0, 1000)):
        drawn.clear()
        task.loss(phase, batch, torch.Generator().manual_seed(5))
        ((arguments, timesteps),) = drawn
        assert arguments == (low, high, (2,)) and torch.equal(judged[phase], timesteps)


def test_regulariser_everywhere(base):
    task = osediff(base, regulariser_everywhere=True)
    assert any("up_blocks" in name for name, p in task.regulariser.named_parameters() if p.requires_grad)


def test_invsr_losses_follow_the_formulas(base, batch):
    """Start mode: the state is the low-quality latents plus sigma times the noise map, x0 the state less sigma times the UNet's noise (eq. 8)."""
    task = invsr(base, timesteps=(200,), perceptual=0.0)
    loss, figures = task.loss("predictor", batch, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    torch.randint(1, (2,), generator=generator)
    target_draw, clean_draw, noise_draw = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    with torch.no_grad():
        target, clean = (
            base.vae.encode(x * 2 - 1).latent_dist
            for x in (batch["hq"], torch.nn.functional.interpolate(batch["lq"], scale_factor=4, mode="bicubic"))
        )
        target, clean = (0.18215 * (p.mean + p.std * n) for p, n in ((target, target_draw), (clean, clean_draw)))
        mean, logvar = task.predictor(batch["lq"] * 2 - 1, 199)
        alpha = stable_diffusion_scheduler().alphas_cumprod[199].item()
        sigma = math.sqrt((1 - alpha) / alpha)
        state = clean + sigma * (mean + (logvar / 2).exp() * noise_draw)
        noise_pred = base.unet(state * math.sqrt(alpha), 199, Prompts(base)(batch["hq"])).sample
        x0 = state - sigma * noise_pred
    assert loss.item() == pytest.approx(((x0 - target) ** 2).mean().item(), rel=1e-4)
    assert figures.keys() == {"latent"}


def test_invsr_compares_decoded_pictures(base, batch):
    """The squared distance is of pictures in [-1, 1], what is beyond them cut off, as OSEDiff's is; without it settings are those of earlier runs."""
    task = invsr(base, latent=0.0, perceptual=0.0, mse=2.0)
    loss, figures = task.loss("predictor", batch, torch.Generator().manual_seed(5))
    with torch.no_grad():
        pictures = base.vae.decode(task._x0 / 0.18215).sample.clamp(-1, 1)
    expected = 2 * ((pictures - (batch["hq"] * 2 - 1)) ** 2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4) and figures["mse"].item() == pytest.approx(expected, rel=1e-4)
    assert task.settings()["mse"] == 2.0 and "mse" not in invsr(base).settings()


@pytest.mark.slow
def test_losses_beyond_the_papers(folder, base, batch):
    """Each comes on top of the others, and falls where it is learned with."""
    for task, extra in (
        (osediff(base, vsd=0.0, structure=2.0), "structure"),
        (invsr(load_base(str(folder / "base")), perceptual=0.0, variance=3.0), "variance"),
    ):
        phase, module = next(iter(task.phases.items()))
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 4e-3)
        figures = []
        for seed in range(30):
            optimizer.zero_grad()
            loss, parts = task.loss(phase, batch, torch.Generator().manual_seed(seed))
            assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-5) and len(parts) == 2
            loss.backward()
            optimizer.step()
            figures.append(parts[extra].item())
        assert figures[-1] < 0.9 * figures[0]


@pytest.mark.slow
def test_variance_alone(folder, base, batch, capfd):
    """The mean stays to the last bit, the variance goes where it is asked to."""
    task = invsr(base, perceptual=0.0, variance=10.0, variance_alone=True)
    optimizer = torch.optim.AdamW([p for p in task.predictor.parameters() if p.requires_grad], 3e-2, weight_decay=0.0)
    picture = batch["lq"] * 2 - 1
    with torch.no_grad():
        before = task.predictor(picture, 199)
    for seed in range(60):
        optimizer.zero_grad()
        task.loss("predictor", batch, torch.Generator().manual_seed(seed))[0].backward()
        optimizer.step()
    with torch.no_grad():
        after = task.predictor(picture, 199)
    assert torch.equal(after.mean, before.mean)
    assert after.logvar.abs().mean() < 0.7 * before.logvar.abs().mean()
    command = ["train", "invsr", "--base", str(folder / "base"), "--data", str(folder / "photos"), "-o", str(folder / "alone"), "--steps", "1"]
    assert main([*command, "--variance-alone", "--variance-weight", "0.1"]) == 2
    assert "--variance-alone: expected --init with a trained predictor" in capfd.readouterr().err


@pytest.mark.slow
def test_encoder_with_a_learning_rate_of_its_own(folder, base, tmp_path):
    task = osediff(base, vsd=0.0, vae_lr=0.0)
    train(task, pictures(folder), LoopOptions(output=tmp_path / "run", steps=2, batch=2, lr=1e-3, mixed_precision="no"))
    learned = {
        name: any(parameter.any() for key, parameter in network.named_parameters() if "lora_B" in key)
        for name, network in (("unet", task.generator.unet), ("vae", task.generator.vae))
    }
    assert learned == {"unet": True, "vae": False}
    with pytest.raises(ValueError, match="--vae-lr: found muon, expected --optimizer adamw"):
        train(
            osediff(load_base(str(folder / "base")), vsd=0.0, vae_lr=1e-4),
            pictures(folder),
            LoopOptions(output=tmp_path / "other", steps=1, optimizer="muon"),
        )


def test_invsr_middle_mode_knows_the_high_quality_picture(base, batch):
    """The states are those of the high-quality latents (eq. 10): with the true noise in place of the predicted one x0 would be as good as the base."""
    task = invsr(base, start=False, timesteps=(100,), perceptual=0.0, gaussian=0.5)
    changed = batch | {"lq": 1 - batch["lq"]}
    task.predictor.requires_grad_(False)
    for parameter in task.predictor.encoder.conv_out.parameters():
        parameter.zero_()
    same, other = (task.loss("predictor", each, torch.Generator().manual_seed(0))[0].item() for each in (batch, changed))
    assert same == other, "the low-quality picture reaches the loss by the predictor alone, which is switched off here"
    assert task.loss("predictor", batch, torch.Generator().manual_seed(0))[1]["gaussian"].item() == 0


def test_discriminator_learns_alone_at_first(base, batch):
    task = invsr(base, adversarial=0.1, adversarial_from=3)
    task.step = 2
    assert "adversarial" not in task.loss("predictor", batch, torch.Generator().manual_seed(0))[1]
    task.step = 3
    assert "adversarial" in task.loss("predictor", batch, torch.Generator().manual_seed(0))[1]


@pytest.mark.parametrize("timestep", [pytest.param(999, marks=pytest.mark.slow), 249])
def test_osediff_file_gives_the_same_latents(folder, base, batch, tmp_path, timestep):
    """What is written restores as what was trained, through the pipeline."""
    task = osediff(base, timestep=timestep)
    moved(task, batch, {})
    task.save(tmp_path)
    fresh = load_base(str(folder / "base"))
    pipeline = OSEDiffPipeline(
        vae=fresh.vae,
        text_encoder=None,
        tokenizer=None,
        unet=fresh.unet,
        scheduler=EulerDiscreteScheduler.from_config(stable_diffusion_scheduler().config),
    )
    pipeline.load_osediff(tmp_path / ADAPTER_FILE)
    embeds = Prompts(base)(batch["hq"])
    with torch.no_grad():
        expected, restored = task.generator(enlarge(batch["lq"], (64, 64)), embeds)
    _, enlarged = pipeline.preprocess(batch["lq"])
    latents = pipeline.one_step(pipeline.encode(enlarged), embeds, timestep=timestep)
    assert (latents - expected).norm() / expected.norm() < 1e-5
    images = pipeline(batch["lq"], prompt_embeds=embeds, color_fix=None, output_type="pt").images  # the file says at which timestep
    assert (images - (restored / 2 + 0.5)).abs().max() < 1e-4


def test_invsr_file_gives_the_same_latents(base, batch, tmp_path):
    task = invsr(base)
    moved(task, batch, {})
    task.save(tmp_path)
    pipeline = InvSRPipeline(vae=base.vae, text_encoder=None, tokenizer=None, unet=base.unet, scheduler=stable_diffusion_scheduler())
    pipeline.load_noise_predictor(tmp_path / PREDICTOR_FILE)
    pipeline.set_progress_bar_config(disable=True)
    embeds = Prompts(base)(batch["hq"])
    with torch.no_grad():
        clean = task.encode_lq(enlarge(batch["lq"], (64, 64))).mean
        noise = task.predictor(batch["lq"] * 2 - 1, 199).mean
        expected = task.restore(clean, noise, torch.tensor([199, 199]), embeds)
    _, enlarged = pipeline.preprocess(batch["lq"])
    state, _ = pipeline.start_state(batch["lq"], pipeline.encode(enlarged), (64, 64), 199, posterior="mean")
    latents = pipeline.denoise(state, [199], embeds)
    assert (latents - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, options, steps, share",
    [
        (osediff, {"vsd": 0.0, "mse": 0.0, "latent": 1.0}, 100, 0.5),
        (osediff, {"vsd": 0.0}, 60, 0.95),
        (invsr, {"perceptual": 0.0}, 200, 0.8),
    ],
    ids=["osediff on latents", "osediff", "invsr"],
)
def test_loss_falls(base, batch, make, options, steps, share):
    """Some steps on one batch, the draws changing. The loss is compared at draws that were not learned with."""
    task = make(base, **options)
    phase, module = next(iter(task.phases.items()))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 4e-3)

    def loss(seed: int) -> torch.Tensor:
        _, figures = task.loss(phase, batch, torch.Generator().manual_seed(seed))
        return figures.get("mse", figures.get("latent"))

    before = loss(-1)
    for seed in range(steps):
        optimizer.zero_grad()
        task.loss(phase, batch, torch.Generator().manual_seed(seed))[0].backward()
        optimizer.step()
    assert loss(-1) < share * before


@pytest.mark.slow
def test_regulariser_learns_the_generators_latents(base, batch):
    task = osediff(base, regulariser_everywhere=True)
    task.loss("generator", batch, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in task.regulariser.parameters() if p.requires_grad], 4e-3)
    before = task.loss("regulariser", batch, torch.Generator().manual_seed(-1))[0].item()
    for seed in range(60):
        optimizer.zero_grad()
        task.loss("regulariser", batch, torch.Generator().manual_seed(seed))[0].backward()
        optimizer.step()
    assert task.loss("regulariser", batch, torch.Generator().manual_seed(-1))[0].item() < 0.9 * before


@pytest.mark.slow
@pytest.mark.parametrize("make", [osediff, invsr])
def test_resumed_run_is_the_uncut_one(folder, tmp_path, make):
    """Six steps, and four steps with two more after a restart: the same losses to the last bit, and the same file."""
    options = {"lpips": 0.0} if make is osediff else {"adversarial": 0.1, "adversarial_from": 2}
    settings = {"batch": 2, "lr": 1e-3, "ema": 0.9, "log_every": 4, "seed": 7, "warmup": 3, "cosine": True, "save_every": 3, "accumulate": 2}

    def run(name, **more):
        task = make(load_base(str(folder / "base")), **options)
        return train(task, pictures(folder), LoopOptions(output=tmp_path / name, **settings | {"steps": 8} | more))

    uncut = run("uncut")
    first = run("cut", max_minutes=0)  # stops after the first step, in the middle of what is logged together
    assert first == []
    second = run("cut", resume=True)
    assert second == uncut and [entry["step"] for entry in uncut] == [4, 8]
    file = ADAPTER_FILE if make is osediff else PREDICTOR_FILE
    cut, whole = (load_file(tmp_path / name / file) for name in ("cut", "uncut"))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in whole)
    checkpoint = load_file(tmp_path / "cut" / "checkpoint" / "model.safetensors")
    learned = ("",) if make is invsr else (".lora_", "unet.conv_in.base_layer.")
    assert all(any(part in name for part in learned) for name in checkpoint), "the frozen base is no part of a checkpoint"


@pytest.mark.slow
def test_figures_for_tensorboard(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(osediff(load_base(str(folder / "base"))), pictures(folder), LoopOptions(tmp_path, steps=2, batch=1, log_every=1))
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in ("generator", "generator/mse", "generator/vsd", "generator/gradient", "regulariser", "lr"):
        assert [event.step for event in events.Scalars(name)] == [1, 2]
    assert events.Scalars("generator/vsd")[1].value == pytest.approx(history[1]["generator/vsd"], rel=1e-6)


SMALL = ["--predictor-channels", "64", "64", "--predictor-layers", "1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ["osediff", "--mixed-precision", "bf16", "--rank", "2"],
        ["invsr", "--mode", "middle", *SMALL],
        [
            "invsr",
            "--mixed-precision",
            "bf16",
            "--adversarial-weight",
            "0.1",
            "--adversarial-from",
            "0",
            "--discriminator-channels",
            "32",
            "64",
            *SMALL,
        ],
    ],
    ids=["osediff", "invsr", "invsr with discriminator"],
)
def test_command(folder, tmp_path, mode, capfd):
    """As a newcomer starts it: pictures, samples, a second start that must be meant, an output that ``info`` knows."""
    out = tmp_path / "run"
    command = ["train", *mode, "--base", str(folder / "base"), "--data", str(folder / "photos"), "-o", str(out), "--batch", "2", "--patch", "64"]
    command += ["--gradient-checkpointing", "--steps"]
    assert main([*command, "2"]) == 0
    sample = Image.open(out / "samples" / "0000002.png")
    assert sample.size == (3 * 64, 2 * 64)
    assert main([*command, "3"]) == 2 and "--resume" in capfd.readouterr().err
    assert main([*command, "3", "--resume"]) == 0
    file = out / (ADAPTER_FILE if mode[0] == "osediff" else PREDICTOR_FILE)
    assert main(["info", str(file)]) == 0
    assert ("an OSEDiff adapter" if mode[0] == "osediff" else "an InvSR noise predictor") in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_resume_exactly(folder, tmp_path):
    """Processes share each step's samples and its gradient."""
    words = [
        "train",
        "invsr",
        "--base",
        str(folder / "base"),
        "--data",
        str(folder / "photos"),
        "--steps",
        "3",
        "--patch",
        "64",
        "--batch",
        "1",
        *SMALL,
    ]

    def run(name, *more):
        for process in Forked.together(lambda: main([*words, "-o", str(tmp_path / name), *more]), 2, tmp_path):
            assert process.wait() == 0, process.text
        return load_file(tmp_path / name / PREDICTOR_FILE)

    uncut, first = run("uncut"), run("cut", "--max-minutes", "0")
    assert len(list((tmp_path / "cut" / "checkpoint").glob("random_states_*"))) == 2
    second = run("cut", "--resume")
    assert all(torch.equal(uncut[name], second[name]) for name in uncut)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_of_a_tagger(tmp_path):
    """Tags are read off the high-quality pictures; the text encoder's output for them is the prompt."""
    base = Base(pipeline_toys.unet(5), pipeline_toys.vae(5), pipeline_toys.text_encoder(), pipeline_toys.tokenizer(tmp_path / "tokenizer"))
    photos = golden_picture().movedim(-1, 1)
    prompts = Prompts(base, "sharp", "blurry", PromptTagger.from_files(write_ram(tmp_path)))
    fixed = Prompts(base, ", ".join(golden_tags("ram")) + ", sharp,", "blurry")
    assert torch.equal(prompts(photos), fixed(photos)) and torch.equal(prompts.negative(photos), fixed.negative(photos))
    assert not torch.equal(fixed(photos), Prompts(base, "sharp")(photos))
    assert len(prompts.networks) == 2 and not fixed.networks  # what is not needed again stays where it is


def test_base_with_text_encoder(tmp_path):
    """A folder as the hub has it: prompts are encoded as the pipeline encodes them."""
    pipeline = OSEDiffPipeline(**pipeline_toys.components(5, text=tmp_path / "tokenizer"))
    pipeline.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    prompts = Prompts(base, "cat, fur", "blurry")
    assert torch.equal(prompts(torch.zeros(2, 3, 64, 64)), pipeline.encode_prompt(["cat, fur"] * 2))
    assert torch.equal(prompts.negative(torch.zeros(1, 3, 64, 64)), pipeline.encode_prompt("blurry"))
    assert not any(parameter.requires_grad for network in (base.unet, base.vae, base.text_encoder) for parameter in network.parameters())


def test_what_does_not_fit_is_said(folder, base, tmp_path, capfd):
    base.prompt_file = None
    with pytest.raises(ValueError, match="--prompt-embeds"):
        Prompts(base)
    save_file({"prompt_embeds": torch.randn(1, 8, 5)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"narrow\.safetensors: found prompt_embeds of shape \(1, 8, 5\), expected \(1, tokens, 32\)"):
        Prompts(base, file=tmp_path / "narrow.safetensors")
    good = torch.randn(1, 8, WIDTH)
    for name, tensors, message in (
        ("nan", {"prompt_embeds": good * float("nan")}, "nan.safetensors: prompt_embeds holds values that are not finite"),
        ("negative", {"prompt_embeds": good, "negative_prompt_embeds": good[0].clone()}, "found negative_prompt_embeds of shape"),
        ("none", {"negative_prompt_embeds": good}, "found prompt_embeds of shape"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            Prompts(base, file=tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut.safetensors: the safetensors file is damaged or cut off"):
        Prompts(base, file=tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Prompts(base, file=tmp_path / "missing.safetensors")
    save_file({"prompt_embeds": torch.randn(1, 8, WIDTH)}, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="negative prompt"):
        OSEDiffTask(base, Prompts(base, file=tmp_path / "alone.safetensors"), OSEDiffOptions())
    with pytest.raises(ValueError, match="from 1 to 1000"):
        InvSRTask(base, Prompts(base, file=tmp_path / "alone.safetensors"), InvSROptions(timesteps=(0,)))
    command = ["train", "osediff", "--base", str(folder / "base"), "--data", str(folder / "photos"), "-o", str(tmp_path / "run"), "--steps", "1"]
    assert main([*command, "--patch", "100"]) == 2 and "multiple of 64" in capfd.readouterr().err
