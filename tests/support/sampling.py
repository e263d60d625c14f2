"""Sampling with core's own nodes, on the toys or on a network that sees one cell."""

import torch
from toys import conditioning

SEED = 5
SIGMAS = torch.tensor([2.0, 0.7, 0.0])


def local(model):
    """The model with a network that sees one cell: whatever is cut along in the right place gives the whole picture's result.

    It answers with the latent, the text, and a ControlNet's first output where there is one.
    """
    patched = model.clone()
    calls = []

    def answer(apply_model, args):
        calls.append(args["input"].shape)
        x, c = args["input"], args["c"]
        hint = c["control"]["output"][0] if c.get("control") else 0
        boxes = sum(c["transformer_options"].get("patches", {}).get("middle_patch", []))
        return x.sin() + c["c_crossattn"].mean(dim=(1, 2))[:, None, None, None] * 10 + hint + boxes

    patched.set_model_unet_function_wrapper(answer)
    return patched, calls


def sample(comfy, model, positive, latent, negative=None, cfg=1.0, sigmas=SIGMAS):
    guider = comfy.run("CFGGuider", model=model, positive=positive, negative=negative or conditioning(SEED, "negative"), cfg=cfg)[0]
    noise = comfy.run("DisableNoise")[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]
    return comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image={"samples": latent})[0][
        "samples"
    ]


def tiled(comfy, model, tile_size=16, overlap=8, batch=4):
    return comfy.run("FewStepSRTiledModel", model=model, tile_size=tile_size, overlap=overlap, batch=batch)[0]


def with_options(cond, **options):
    return [[embedding, {**extra, **options}] for embedding, extra in cond]
