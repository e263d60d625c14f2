"""Golden stage outputs of the PiSA-SR reference on procedural weights.

usage: python make_pisasr.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--size HxW] [--rank R] [--rank-sem R] [--arch tiny|sd21]
Run in an environment where the reference imports. Float32, CPU. The reference's own classes run as they are, with "cuda" read as "cpu", stubs in
place of the tokenizer and text encoder, and the posterior's draw replaced.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from make_osediff import ARCH, SCHED, P, fill

LAMBDAS = [(1, 1), (1, 0), (0.5, 1.5), (1.2, 0.8)]


def load_reference(checkout):
    """The reference's module, on the CPU: it names its device in the text."""
    sys.path.insert(0, checkout)
    os.chdir(checkout)
    source = Path("pisasr.py").read_text().replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "None")
    ref = types.ModuleType("pisasr")
    ref.__file__ = "pisasr.py"
    sys.modules["pisasr"] = ref
    exec(compile(source, "pisasr.py", "exec"), ref.__dict__)
    ref.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *a, **k: None)
    ref.CLIPTextModel = types.SimpleNamespace(from_pretrained=lambda *a, **k: torch.nn.Identity())
    return ref


def versions():
    import diffusers
    import peft

    return dict(torch=torch.__version__, diffusers=diffusers.__version__, peft=peft.__version__, numpy=np.__version__)


def commit(checkout):
    return subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="pisasr")
    ap.add_argument("--size", default="64x64")
    ap.add_argument("--rank", type=int, default=4)
    ap.add_argument("--rank-sem", type=int)
    ap.add_argument("--arch", default="tiny")
    a = ap.parse_args()
    out = Path(a.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    H, W = map(int, a.size.split("x"))
    seed, arch = a.seed, ARCH[a.arch]
    ranks = dict(pix=a.rank, sem=a.rank_sem or a.rank)
    a.reference = str(Path(a.reference).resolve())
    ref = load_reference(a.reference)
    import diffusers.models.autoencoders.vae as dvae
    from diffusers import DDPMScheduler

    rec, calls = {}, []

    def sample(self, generator=None):
        rec["posterior_mean"], rec["posterior_logvar"] = self.mean, self.logvar
        return self.mean + self.std * torch.from_numpy(P.gaussian(seed, "vae_posterior", tuple(self.mean.shape)))

    for mod in {dvae, sys.modules[ref.AutoencoderKL.__module__]}:
        if hasattr(mod, "DiagonalGaussianDistribution"):
            mod.DiagonalGaussianDistribution.sample = sample
    prompt = torch.from_numpy(P.gaussian(seed, "prompt_embeds", (1, 77, arch["unet"]["cross_attention_dim"])))

    with tempfile.TemporaryDirectory() as tmp:
        unet = ref.UNet2DConditionModel(**arch["unet"])
        fill(unet, seed, "unet")
        unet.save_pretrained(tmp + "/unet")
        vae = ref.AutoencoderKL(**arch["vae"])
        fill(vae, seed, "vae")
        vae.save_pretrained(tmp + "/vae")
        DDPMScheduler(**SCHED).save_pretrained(tmp + "/scheduler")
        # the adapter file, written by the reference's own save_model
        gu, *names = ref.initialize_unet(ranks["pix"], ranks["sem"], return_lora_module_names=True, pretrained_model_path=tmp)
        fill(gu, seed, "pisasr.unet", only=lambda k: "lora" in k)
        fields = [f"lora_unet_{part}_{task}" for task in ("pix", "sem") for part in ("modules_encoder", "modules_decoder", "others")]
        pkl = out / f"{a.name}.pkl"
        ref.PiSASR.save_model(
            types.SimpleNamespace(unet=gu, lora_rank_unet_pix=ranks["pix"], lora_rank_unet_sem=ranks["sem"], **dict(zip(fields, names))), pkl
        )
        scales = {task: {m.scaling[n] for m in gu.modules() for n in getattr(m, "scaling", {}) if n.endswith(task)} for task in ranks}
        del gu, unet, vae

        def build(default):
            args = types.SimpleNamespace(
                pretrained_model_path=tmp,
                pretrained_path=pkl,
                mixed_precision="no",
                default=default,
                lambda_pix=1.0,
                lambda_sem=1.0,
                vae_encoder_tiled_size=1024,
                vae_decoder_tiled_size=224,
                latent_tiled_size=96,
                latent_tiled_overlap=32,
            )
            m = ref.PiSASR_eval(args)
            m.set_eval()
            m.encode_prompt = lambda _: prompt
            forward, process = m.unet.forward, m._process_latents

            def unet_forward(x, t, **k):
                r = forward(x, t, **k)
                calls.append((int(t), r.sample.clone()))
                return r

            def process_latents(latent, *k):
                pred = process(latent, *k)
                rec["latent"], rec["x0"] = latent, latent - pred
                return pred

            m.unet.forward, m._process_latents = unet_forward, process_latents
            return m

        lq = torch.from_numpy(P.image(seed, H, W)).permute(2, 0, 1)[None]
        m = build(default=False)
        results = {}
        for pix, sem in LAMBDAS:
            calls.clear()
            m.lambda_pix, m.lambda_sem = torch.tensor([float(pix)]), torch.tensor([float(sem)])
            _, image = m(False, lq * 2 - 1, prompt="")
            (t_full, full), (t_pix, only_pix) = calls  # the reference calls the full model first
            if "eps_full" in results:
                assert torch.allclose(full, results["eps_full"], atol=1e-5) and torch.equal(only_pix, results["eps_pix"])
            results.setdefault("eps_pix", only_pix)
            results.setdefault("eps_full", full)
            results[f"x0_{pix:g}_{sem:g}"], results[f"image_{pix:g}_{sem:g}"] = rec["x0"], image
        calls.clear()
        _, image = build(default=True)(True, lq * 2 - 1, prompt="")
        results["x0_default"], results["image_default"] = rec["x0"], image
        assert len(calls) == 1 and {t_full, t_pix, calls[0][0]} == {1}
        scaling_factor = m.vae.config.scaling_factor

    arrays = {k: v.detach().float().numpy() for k, v in {**{k: rec[k] for k in ("posterior_mean", "posterior_logvar", "latent")}, **results}.items()}
    np.savez_compressed(out / f"{a.name}.npz", **arrays)
    (scale_pix,), (scale_sem,) = scales["pix"], scales["sem"]
    json.dump(
        dict(
            seed=seed,
            arch=a.arch,
            unet=arch["unet"],
            vae=arch["vae"],
            scheduler=SCHED,
            size=[H, W],
            rank_pix=ranks["pix"],
            rank_sem=ranks["sem"],
            lora_alpha=8,
            lora_scale_pix=scale_pix,
            lora_scale_sem=scale_sem,
            timestep=t_full,
            vae_scaling_factor=scaling_factor,
            alphas_cumprod={},
            lambdas=LAMBDAS,
            adapter_weight_prefix="pisasr.unet",
            posterior_sample="gaussian(seed, 'vae_posterior', shape)",
            prompt_embeds="gaussian(seed, 'prompt_embeds', (1, 77, cross_attention_dim))",
            reference="csslc/PiSA-SR",
            reference_commit=commit(a.reference),
            versions=versions(),
        ),
        open(out / f"{a.name}.json", "w"),
        indent=1,
    )
    for k, v in arrays.items():
        print(f"{k:18} {v.shape} {v.mean():.4f} {v.std():.4f} {np.isfinite(v).all()}")
    print(scales, pkl.stat().st_size)


if __name__ == "__main__":
    main()
