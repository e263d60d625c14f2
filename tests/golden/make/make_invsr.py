"""Golden stage outputs of the InvSR reference on procedural weights (float32, CPU).

usage: python make_invsr.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--size HxW] [--pch P] [--steps N] [--cfg C] [--color none|wavelet|ycbcr] [--arch tiny|sd21] [--bs B]
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "support"))  # procedural.py
import procedural as P

sys.path.insert(0, str(HERE))
SCHED = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    interpolation_type="linear",
    steps_offset=1,
    timestep_spacing="trailing",
)
UNET = {
    "tiny": dict(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 4, 4),
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "sd21": dict(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
}
VAE = {
    "tiny": dict(
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    "sd21": dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ),
}
NP = {
    "tiny": dict(
        in_channels=3,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=(1, 1),
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=32,
        sample_size=128,
        mid_block_add_attention=True,
        resnet_time_scale_shift="default",
        temb_channels=128,
        attention_head_dim=64,
        freq_shift=0,
        flip_sin_to_cos=True,
        double_z=True,
    ),
    "sd21": dict(
        in_channels=3,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        block_out_channels=(256, 512),
        layers_per_block=(3, 3),
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=32,
        sample_size=128,
        mid_block_add_attention=True,
        resnet_time_scale_shift="default",
        temb_channels=512,
        attention_head_dim=64,
        freq_shift=0,
        flip_sin_to_cos=True,
        double_z=True,
    ),
}
STEPS = {1: [200], 2: [200, 100], 3: [200, 100, 50], 4: [200, 150, 100, 50], 5: [250, 200, 150, 100, 50]}


def fill(module, seed, prefix):
    module.load_state_dict({k: torch.from_numpy(P.weight(seed, f"{prefix}.{k}", tuple(v.shape))) for k, v in module.state_dict().items()})
    return module.eval()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="invsr")
    ap.add_argument("--size", default="32x32")
    ap.add_argument("--pch", type=int, default=32)
    ap.add_argument("--steps", type=int, default=1)
    ap.add_argument("--cfg", type=float, default=1.0)
    ap.add_argument("--color", default="none")
    ap.add_argument("--arch", default="tiny")
    ap.add_argument("--bs", type=int, default=8)
    ap.add_argument("--save-predictor", action="store_true")
    a = ap.parse_args()
    sys.path.insert(0, a.reference + "/src")
    sys.path.insert(0, a.reference)
    os.chdir(a.reference)
    import diffusers.models.autoencoders.vae as dvae
    import sampler_invsr as ref
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionInvEnhancePipeline, UNet2DConditionModel
    from diffusers.models.autoencoders import NoisePredictor

    H, W = map(int, a.size.split("x"))
    seed = a.seed
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    unet = fill(UNet2DConditionModel(**UNET[a.arch]), seed, "unet")
    vae = fill(AutoencoderKL(**VAE[a.arch]), seed, "vae")
    pred = fill(NoisePredictor(**NP[a.arch]), seed, "noise_predictor")
    pipe = StableDiffusionInvEnhancePipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.start_noise_predictor = pred
    rec, state = {}, dict(inside=False, n=0, v=0, tiles=0)
    f0 = pred.forward

    def pf(*x, **k):
        state["inside"] = True
        r = f0(*x, **k)
        state["inside"] = False
        rec.setdefault("noise", r)
        rec.setdefault("timestep", x[1].float())
        return r

    pred.forward = pf

    def sample(self, generator=None):
        which = "noise_posterior" if state["inside"] else "vae_posterior"
        key = "n" if state["inside"] else "v"
        z = torch.from_numpy(P.gaussian(seed, f"{which}:{state[key]}", tuple(self.mean.shape)))
        state[key] += 1
        tag = "noise" if state["inside"] else "vae"
        rec.setdefault(tag + "_mean", self.mean)
        rec.setdefault(tag + "_logvar", self.logvar)
        return self.mean + self.std * z

    dvae.DiagonalGaussianDistribution.sample = sample
    prep0 = pipe.prepare_latents

    def prep(*x, **k):
        r = prep0(*x, **k)
        rec.setdefault("start_state", r)
        return r

    pipe.prepare_latents = prep
    sched = pipe.scheduler
    step0 = sched.step

    def step(eps, t, lat, **k):
        r = step0(eps, t, lat, **k)
        rec.setdefault("sigmas", sched.sigmas)
        if state["tiles"] == 1:
            rec[f"noise_pred_{int(t)}"], rec[f"after_{int(t)}"] = eps, r[0]
        return r

    sched.step = step
    ctx = UNET[a.arch]["cross_attention_dim"]
    pos = torch.from_numpy(P.gaussian(seed, "prompt_embeds", (1, 77, ctx)))
    neg = torch.from_numpy(P.gaussian(seed, "negative_prompt_embeds", (1, 77, ctx)))

    class Call:
        vae, unet = pipe.vae, pipe.unet

        def __call__(self, image, prompt, negative_prompt, **k):
            state["tiles"] += 1
            n = image.shape[0]
            ne = neg.repeat(n, 1, 1) if negative_prompt is not None else None
            r = pipe(image=image.float(), prompt_embeds=pos.repeat(n, 1, 1), negative_prompt_embeds=ne, **k)
            if state["tiles"] == 1:
                rec["image_first_call"] = r.images
            return r

    from omegaconf import OmegaConf

    s = ref.InvSamplerSR.__new__(ref.InvSamplerSR)
    s.configs = OmegaConf.create(
        dict(
            cfg_scale=a.cfg,
            timesteps=STEPS[a.steps],
            color_fix=None if a.color == "none" else a.color,
            basesr=dict(sf=4, chopping=dict(pch_size=a.pch, weight_type="Gaussian", extra_bs=a.bs)),
        )
    )
    s.sd_pipe = Call()
    lq = torch.from_numpy(P.image(seed, H, W)).permute(2, 0, 1)[None]
    with torch.no_grad():
        res = s.sample_func(lq)
    arrays = {k: v.detach().float().numpy() for k, v in rec.items()}
    arrays["image"] = res
    np.savez_compressed(out / f"{a.name}.npz", **arrays)
    json.dump(
        dict(
            seed=seed,
            arch=a.arch,
            unet=UNET[a.arch],
            vae=VAE[a.arch],
            noise_predictor=NP[a.arch],
            scheduler=SCHED,
            size=[H, W],
            chopping_size=a.pch,
            chopping_batch=a.bs,
            timesteps=STEPS[a.steps],
            cfg_scale=a.cfg,
            color_fix=a.color,
            scale=4,
            pipeline_calls=state["tiles"],
            noise_sample="gaussian(seed, 'noise_posterior:<call>', shape)",
            vae_sample="gaussian(seed, 'vae_posterior:<call>', shape)",
            prompt_embeds="gaussian(seed, 'prompt_embeds', (1, 77, cross_attention_dim))",
        ),
        open(out / f"{a.name}.json", "w"),
        indent=1,
    )
    if a.save_predictor:
        torch.save(pred.state_dict(), out / "noise_predictor.pth")
    for k, v in arrays.items():
        print(k, v.shape, float(v.mean()), float(v.std()), bool(np.isfinite(v).all()))


main()
