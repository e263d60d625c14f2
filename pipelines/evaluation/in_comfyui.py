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
    folders.add_model_folder_path("osediff", pack)
    folders.add_model_folder_path("invsr", pack)
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

    image = torch.load(request["image"], weights_only=True).movedim(1, -1)  # BCHW -> BHWC
    with torch.inference_mode():
        predictor = None
        if request["demo"]:
            model, vae, positive, predictor, _ = run("FewStepSRDemoLoader", method=request["title"])
        else:
            model, clip, vae = run("CheckpointLoaderSimple", ckpt_name=file("checkpoints", request["base"]))[:3]
            (positive,) = run("CLIPTextEncode", clip=clip, text=request["prompt"])
            if request["method"] == "osediff":
                model, vae = run("OSEDiffLoader", model=model, vae=vae, osediff_name=file("osediff", request["weights"]))
            else:
                (predictor,) = run("InvSRNoisePredictorLoader", noise_predictor_name=file("invsr", request["weights"]))
        (enlarged,) = run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=request["scale"])
        began = time.perf_counter()
        (latent,) = run("FewStepSRVAEEncode", pixels=enlarged, vae=vae, seed=request["seed"])
        keep("latent", latent["samples"] * SCALING_FACTOR, began)
        began = time.perf_counter()
        if request["method"] == "osediff":
            (restored,) = run("OSEDiffOneStep", model=model, positive=positive, latent=latent, timestep=request["timestep"])
        else:
            (sigmas,) = run("FewStepScheduler", model=model, method="InvSR", steps=request["steps"], timesteps=request["timesteps"])
            noise, state = run("InvSRStartState", noise_predictor=predictor, image=image, latent=latent, sigmas=sigmas, seed=request["seed"])
            keep("start state", state["samples"] * SCALING_FACTOR, began)
            began = time.perf_counter()
            (guider,) = run("BasicGuider", model=model, conditioning=positive)
            (sampler,) = run("KSamplerSelect", sampler_name="euler")
            restored = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]
        keep("restored latent", restored["samples"] * SCALING_FACTOR, began)
        began = time.perf_counter()
        (decoded,) = run("FewStepSRVAEDecode", samples=restored, vae=vae)
        keep("decoded", decoded.movedim(-1, 1), began)
        began = time.perf_counter()
        result = decoded
        if request["color_fix"]:
            (result,) = run(
                "FewStepSRColorFix", image=decoded, reference=enlarged if request["method"] == "osediff" else image, method=request["color_fix"]
            )
        keep("image", result.movedim(-1, 1), began)
    version = importlib.import_module("comfyui_version").__version__
    # A stage may be another one's tensor, and safetensors wants each to have its own memory.
    save_file({name: stage.clone() for name, stage in stages.items()}, request["output"], {"seconds": json.dumps(seconds), "comfyui": version})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
