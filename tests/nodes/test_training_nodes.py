"""What a training writes, loaded by the nodes in a real ComfyUI, restores as it did in the training."""

import pipeline_toys
import pytest
import torch
from toys import comfy_model, comfy_vae, conditioning, gaussian, picture, predictor_state_dict, relative_error

from fewstep_sr.networks.noise_predictor import NoisePredictorConfig
from pipelines.training.bases import Base, Prompts
from pipelines.training.common import enlarge
from pipelines.training.invsr import PREDICTOR_FILE, InvSROptions, InvSRTask
from pipelines.training.osediff import ADAPTER_FILE, OSEDiffOptions, OSEDiffTask

SEED, TOLERANCE = 8, 1e-4


@pytest.fixture
def base(tmp_path):
    base = Base(pipeline_toys.unet(SEED), pipeline_toys.vae(SEED), pipeline_toys.text_encoder(), pipeline_toys.tokenizer(tmp_path / "tokenizer"))
    for network in (base.unet, base.vae, base.text_encoder):
        network.requires_grad_(False)
    return base


def one_step(task, batch) -> None:
    (phase, module), *_ = task.phases.items()
    task.loss(phase, batch, torch.Generator().manual_seed(0))[0].backward()
    torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.02).step()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"hq": picture(SEED, 64, 64).movedim(-1, 1), "lq": picture(SEED, 16, 16).movedim(-1, 1)}


@pytest.mark.slow
def test_adapter(comfy, base, batch):
    task = OSEDiffTask(base, Prompts(base, "cat, fur"), OSEDiffOptions(vsd=0.0))
    one_step(task, batch)
    name = "trained.safetensors"
    task.save(comfy.folder("osediff"))
    (comfy.folder("osediff") / ADAPTER_FILE).rename(comfy.folder("osediff") / name)
    with torch.no_grad():
        expected, _ = task.generator(enlarge(batch["lq"], (64, 64)), gaussian(SEED, "prompt_embeds", (1, 77, 64)))

    model, vae = comfy.run("OSEDiffLoader", model=comfy_model(SEED), vae=comfy_vae(SEED), osediff_name=name).args
    (enlarged,) = comfy.run("ImageScaleBy", image=batch["lq"].movedim(1, -1), upscale_method="bicubic", scale_by=4.0)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae).args
    (restored,) = comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent).args
    assert relative_error(restored["samples"] * 0.18215, expected) < TOLERANCE


def test_noise_predictor(comfy, base, batch):
    config = NoisePredictorConfig.from_state_dict(predictor_state_dict(SEED))
    task = InvSRTask(base, Prompts(base, "cat"), InvSROptions(), config)
    one_step(task, batch)
    name = "trained.safetensors"
    task.save(comfy.folder("invsr"))
    (comfy.folder("invsr") / PREDICTOR_FILE).rename(comfy.folder("invsr") / name)
    with torch.no_grad():
        clean = task.encode_lq(enlarge(batch["lq"], (64, 64))).mean
        noise = task.predictor(batch["lq"] * 2 - 1, 199).mean
        expected = task.restore(clean, noise, torch.tensor([199]), gaussian(SEED, "prompt_embeds", (1, 77, 64)))

    (predictor,) = comfy.run("InvSRNoisePredictorLoader", noise_predictor_name=name).args
    model, vae = comfy_model(SEED), comfy_vae(SEED)
    image = batch["lq"].movedim(1, -1)
    (enlarged,) = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=4.0)
    (latent,) = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae).args
    (sigmas,) = comfy.run("FewStepScheduler", model=model, method="InvSR", steps=1).args
    start, _ = comfy.run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, posterior="mean").args
    guider = comfy.run("BasicGuider", model=model, conditioning=conditioning(SEED))[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
    restored, _ = comfy.run("SamplerCustomAdvanced", noise=start, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    assert relative_error(restored["samples"] * 0.18215, expected) < TOLERANCE
