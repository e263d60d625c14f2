"""ComfyUI-FewStepSR: few-step diffusion super-resolution as native ComfyUI nodes."""

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .fewstep_sr.methods import records
from .nodes import NODES
from .nodes.templates import list_in_order, serve_renamed

WEB_DIRECTORY = "./web"  # holds each node's help page, docs/<node id>.md

# An extra_model_paths.yaml is read before this, so that the user's folders stay first; a folder new to ComfyUI has no extensions yet.
for folder in dict.fromkeys([*(record.weights.folder for record in records()), "dape"]):
    folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
    folder_paths.folder_names_and_paths[folder][1].update({".pkl", ".pt", ".pth", ".safetensors"})

PACK = os.path.basename(os.path.dirname(os.path.abspath(__file__)))  # as ComfyUI names its templates
list_in_order(PACK)
serve_renamed(PACK)


class FewStepSRExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> FewStepSRExtension:
    return FewStepSRExtension()
