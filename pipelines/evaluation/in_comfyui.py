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

    def keep(name: str, output, began: float) -> None:
        tensor = output["samples"] * SCALING_FACTOR if isinstance(output, dict) else output
        stages[name] = tensor.detach().float().cpu().contiguous()
        seconds[name] = time.perf_counter() - began

    def file(kind: str, path: str, before: str = "") -> str:
        folders.add_model_folder_path(kind, str(Path(path).parent))
        return before + Path(path).name

    def run_all(calls: list[dict], found: dict) -> float:
        """Gives when the last stage ended, or this began."""
        began = time.perf_counter()
        for call in calls:
            inputs = call.get("inputs", {}) | {name: found[taken] for name, taken in call.get("takes", {}).items()}
            outputs = run(call["node"], **inputs, **{name: file(*place) for name, place in call.get("files", {}).items()})
            found |= zip(call["gives"], outputs, strict=True)
            if "stage" in call:
                stage, output = call["stage"]
                keep(stage, found[output], began)
                began = time.perf_counter()
        return began

    def pad(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        pack = classes["FewStepSRVAEEncode"].__module__.removesuffix(".nodes.vae")
        sizes = importlib.import_module(".fewstep_sr.image.sizes", pack)
        return sizes.reflect_pad(pixels.movedim(-1, 1), height, width).movedim(1, -1)

    image = torch.load(request["image"], weights_only=True).movedim(1, -1)  # BCHW -> BHWC
    with torch.inference_mode():
        found = {"image": image, "negative": None}
        if request["demo"]:
            given = run("FewStepSRDemoLoader", method=request["title"])
            found |= zip(("model", "vae", "positive", "noise_predictor"), given, strict=False)
        else:
            found["model"], clip, found["vae"] = run("CheckpointLoaderSimple", ckpt_name=file("checkpoints", request["base"]))[:3]
            for text, name in (("prompt", "positive"), ("negative_prompt", "negative")):
                (found[name],) = run("CLIPTextEncode", clip=clip, text=request[text])
        run_all(request["nodes_before"], found)
        vae = found["vae"]
        (enlarged,) = run("ImageScaleBy", image=image, upscale_method=request["upsampling"], scale_by=request["scale"])
        began = time.perf_counter()
        pixels = pad(enlarged, *request["canvas"]) if request["canvas"] else enlarged
        (found["latent"],) = run("FewStepSRVAEEncode", pixels=pixels, vae=vae, seed=request["seed"])
        keep("latent", found["latent"], began)
        began = run_all(request["nodes_after"], found)
        keep("restored latent", found["restored"], began)
        began = time.perf_counter()
        (decoded,) = run("FewStepSRVAEDecode", samples=found["restored"], vae=vae, clamp=request["clamp"])
        decoded = decoded[:, : enlarged.shape[1], : enlarged.shape[2]]
        keep("decoded", decoded.movedim(-1, 1), began)
        began = time.perf_counter()
        result = decoded
        if request["color_fix"]:
            reference = image if request["color_reference"] == "image" else enlarged
            (result,) = run("FewStepSRColorFix", image=decoded, reference=reference, method=request["color_fix"])
        keep("image", result.movedim(-1, 1), began)
    version = importlib.import_module("comfyui_version").__version__
    # A stage may be another one's tensor, and safetensors wants each to have its own memory.
    save_file({name: stage.clone() for name, stage in stages.items()}, request["output"], {"seconds": json.dumps(seconds), "comfyui": version})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
