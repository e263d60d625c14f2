"""The same stages by the nodes: a script for a process of its own, in which ComfyUI loads the pack as it always does.

``python in_comfyui.py REQUEST`` reads a request of JSON and writes the stages as safetensors. It imports nothing of this package.
"""

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SCALING_FACTOR = 0.18215


def load(comfyui: str, pack: str, flags: list[str]):
    """Start ComfyUI with these flags of its command line, without its server. Gives its ``nodes`` module."""
    sys.path[0] = comfyui  # in place of this script's folder, whose names would hide others
    sys.argv = [str(Path(comfyui, "main.py")), *flags]
    importlib.import_module("comfy.options").enable_args_parsing()
    nodes = importlib.import_module("nodes")  # ComfyUI's

    async def load_nodes() -> None:
        await nodes.init_public_apis()
        if not await nodes.load_custom_node(pack, module_parent="custom_nodes"):
            raise RuntimeError(f"the pack in {pack} did not load")
        await nodes.load_custom_node(str(Path(comfyui, "comfy_extras", "nodes_custom_sampler.py")), module_parent="comfy_extras")

    folders = importlib.import_module("folder_paths")
    asyncio.run(load_nodes())
    return nodes.NODE_CLASS_MAPPINGS, folders


def main(request: dict) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    classes, folders = load(request["comfyui"], request["pack"], request["flags"])
    stages, seconds = {}, {}

    def run(node_id: str, **inputs):
        node = classes[node_id]
        result = node.execute(**inputs) if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)(**inputs)
        return getattr(result, "args", result)

    def keep(name: str, tensor: torch.Tensor, began: float) -> None:
        stages[name] = tensor.detach().float().cpu().contiguous()
        seconds[name] = time.perf_counter() - began

    def file(kind: str, path: str) -> str:
        folders.add_model_folder_path(kind, str(Path(path).parent))
        return Path(path).name

    def pad(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        pack = classes["FewStepSRVAEEncode"].__module__.removesuffix(".nodes.vae")
        sizes = importlib.import_module(".fewstep_sr.image.sizes", pack)
        return sizes.reflect_pad(pixels.movedim(-1, 1), height, width).movedim(1, -1)

    image = torch.load(request["image"], weights_only=True).movedim(1, -1)  # BCHW -> BHWC
    with torch.inference_mode():
        predictor = negative = None
        if request["demo"]:
            model, vae, positive, predictor, _ = run("FewStepSRDemoLoader", method=request["title"])
        else:
            model, clip, vae = run("CheckpointLoaderSimple", ckpt_name=file("checkpoints", request["base"]))[:3]
            positive, negative = (run("CLIPTextEncode", clip=clip, text=request[text])[0] for text in ("prompt", "negative_prompt"))
            weights = file(request["method"], request["weights"])
            if request["method"] == "osediff":
                model, vae = run("OSEDiffLoader", model=model, vae=vae, osediff_name=weights)
            elif request["method"] == "invsr":
                (predictor,) = run("InvSRNoisePredictorLoader", noise_predictor_name=weights)
            else:
                model, vae = run("FewStepSRAdapterLoader", model=model, vae=vae, adapter_name=f"{request['method']}/{weights}")
        found = {"model": model, "vae": vae, "image": image}
        for call in request["node_calls"]:
            inputs = call.get("inputs", {}) | {name: found[taken] for name, taken in call.get("takes", {}).items()}
            began = time.perf_counter()
            outputs = run(call["node"], **inputs, **{name: file(*place) for name, place in call.get("files", {}).items()})
            if stage := call.get("stage"):
                keep(stage, outputs[0], began)
            found |= zip(call["gives"], outputs, strict=True)
        model, vae = found["model"], found["vae"]
        (enlarged,) = run("ImageScaleBy", image=image, upscale_method=request["upsampling"], scale_by=request["scale"])
        began = time.perf_counter()
        pixels = pad(enlarged, *request["canvas"]) if request["canvas"] else enlarged
        (latent,) = run("FewStepSRVAEEncode", pixels=pixels, vae=vae, seed=request["seed"])
        keep("latent", latent["samples"] * SCALING_FACTOR, began)
        began = time.perf_counter()
        if request["method"] == "osediff":
            (restored,) = run("OSEDiffOneStep", model=model, positive=positive, latent=latent, timestep=request["timestep"])
        elif request["method"] == "invsr":
            (sigmas,) = run("FewStepScheduler", model=model, method="InvSR", steps=request["steps"], timesteps=request["timesteps"])
            noise, state = run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, seed=request["seed"])
            keep("start state", state["samples"] * SCALING_FACTOR, began)
            began = time.perf_counter()
            (guider,) = run("BasicGuider", model=model, conditioning=positive)
            (sampler,) = run("KSamplerSelect", sampler_name="euler")
            restored = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
        else:
            inputs = {"positive": positive, "negative": negative, "latent": latent, "cfg": request["cfg"], **request["controls"]}
            (restored,) = run("FewStepSROneStep", model=model, **inputs)
        keep("restored latent", restored["samples"] * SCALING_FACTOR, began)
        began = time.perf_counter()
        (decoded,) = run("FewStepSRVAEDecode", samples=restored, vae=vae, clamp=request["clamp"])
        decoded = decoded[:, : enlarged.shape[1], : enlarged.shape[2]]
        keep("decoded", decoded.movedim(-1, 1), began)
        began = time.perf_counter()
        result = decoded
        if request["color_fix"]:
            reference = image if request["method"] == "invsr" else enlarged
            (result,) = run("FewStepSRColorFix", image=decoded, reference=reference, method=request["color_fix"])
        keep("image", result.movedim(-1, 1), began)
    version = importlib.import_module("comfyui_version").__version__
    # A stage may be another one's tensor, and safetensors wants each to have its own memory.
    save_file({name: stage.clone() for name, stage in stages.items()}, request["output"], {"seconds": json.dumps(seconds), "comfyui": version})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
