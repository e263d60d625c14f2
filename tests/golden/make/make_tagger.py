"""Golden outputs of the RAM tagger with DAPE's LoRA weights, on procedural weights (float32, CPU).

usage: python make_tagger.py REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--res R]
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


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("reference")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name", default="tagger")
    ap.add_argument("--res", type=int, default=96)
    a = ap.parse_args()
    sys.path.insert(0, a.reference)
    os.chdir(a.reference)
    import ram.models.ram_lora as R

    class Tok:
        def __call__(self, p):
            return type("X", (), {"input_ids": [0, 1, 2, 3]})()

        def __len__(self):
            return 30524

    R.init_tokenizer = lambda: Tok()
    swin = dict(ckpt="", vision_width=192, image_res=a.res, window_size=3, embed_dim=24, depths=[1, 1, 2, 1], num_heads=[2, 2, 4, 8])
    rj = R.read_json
    R.read_json = lambda p: swin if "swin" in str(p) else rj(p)
    n0 = R.BertConfig.from_json_file

    def small(p):
        c = n0(p)
        if "q2l" in str(p) or "med" in str(p):
            c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size, c.num_attention_heads = 64, 128, 2, 40, 4
        return c

    R.BertConfig.from_json_file = staticmethod(small)

    # the class reads the configuration that is named 384, then asserts that its size is image_size: the one number is both
    class Small(int):
        def __eq__(self, o):
            return o in (384, a.res)

        __hash__ = int.__hash__

    m = R.RAMLora(image_size=Small(a.res), vit="swin_l").eval()

    def keep(k):
        return not any(s in k for s in ("relative_position_index", "attn_mask", "lora_ind", "text_decoder", "tag_encoder"))

    sd = {k: v for k, v in m.state_dict().items() if keep(k)}

    def w(k, v):
        if k == "label_embed":
            return torch.from_numpy(P.gaussian(a.seed, k, tuple(v.shape)))
        if k.endswith(".lora_B"):
            return 0.3 * torch.from_numpy(P.gaussian(a.seed, "tagger." + k, tuple(v.shape)))
        if k.endswith("relative_position_bias_table"):
            return torch.from_numpy(P.gaussian(a.seed, "tagger." + k, tuple(v.shape)))
        return torch.from_numpy(P.weight(a.seed, "tagger." + k, tuple(v.shape)))

    new = {k: w(k, v) for k, v in sd.items()}
    ram = {k: v for k, v in new.items() if "lora_" not in k}
    dape = {k: v for k, v in new.items() if "lora_" in k}
    print({k: tuple(v.shape) for k, v in dape.items() if k.startswith(("visual_encoder.layers.0", "tagging_head"))})
    img = torch.from_numpy(P.image(a.seed, a.res, a.res)).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(v)[None, :, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (img - mean) / std
    out = {}
    rec = {}
    fc0 = m.fc.forward

    def fc(h):
        rec["logits"] = fc0(h)
        return rec["logits"]

    m.fc.forward = fc
    for name, weights in (("ram", ram), ("dape", {**ram, **dape})):
        zero = {k: torch.zeros_like(v) for k, v in dape.items()}
        m.train()
        m.load_state_dict({**zero, **weights}, strict=False)
        m.eval()
        with torch.no_grad():
            out[name + "_image_embeds"] = m.image_proj(m.visual_encoder(x)).numpy()
            tags, _ = m.generate_tag(x)
            out[name + "_logits"] = rec["logits"].squeeze(-1).detach().numpy()
            out[name + "_tags"] = np.array(tags)
    dest = Path(a.out)
    dest.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(dest / f"{a.name}.npz", **out)
    torch.save({"model": ram}, dest / f"{a.name}_ram.pth")
    torch.save(dape, dest / f"{a.name}_dape.pth")
    json.dump(
        dict(
            seed=a.seed,
            swin={**swin, "patch_size": 4, "mlp_ratio": 4.0, "qkv_bias": True},
            head=dict(
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=4,
                num_hidden_layers=2,
                encoder_width=512,
                layer_norm_eps=1e-12,
                hidden_act="gelu",
            ),
            num_tags=int(m.num_class),
            image=f"procedural.image(seed, {a.res}, {a.res}) normalised with the ImageNet mean and standard deviation",
            files=f"{a.name}_ram.pth: the base weights under 'model'; {a.name}_dape.pth: the LoRA weights alone",
        ),
        open(dest / f"{a.name}.json", "w"),
        indent=1,
    )
    for k, v in out.items():
        print(k, v.shape, (float(v.mean()), float(v.std())) if v.dtype.kind == "f" else v[0][:200])
    print(float(np.abs(out["ram_logits"] - out["dape_logits"]).max()))


main()
