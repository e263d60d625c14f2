"""Golden stage outputs of the HYPIR-SD2 reference on procedural weights.

usage: python make_hypir.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--size HxW] [--rank R] [--arch tiny|sd21]
Run in an environment where the reference imports (diffusers 0.32, peft 0.14). Float32, CPU. The reference's trainer writes the adapter file and its
enhancer runs, with stubs in place of the tokenizer and text encoder, the posterior's draw replaced, and one tile the size of the picture.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
import yaml
from make_osediff import ARCH, SCHED, P, fill
from make_pisasr import commit, versions

STEPS = [(200, 200), (200, 100)]  # (model_t, coeff_t), the first as released


def write_adapter(config, rank, seed, base, path):
    """The adapter file, with the reference's own generator set-up and its own save hook."""
    from accelerate import PartialState

    PartialState(cpu=True)
    for name in ("lpips", "HYPIR.model.D"):  # losses, not needed to save
        sys.modules[name] = types.SimpleNamespace(ImageConvNextDiscriminator=None, __name__=name)
    from HYPIR.trainer.sd2 import SD2Trainer

    hooks = []
    trainer = SD2Trainer.__new__(SD2Trainer)
    trainer.config = types.SimpleNamespace(base_model_path=base, gradient_checkpointing=False, lora_modules=config["lora_modules"], lora_rank=rank)
    trainer.weight_dtype, trainer.device = torch.float32, "cpu"
    trainer.accelerator = types.SimpleNamespace(
        is_main_process=True, unwrap_model=lambda m: m, register_save_state_pre_hook=hooks.append, register_load_state_pre_hook=lambda hook: None
    )
    trainer.init_generator()
    fill(trainer.G, seed, "hypir.unet", only=lambda k: "lora" in k)
    trainer.attach_accelerator_hooks()
    hooks[0]([trainer.G], [None], base)
    shutil.move(os.path.join(base, "state_dict.pth"), path)
    (scale,) = {s for m in trainer.G.modules() for s in getattr(m, "scaling", {}).values()}
    return scale


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="hypir")
    ap.add_argument("--size", default="64x64")
    ap.add_argument("--rank", type=int, default=4)
    ap.add_argument("--arch", default="tiny")
    a = ap.parse_args()
    out = Path(a.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    H, W = map(int, a.size.split("x"))
    seed, arch = a.seed, ARCH[a.arch]
    a.reference = str(Path(a.reference).resolve())
    sys.path.insert(0, a.reference)
    os.chdir(a.reference)
    import diffusers.models.autoencoders.vae as dvae
    import HYPIR.enhancer.base as base_module
    import HYPIR.enhancer.sd2 as sd2
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    rec, calls = {}, []

    def sample(self, generator=None):
        rec["posterior_mean"], rec["posterior_logvar"] = self.mean, self.logvar
        return self.mean + self.std * torch.from_numpy(P.gaussian(seed, "vae_posterior", tuple(self.mean.shape)))

    dvae.DiagonalGaussianDistribution.sample = sample
    prompt = torch.from_numpy(P.gaussian(seed, "prompt_embeds", (1, 77, arch["unet"]["cross_attention_dim"])))

    class Tokenizer:
        model_max_length = 77
        from_pretrained = classmethod(lambda cls, *a, **k: cls())

        def __call__(self, text, **k):
            return types.SimpleNamespace(input_ids=torch.zeros(len(text), 77, dtype=torch.long))

    class TextEncoder(torch.nn.Module):
        from_pretrained = classmethod(lambda cls, *a, **k: cls())

        def forward(self, ids):
            return (prompt,)

    sd2.CLIPTokenizer, sd2.CLIPTextModel = Tokenizer, TextEncoder

    def whole(fn, **k):
        return fn

    tiled, base_module.make_tiled_fn = base_module.make_tiled_fn, whole

    config = yaml.safe_load(Path("configs/sd2_gradio.yaml").read_text())
    assert STEPS[0] == (config["model_t"], config["coeff_t"])
    pth = out / f"{a.name}.pth"
    with tempfile.TemporaryDirectory() as tmp:
        unet = UNet2DConditionModel(**arch["unet"])
        fill(unet, seed, "unet")
        unet.save_pretrained(tmp + "/unet")
        vae = AutoencoderKL(**arch["vae"])
        fill(vae, seed, "vae")
        vae.save_pretrained(tmp + "/vae")
        DDPMScheduler(**SCHED).save_pretrained(tmp + "/scheduler")
        scale = write_adapter(config, a.rank, seed, tmp, pth)
        m = sd2.SD2Enhancer(
            base_model_path=tmp, weight_path=str(pth), lora_modules=config["lora_modules"], lora_rank=a.rank, model_t=None, coeff_t=None, device="cpu"
        )
        m.weight_dtype = torch.float32
        m.init_models()

    forward, step, decode = m.G.forward, m.scheduler.step, m.vae.decode

    def g_forward(x, t, **k):
        r = forward(x, t, **k)
        calls.append((t.tolist(), x, r.sample))
        return r

    def scheduler_step(eps, t, x, **k):
        r = step(eps, t, x, **k)
        rec["x0"] = r.pred_original_sample
        rec["t"] = t
        return r

    def vae_decode(z, **k):
        r = decode(z, **k)
        rec["image"] = r.sample
        return r

    m.G.forward, m.scheduler.step, m.vae.decode = g_forward, scheduler_step, vae_decode

    lq = torch.from_numpy(P.image(seed, H, W)).permute(2, 0, 1)[None]

    def run():
        return m.enhance(lq, "", upscale=1, patch_size=min(H, W), stride=min(H, W))

    results = {}
    for model_t, coeff_t in STEPS:
        calls.clear()
        m.model_t, m.coeff_t = model_t, coeff_t
        picture = run()
        ((t, latent, eps),) = calls
        assert t == [model_t] and rec["t"] == coeff_t and picture.shape[2:] == (H, W)
        assert "noise_pred" not in results or torch.equal(eps, results["noise_pred"])
        results["noise_pred"] = eps
        tag = f"{model_t}_{coeff_t}"
        results[f"x0_{tag}"], results[f"image_{tag}"], results[f"picture_{tag}"] = rec["x0"], rec["image"], picture
    if H == W:  # one tile, so the reference's own tiling must change nothing
        base_module.make_tiled_fn = tiled
        error = (run() - picture).norm() / picture.norm()
        print("reference's tiling, one tile:", float(error))
        assert error < 1e-5

    arrays = {
        k: v.detach().float().numpy()
        for k, v in {"posterior_mean": rec["posterior_mean"], "posterior_logvar": rec["posterior_logvar"], "latent": latent, **results}.items()
    }
    np.savez_compressed(out / f"{a.name}.npz", **arrays)
    table = m.scheduler.alphas_cumprod
    import accelerate
    import transformers

    json.dump(
        dict(
            seed=seed,
            arch=a.arch,
            unet=arch["unet"],
            vae=arch["vae"],
            scheduler=SCHED,
            size=[H, W],
            rank=a.rank,
            lora_alpha=a.rank,
            lora_scale=scale,
            model_t_coeff_t=STEPS,
            alphas_cumprod={str(c): float(table[c]) for _, c in STEPS},
            vae_scaling_factor=m.vae.config.scaling_factor,
            adapter_weight_prefix="hypir.unet",
            posterior_sample="gaussian(seed, 'vae_posterior', shape)",
            prompt_embeds="gaussian(seed, 'prompt_embeds', (1, 77, cross_attention_dim))",
            reference="XPixelGroup/HYPIR",
            reference_commit=commit(a.reference),
            versions=dict(versions(), transformers=transformers.__version__, accelerate=accelerate.__version__),
        ),
        open(out / f"{a.name}.json", "w"),
        indent=1,
    )
    for k, v in arrays.items():
        print(f"{k:18} {v.shape} {v.mean():.4f} {v.std():.4f} {v.min():.3f} {v.max():.3f} {np.isfinite(v).all()}")
    print(scale, pth.stat().st_size)


if __name__ == "__main__":
    main()
