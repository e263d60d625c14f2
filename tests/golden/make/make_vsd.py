"""Golden values of OSEDiff's variational score distillation loss and of the regulariser's diffusion loss (float32, CPU).

usage: python make_vsd.py OSEDIFF_CHECKOUT OUT_DIR [--seed N] [--name NAME]
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

ap = argparse.ArgumentParser()
ap.add_argument("reference")
ap.add_argument("out")
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--name", default="vsd")
a = ap.parse_args()
sys.path.insert(0, a.reference)
sys.path.insert(0, str(HERE))
os.chdir(a.reference)
import osediff as ref
from diffusers import DDPMScheduler

UNET = dict(
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
)
SCHED = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="epsilon",
    steps_offset=1,
)


def fill(m, prefix, only=None):
    sd = m.state_dict()
    m.load_state_dict(
        {k: torch.from_numpy(P.weight(a.seed, f"{prefix}.{k}", tuple(v.shape))) for k, v in sd.items() if only is None or only(k)},
        strict=only is None,
    )


with tempfile.TemporaryDirectory() as tmp:
    base = ref.UNet2DConditionModel(**UNET)
    fill(base, "unet")
    base.save_pretrained(tmp + "/unet")
    args = types.SimpleNamespace(pretrained_model_name_or_path=tmp, lora_rank=4, cfg_vsd=7.5)
    upd = ref.initialize_unet(args)[0]
    fill(upd, "regulariser.unet", only=lambda k: "lora" in k)
    r = ref.OSEDiff_reg.__new__(ref.OSEDiff_reg)
    torch.nn.Module.__init__(r)
    r.noise_scheduler = DDPMScheduler(**SCHED)
    r.weight_dtype = torch.float32
    r.unet_fix = base.eval()
    r.unet_update = upd.eval()
lat = torch.from_numpy(P.gaussian(a.seed, "vsd_latents", (2, 4, 8, 8))).requires_grad_(True)
pos = torch.from_numpy(P.gaussian(a.seed, "prompt_embeds", (2, 77, 64)))
neg = torch.from_numpy(P.gaussian(a.seed, "negative_prompt_embeds", (2, 77, 64)))
t_vsd, t_diff = torch.tensor([137, 803]), torch.tensor([411, 42])
noise = [P.gaussian(a.seed, "vsd_noise", (2, 4, 8, 8)), P.gaussian(a.seed, "diff_noise", (2, 4, 8, 8))]
randint, randn_like = torch.randint, torch.randn_like
torch.randint = lambda *x, **k: t_vsd
torch.randn_like = lambda x, **k: torch.from_numpy(noise[0])
loss = r.distribution_matching_loss(lat, pos, neg, args)
(grad,) = torch.autograd.grad(loss, lat)
torch.randint = lambda *x, **k: t_diff
torch.randn_like = lambda x, **k: torch.from_numpy(noise[1])
diff = r.diff_loss(lat, pos, args)
out = Path(a.out)
np.savez_compressed(out / f"{a.name}.npz", vsd_loss=loss.detach().numpy(), vsd_grad=grad.numpy(), diff_loss=diff.detach().numpy())
json.dump(
    dict(
        seed=a.seed,
        unet=UNET,
        scheduler=SCHED,
        lora_rank=4,
        cfg=7.5,
        vsd_timesteps=t_vsd.tolist(),
        diff_timesteps=t_diff.tolist(),
        latents="gaussian(seed, 'vsd_latents', (2, 4, 8, 8))",
        noise="gaussian(seed, 'vsd_noise' / 'diff_noise', (2, 4, 8, 8))",
        prompts="gaussian(seed, 'prompt_embeds' / 'negative_prompt_embeds', (2, 77, 64))",
        weights="unet.<key> for the frozen UNet and for the base of the updated one; regulariser.unet.<key> for the updated one's LoRA keys alone (conv_in not replaced)",
    ),
    open(out / f"{a.name}.json", "w"),
    indent=1,
)
print(float(loss), float(diff), grad.abs().mean())
