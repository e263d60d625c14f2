"""Golden outputs of the half-width decoders of AdcSR and VOSR on procedural weights.

usage: python make_lightdecoder.py adcsr|vosr REFERENCE_CHECKOUT OUT_DIR [--seed N] [--name NAME] [--latent HxW] [--widths a,b,c,d] [--layers N]
``--widths`` 64,128,256,256 and ``--layers`` 2 are the published sizes. Float32, CPU. diffusers 0.32 for AdcSR, 0.35 for VOSR.

AdcSR's inference is a script and VOSR's loading is part of its main function, so the statements that read the file, build the decoder and
use it are taken from the reference's syntax trees and executed as they stand.
"""

import argparse
import ast
import importlib
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

VAE = dict(
    block_out_channels=(32, 64, 64, 64),
    layers_per_block=1,
    latent_channels=4,
    sample_size=64,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
SCALING = 0.18215


def fill(module, seed, prefix):
    module.load_state_dict({k: torch.from_numpy(P.weight(seed, f"{prefix}.{k}", tuple(v.shape))) for k, v in module.state_dict().items()})
    return module.eval()


def assigned(node):
    """The plain names that a statement binds or fills."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {
        t.value.id if isinstance(t, ast.Subscript) else t.id
        for t in targets
        if isinstance(t, (ast.Name, ast.Subscript)) and isinstance(getattr(t, "value", t), ast.Name)
    }


def execute(nodes, path, names):
    module = ast.Module(list(nodes), type_ignores=[])
    exec(compile(module, str(path), "exec"), names)


def adcsr(root, a, tmp, vae, latent):
    """``weight/pretrained/halfDecoder.ckpt`` as test.py reads it, and the decoder's first half as train.py uses it."""
    import diffusers.models.autoencoders.vae as module

    inner = module.Decoder
    module.Decoder = lambda **options: inner(**(options | dict(block_out_channels=a.widths, layers_per_block=a.layers)))
    shaped = fill(module.Decoder(in_channels=4, out_channels=3, up_block_types=["UpDecoderBlock2D"] * 4), a.seed, "lightdecoder")
    others = dict(
        encoder={"conv_in.weight": (32, 3, 3, 3), "conv_in.bias": (32,)},
        quant_conv={"weight": (8, 8, 1, 1), "bias": (8,)},
        post_quant_conv={"weight": (4, 4, 1, 1), "bias": (4,)},
        loss={"logvar": (1,)},
    )
    state = {f"{part}.{k}": torch.from_numpy(P.weight(a.seed, f"other.{part}.{k}", s)) for part in others for k, s in others[part].items()}
    state |= {"decoder." + k: v for k, v in shaped.state_dict().items()}
    file = a.out / f"{a.name}.ckpt"
    torch.save(
        {
            "epoch": 1,
            "global_step": 2,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": state,
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        },
        file,
    )
    (tmp / "weight/pretrained").mkdir(parents=True)
    (tmp / "weight/pretrained/halfDecoder.ckpt").symlink_to(file)
    os.chdir(tmp)

    names = {"torch": torch, "device": torch.device("cpu"), "vae": vae, "HR_latents": latent / SCALING}
    body = ast.parse((root / "test.py").read_text()).body
    start = next(i for i, n in enumerate(body) if isinstance(n, ast.ImportFrom) and any(x.name == "Decoder" for x in n.names))
    stop = next(i for i, n in enumerate(body) if "decoder.load_state_dict(" in ast.unparse(n))
    execute(body[start : stop + 1], root / "test.py", names)
    decoder = names["decoder"].eval()
    tree = ast.walk(ast.parse((root / "train.py").read_text()))
    execute(sorted((n for n in tree if "z0_gt" in assigned(n)), key=lambda n: n.lineno), root / "train.py", names)
    middle = names["z0_gt"]
    image = torch.nn.Sequential(*decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)(middle)
    assert torch.equal(image, decoder(vae.post_quant_conv(latent / SCALING)))
    return file, dict(middle=middle, image_unclamped=image, image=image.clamp(-1, 1), image_other=decoder(latent / SCALING)), shaped


def vosr(root, a, tmp, vae, latent):
    """``preset/ckpts/sd21_lwdecoder.pth`` as inference_vosr_onestep.py reads and uses it."""
    sys.path.insert(0, str(root))
    LightDecoder = importlib.import_module("models.light_decoder").LightDecoder
    config = dict(in_channels=4, out_channels=3, block_out_channels=list(a.widths), layers_per_block=a.layers)
    shaped = fill(LightDecoder(**config), a.seed, "lightdecoder")
    file = a.out / f"{a.name}.pth"
    torch.save({"config": config, "model_state_dict": shaped.state_dict()}, file)

    path = root / "inference_vosr_onestep.py"
    args = types.SimpleNamespace(ae_type="sd2")
    names = {"torch": torch, "args": args, "device": "cpu", "LightDecoder": LightDecoder, "SD2_LWDECODER_PATH": str(file)}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    execute([n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "_decode_latent"], path, names)
    execute(
        [
            n
            for n in nodes
            if isinstance(n, ast.If) and ast.unparse(n.test) == "args.ae_type == 'sd2'" and "light_decoder.load_state_dict" in ast.unparse(n)
        ],
        path,
        names,
    )
    decoder = names["light_decoder"]
    rec = {}
    decoder.mid_block.register_forward_hook(lambda _, args, result: rec.update(middle=result))
    decoder.register_forward_hook(lambda _, args, result: rec.update(image_unclamped=result))
    image = names["_decode_latent"](vae, latent, args, None, None, decoder)
    kept = rec | dict(image=image)  # the next call records over rec
    assert torch.equal(kept["image_unclamped"].clamp(-1, 1), image)
    return file, kept | dict(image_other=decoder(vae.post_quant_conv(latent / SCALING))), shaped


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("family", choices=["adcsr", "vosr"])
    ap.add_argument("reference", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--name")
    ap.add_argument("--latent", default="8x12")
    ap.add_argument("--widths", default="32,32,32,64")
    ap.add_argument("--layers", type=int, default=2)
    a = ap.parse_args()
    a.name = a.name or f"lightdecoder_{a.family}"
    a.widths = tuple(int(n) for n in a.widths.split(","))
    h, w = map(int, a.latent.split("x"))
    root, a.out = a.reference.resolve(), a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    import diffusers

    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        vae = fill(diffusers.AutoencoderKL(**VAE), a.seed, "vae")
        assert vae.config.scaling_factor == SCALING
        latent = torch.from_numpy(P.gaussian(a.seed, "latent", (1, 4, h, w)))
        file, rec, decoder = {"adcsr": adcsr, "vosr": vosr}[a.family](root, a, Path(tmp), vae, latent)
    arrays = {"latent": latent.numpy()} | {k: v.numpy() for k, v in rec.items()}
    wrong = np.linalg.norm(arrays["image_other"] - arrays["image_unclamped"]) / np.linalg.norm(arrays["image_unclamped"])
    del arrays["image_other"]
    np.savez_compressed(a.out / f"{a.name}.npz", **arrays)
    json.dump(
        dict(
            seed=a.seed,
            family=a.family,
            file=file.name,
            vae=VAE,
            scaling_factor=SCALING,
            post_quant_conv=a.family == "adcsr",
            widths=a.widths,
            layers_per_block=a.layers,
            parameters=sum(p.numel() for p in decoder.parameters()),
            latent="gaussian(seed, 'latent', (1, 4, h, w)), already times the scaling factor",
            base_vae="weight(seed, 'vae.<key>', shape)",
            decoder_weights="weight(seed, 'lightdecoder.<key>', shape)",
            difference_with_the_other_treatment_of_post_quant_conv=float(wrong),
            keys={k: list(v.shape) for k, v in decoder.state_dict().items()},
            versions=dict(torch=torch.__version__, diffusers=diffusers.__version__),
        ),
        open(a.out / f"{a.name}.json", "w"),
        indent=1,
    )
    for k, v in arrays.items():
        print(f"{k:16}", v.shape, f"mean {v.mean():.4f} std {v.std():.4f}", bool(np.isfinite(v).all()))
    print("the other treatment of post_quant_conv differs by", wrong)
    for f in (file, a.out / f"{a.name}.npz", a.out / f"{a.name}.json"):
        print(f.name, f.stat().st_size)


main()
