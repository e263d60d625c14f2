"""Golden stage outputs of the S3Diff reference on procedural weights.

usage: python make_s3diff.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--size HxW] [--rank-unet R] [--rank-vae R]
                             [--de-feats a,b,c,d] [--tile S,O] [--arch tiny|sd21]
``--size`` is that of the enlarged picture; the low-quality picture is a quarter of it. Float32, CPU. Needs diffusers 0.25.1 and peft 0.10.0
(in 0.9 the reference's own layer function fails: ``_check_forward_args``), transformers 4.3x, accelerate, omegaconf.

The reference's own ``main`` runs from the picture to the PNG. What is put in its way: packages that its inference does not use (metrics,
training data, compiled operators), the data set (one procedural picture), the text encoder (procedural embeddings), the posterior draw,
"cuda" (read as "cpu") and the widths of the degradation estimator.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import MagicMock

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
# SD-Turbo's, read as a DDPMScheduler by the reference
SCHED = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="epsilon",
    steps_offset=1,
    timestep_spacing="trailing",
)

UNUSED = [
    "cv2",
    "pyiqa",
    "clip",
    "lpips",
    "utils.misc",
    "utils.util_image",
    "my_utils.utils",
    "basicsr.ops",
    "basicsr.ops.dcn",
    "basicsr.utils",
    "basicsr.utils.img_process_util",
    "basicsr.utils.registry",
    "basicsr.data",
    "basicsr.data.transforms",
    "basicsr.data.degradations",
]
EXAMPLES = {
    "unet_attention": ("unet", "up_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q"),
    "unet_conv": ("unet", "mid_block.resnets.1.conv2"),
    "vae_conv": ("vae", "encoder.down_blocks.1.resnets.0.conv1"),
}


def fill(module, seed, prefix, only=None):
    new = {k: torch.from_numpy(P.weight(seed, f"{prefix}.{k}", tuple(v.shape))) for k, v in module.state_dict().items() if only is None or only(k)}
    module.load_state_dict(new, strict=only is None)


class OnCPU(torch.overrides.TorchFunctionMode):
    """Reads every "cuda" as "cpu"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]

        def is_cuda(v):
            return isinstance(v, (str, torch.device)) and str(v).startswith("cuda")

        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return func(*("cpu" if is_cuda(v) else v for v in args), **kwargs)


def import_reference(root):
    """The reference's inference script and network modules, without what it imports and does not use."""
    import transformers  # noqa: F401 (they look for packages, so before any is replaced)

    sys.path[:0] = [str(root), str(root / "src")]
    os.chdir(root)
    for package in ("basicsr", "basicsr.archs"):  # not their __init__, which imports everything
        module = types.ModuleType(package)
        module.__path__ = [str(root / package.replace(".", "/"))]
        sys.modules[package] = module
    for name in UNUSED:
        sys.modules[name] = MagicMock()
    return importlib.import_module("inference_s3diff"), importlib.import_module("s3diff_tile"), importlib.import_module("de_net")


