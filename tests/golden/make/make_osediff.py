"""Golden stage outputs of the OSEDiff reference on procedural weights.

usage: python make_osediff.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--size HxW] [--tile S,O] [--rank R] [--arch tiny|sd21]
Run in an environment where the reference imports. Float32, CPU.
"""

import argparse
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "support"))  # procedural.py
import procedural as P

ARCH = {
    "tiny": dict(
        unet=dict(
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
        vae=dict(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
    ),
    "sd21": dict(
        unet=dict(
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
        vae=dict(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
    ),
}
SCHED = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="epsilon",
    steps_offset=1,
)


def fill(module, seed, prefix, only=None):
    sd = module.state_dict()
    new = {}
    for k, v in sd.items():
        if only is not None and not only(k):
            continue
        new[k] = torch.from_numpy(P.weight(seed, f"{prefix}.{k}", tuple(v.shape)))
    module.load_state_dict(new, strict=only is None)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="osediff")
    ap.add_argument("--size", default="64x64")
    ap.add_argument("--tile", default="96,32")
    ap.add_argument("--rank", type=int, default=4)
    ap.add_argument("--arch", default="tiny")
    a = ap.parse_args()
    sys.path.insert(0, a.reference)
    os.chdir(a.reference)
    import diffusers.models.autoencoders.vae as dvae
    import osediff as ref
    from diffusers import DDPMScheduler

    H, W = map(int, a.size.split("x"))
    ts, to = map(int, a.tile.split(","))
    arch = ARCH[a.arch]
    seed = a.seed
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as tmp:
        unet = ref.UNet2DConditionModel(**arch["unet"])
        fill(unet, seed, "unet")
        unet.save_pretrained(tmp + "/unet")
        vae = ref.AutoencoderKL(**arch["vae"])
        fill(vae, seed, "vae")
        vae.save_pretrained(tmp + "/vae")
        sched = DDPMScheduler(**SCHED)
        sched.save_pretrained(tmp + "/scheduler")
        args = types.SimpleNamespace(
            pretrained_model_name_or_path=tmp, lora_rank=a.rank, latent_tiled_size=ts, latent_tiled_overlap=to, merge_and_unload_lora=False
        )
        # the adapter file, in the layout of the reference's own save_model
        gv, vmods = ref.initialize_vae(args)
        gu, enc, dec, oth = ref.initialize_unet(args)
        fill(gu, seed, "osediff.unet", only=lambda k: "lora" in k or "conv_in" in k)
        fill(gv, seed, "osediff.vae", only=lambda k: "lora" in k)
        gen = types.SimpleNamespace(
            lora_vae_modules_encoder=vmods,
            lora_unet_modules_encoder=enc,
            lora_unet_modules_decoder=dec,
            lora_unet_others=oth,
            lora_rank_unet=a.rank,
            lora_rank_vae=a.rank,
            unet=gu,
            vae=gv,
        )
        pkl = out / f"{a.name}.pkl"
        ref.OSEDiff_gen.save_model(gen, pkl)

        m = ref.OSEDiff_test.__new__(ref.OSEDiff_test)
        torch.nn.Module.__init__(m)
        m.args = args
        m.device = torch.device("cpu")
        m.weight_dtype = torch.float32
        m.noise_scheduler = DDPMScheduler.from_pretrained(tmp, subfolder="scheduler")
        m.noise_scheduler.set_timesteps(1)
        m.vae = ref.AutoencoderKL.from_pretrained(tmp, subfolder="vae")
        m.unet = ref.UNet2DConditionModel.from_pretrained(tmp, subfolder="unet")
        m.load_ckpt(torch.load(pkl))
        m.timesteps = torch.tensor([999]).long()
        m.eval()

    ctx = arch["unet"]["cross_attention_dim"]
    prompt = torch.from_numpy(P.gaussian(seed, "prompt_embeds", (1, 77, ctx)))
    m.encode_prompt = lambda _: prompt
    rec = {}

    def sample(self, generator=None):
        z = torch.from_numpy(P.gaussian(seed, "vae_posterior", tuple(self.mean.shape)))
        rec["posterior_mean"], rec["posterior_logvar"] = self.mean, self.logvar
        return self.mean + self.std * z

    for mod in {dvae, sys.modules[ref.AutoencoderKL.__module__]}:
        if hasattr(mod, "DiagonalGaussianDistribution"):
            mod.DiagonalGaussianDistribution.sample = sample
    step0 = m.noise_scheduler.step

    def step(model_pred, t, lat, **k):
        rec["latent"], rec["noise_pred"] = lat, model_pred
        r = step0(model_pred, t, lat, **k)
        rec["x0"] = r.prev_sample
        return r

    m.noise_scheduler.step = step
    img = P.image(seed, H, W)
    lq = torch.from_numpy(img).permute(2, 0, 1)[None]
    with torch.no_grad():
        rec["image"] = m(lq * 2 - 1, "")
        base = ref.UNet2DConditionModel.forward  # noqa
    arrays = {k: v.detach().float().numpy() for k, v in rec.items()}
    np.savez_compressed(out / f"{a.name}.npz", **arrays)
    json.dump(
        dict(
            seed=seed,
            arch=a.arch,
            unet=arch["unet"],
            vae=arch["vae"],
            scheduler=SCHED,
            size=[H, W],
            latent_tile=[ts, to],
            rank=a.rank,
            timestep=999,
            posterior_sample="gaussian(seed, 'vae_posterior', shape)",
            prompt_embeds="gaussian(seed, 'prompt_embeds', (1, 77, cross_attention_dim))",
        ),
        open(out / f"{a.name}.json", "w"),
        indent=1,
    )
    for k, v in arrays.items():
        print(k, v.shape, float(v.mean()), float(v.std()), bool(np.isfinite(v).all()))
    print(pkl.stat().st_size)


if __name__ == "__main__":
    main()