def effective_weight(layer):
    """The weight of the one linear layer or convolution that acts as ``layer`` does, read off its responses to unit inputs."""
    base = layer.base_layer
    bias = 0 if base.bias is None else base.bias
    if isinstance(base, torch.nn.Linear):
        return (layer(torch.eye(base.in_features)[None])[0] - bias).T
    assert base.kernel_size in ((1, 1), (3, 3)) and base.stride == (1, 1)
    impulse = torch.zeros(base.in_channels, base.in_channels, 3, 3)
    impulse[range(base.in_channels), range(base.in_channels), 1, 1] = 1
    response = layer(impulse) - torch.as_tensor(bias).reshape(1, -1, 1, 1)
    return response.flip(2, 3).transpose(0, 1)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="s3diff")
    ap.add_argument("--size", default="64x64")
    ap.add_argument("--tile", default="96,32")
    ap.add_argument("--rank-unet", type=int, default=8)
    ap.add_argument("--rank-vae", type=int, default=4)
    ap.add_argument("--de-feats", default="8,8,8,16")
    ap.add_argument("--arch", default="tiny")
    a = ap.parse_args()
    root, out = a.reference.resolve(), a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    H, W = map(int, a.size.split("x"))
    tile, overlap = map(int, a.tile.split(","))
    feats = [int(n) for n in a.de_feats.split(",")]
    arch, seed = ARCH[a.arch], a.seed
    ctx = arch["unet"]["cross_attention_dim"]
    adapter, estimator = out / f"{a.name}.pkl", out / f"{a.name}_de_net.pth"
    inference, net, de = import_reference(root)
    parsed = inference.parse_args_paired_testing(
        [
            "--sd_path",
            "",
            "--pretrained_path",
            str(adapter),
            "--de_net_path",
            str(estimator),
            "--lora_rank_unet",
            str(a.rank_unet),
            "--lora_rank_vae",
            str(a.rank_vae),
            "--latent_tiled_size",
            str(tile),
            "--latent_tiled_overlap",
            str(overlap),
            "--seed",
            "0",
        ]
    )

    # the text encoder: the prompt's place among the two published ones picks the embedding
    prompts = {parsed.pos_prompt: "prompt_embeds", parsed.neg_prompt: "negative_prompt_embeds"}
    embeds = torch.cat([torch.from_numpy(P.gaussian(seed, name, (1, 77, ctx))) for name in prompts.values()])

    def tokenizer(texts, **_):
        return types.SimpleNamespace(input_ids=torch.tensor([list(prompts).index(t) for t in texts]))

    tokenizer.model_max_length = 77
    net.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)

    class TextEncoder(torch.nn.Module):
        def forward(self, ids):
            return [embeds[ids]]

    net.CLIPTextModel = types.SimpleNamespace(from_pretrained=lambda *_, **__: TextEncoder())

    rec = {}

    def sample(self, generator=None):
        rec["posterior_mean"], rec["posterior_logvar"] = self.mean, self.logvar
        return self.mean + self.std * torch.from_numpy(P.gaussian(seed, "vae_posterior", tuple(self.mean.shape)))

    import diffusers.models.autoencoders.vae as dvae

    for module in {dvae, sys.modules[net.AutoencoderKL.__module__]}:
        if hasattr(module, "DiagonalGaussianDistribution"):
            module.DiagonalGaussianDistribution.sample = sample

    low = P.image(seed, H // 4, W // 4)

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, options):
            pass

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return dict(lr=torch.from_numpy(low).permute(2, 0, 1), lr_path="golden.png")

    inference.PlainDataset, inference.evaluate = Pictures, lambda *_: []

    def recording(guidance):
        def build(**options):
            m = net.S3Diff(**options)
            rec["network"] = m
            assert m.guidance_scale == 1.07
            m.guidance_scale = guidance
            m.register_forward_pre_hook(lambda _, args, kw: rec.update(picture=args[0], d=args[1]), with_kwargs=True)
            m.register_forward_hook(lambda _, args, result: rec.update(image=result))
            m.vae_de_mlp.register_forward_pre_hook(lambda _, args: rec.update(p=args[0]))
            for part, rank in (("vae", a.rank_vae), ("unet", a.rank_unet)):
                getattr(m, part + "_fuse_mlp").register_forward_hook(
                    lambda _, args, result, part=part, rank=rank: rec.update({"M_" + part: result[0].reshape(-1, rank, rank)})
                )
            calls = []

            def unet(_, args, kw, result):
                calls.append(result.sample)
                rec["latent"] = args[0]
                index = "positive" if torch.equal(kw["encoder_hidden_states"][0], embeds[0]) else "negative"
                rec["noise_pred_" + index], rec["unet_order"] = result.sample, [*rec.get("unet_order", []), index]

            m.unet.register_forward_hook(unet, with_kwargs=True)
            inner = m.sched.step

            def step(model_output, t, sample, **kw):
                rec["latent"], rec["noise_pred"] = sample, model_output  # of the whole picture, where tiles are used
                result = inner(model_output, t, sample, **kw)
                rec["x0"] = result.prev_sample
                return result

            m.sched.step = step
            return m

        return build

    with tempfile.TemporaryDirectory() as tmp, OnCPU():
        parsed.sd_path, parsed.output_dir = tmp, tmp + "/result"
        parsed.base_config = tmp + "/config.yaml"
        Path(parsed.base_config).write_text("sf: 4\nvalidation: {}\n")
        unet = net.UNet2DConditionModel(**arch["unet"])
        fill(unet, seed, "unet")
        unet.save_pretrained(tmp + "/unet")
        vae = net.AutoencoderKL(**arch["vae"])
        fill(vae, seed, "vae")
        vae.save_pretrained(tmp + "/vae")
        from diffusers import DDPMScheduler

        DDPMScheduler(**SCHED).save_pretrained(tmp + "/scheduler")

        # the two files: the adapter by the reference's own save function
        fresh = net.S3Diff(sd_path=tmp, pretrained_path=None, lora_rank_unet=a.rank_unet, lora_rank_vae=a.rank_vae, args=parsed)
        fill(fresh.unet, seed, "s3diff.unet", only=lambda k: "lora" in k or "conv_in" in k)
        fill(fresh.vae, seed, "s3diff.vae", only=lambda k: "lora" in k)
        for part in ("vae_de_mlp", "unet_de_mlp", "vae_block_mlp", "unet_block_mlp", "vae_fuse_mlp", "unet_fuse_mlp"):
            fill(getattr(fresh, part), seed, f"s3diff.{part}")
        for key in ("W", "vae_block_embeddings.weight", "unet_block_embeddings.weight"):  # standard normal, as they start in training
            parameter = fresh.get_parameter(key)
            parameter.data.copy_(torch.from_numpy(P.gaussian(seed, "s3diff." + key, tuple(parameter.shape))))
        fresh.save_model(adapter)
        inference.DEResNet = functools.partial(de.DEResNet, num_feats=feats)
        blank = inference.DEResNet(num_in_ch=3, num_degradation=2)
        fill(blank, seed, "de_net")
        for head in blank.fc_degree:  # else both scores stay near 0.5, whatever the picture
            head[2].weight.data *= 5
        torch.save(blank.state_dict(), estimator)

        results = {}
        for guidance in (1.0, 1.07):  # the published one last: what the two share is recorded from it
            rec.clear()
            inference.S3Diff = recording(guidance)
            inference.main(parsed)
            results[guidance] = {k: rec[k].clone() for k in ("x0", "image")}
        m = rec.pop("network")
        order = rec.pop("unet_order")
        from PIL import Image

        output = np.asarray(Image.open(parsed.output_dir + "/golden.png"))

        blocks, scales = {}, {}
        for part in ("unet", "vae"):
            modules = dict(getattr(m, part).named_modules())
            rows = rec["M_" + part]
            blocks[part] = {}
            for layer in getattr(m, part + "_lora_layers"):
                match = [i for i, row in enumerate(rows) if torch.equal(row, modules[layer].de_mod[0])]
                assert len(match) == 1, (layer, match)
                blocks[part][layer] = match[0]
                scales[part] = next(iter(modules[layer].scaling.values()))
        with torch.no_grad():
            weights = {}
            for key, (part, layer) in EXAMPLES.items():
                weights["weight_" + key] = effective_weight(getattr(m, part).get_submodule(layer))

    rec.update(weights, x0_cfg1=results[1.0]["x0"], image_cfg1=results[1.0]["image"])
    arrays = {k: v.detach().float().numpy() for k, v in rec.items()}
    if len(order) > 2:  # one pair per tile, and the last would stand for all
        arrays = {k: v for k, v in arrays.items() if k not in ("noise_pred_positive", "noise_pred_negative")}
    arrays["output"] = output
    np.savez_compressed(out / f"{a.name}.npz", **arrays)
    import diffusers
    import peft

    json.dump(
        dict(
            seed=seed,
            arch=a.arch,
            unet=arch["unet"],
            vae=arch["vae"],
            scheduler=SCHED,
            size=[H, W],
            low_size=[H // 4, W // 4],
            padded_size=list(arrays["picture"].shape[-2:]),
            latent_tile=[tile, overlap],
            rank_unet=a.rank_unet,
            rank_vae=a.rank_vae,
            scale_unet=scales["unet"],
            scale_vae=scales["vae"],
            de_net_feats=feats,
            timestep=999,
            cfg=1.07,
            positive_prompt=parsed.pos_prompt,
            negative_prompt=parsed.neg_prompt,
            prompt_embeds="gaussian(seed, 'prompt_embeds', (1, 77, cross_attention_dim)), and 'negative_prompt_embeds'",
            posterior_sample="gaussian(seed, 'vae_posterior', shape)",
            weights={k: f"{p}.{l}" for k, (p, l) in EXAMPLES.items()},
            blocks=blocks,
            versions=dict(torch=torch.__version__, diffusers=diffusers.__version__, peft=peft.__version__),
        ),
        open(out / f"{a.name}.json", "w"),
        indent=1,
    )
    print("unet calls:", order)
    for k, v in arrays.items():
        print(f"{k:22}", v.shape, v.dtype, f"mean {v.mean():.4f} std {v.std():.4f}", bool(np.isfinite(v).all()))
    for f in (adapter, estimator, out / f"{a.name}.npz", out / f"{a.name}.json"):
        print(f.name, f.stat().st_size)


main()
