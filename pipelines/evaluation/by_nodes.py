"""A picture through the nodes, in a ComfyUI in a process of its own: pipelines and nodes never import each other."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

SCRIPT = Path(__file__).with_name("in_comfyui.py")
_PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe", "../python_embeded/python.exe")
FLAGS = {
    "float32": ("--force-fp32", "--fp32-vae", "--fp32-text-enc"),
    "float16": ("--fp16-unet", "--fp16-vae"),
    "bfloat16": ("--bf16-unet", "--bf16-vae"),
}
"""Of ComfyUI's command line, for its networks in a precision."""


@dataclass(frozen=True)
class ByNodes:
    """The stages, their seconds, and ComfyUI's version."""

    tensors: dict[str, torch.Tensor]
    seconds: dict[str, float]
    comfyui: str


def find_pack(comfyui: Path) -> Path:
    """The pack's folder: in ComfyUI's custom_nodes, else the checkout that this file is in.

    Raises:
        FileNotFoundError: there is none.
    """
    checkout = Path(__file__).resolve().parents[2]
    for folder in [*sorted((comfyui / "custom_nodes").glob("*")), checkout]:
        if (folder / "nodes" / "osediff.py").is_file() and (folder / "fewstep_sr" / "methods").is_dir():
            return folder
    raise FileNotFoundError(f"--comfyui: the pack is not in {comfyui / 'custom_nodes'}. Install it there, or run this from a checkout.")


def python_of(comfyui: Path) -> str:
    """ComfyUI's own Python where it has one, else this one."""
    return next((str(comfyui / name) for name in _PYTHONS if (comfyui / name).is_file()), sys.executable)


def run_nodes(comfyui: Path, image: torch.Tensor, request: dict[str, Any], device: torch.device, dtype: str) -> ByNodes:
    """Run a picture (1, 3, H, W) through the nodes of a method.

    Args:
        request: what :meth:`pipelines.evaluation.subjects.Subject.request` says.
        dtype: a key of FLAGS.

    Raises:
        RuntimeError: the process failed; the message has its last words.
        FileNotFoundError: the pack is nowhere.
    """
    with TemporaryDirectory() as folder:
        torch.save(image, Path(folder, "image.pt"))
        output = Path(folder, "stages.safetensors")
        flags = [*FLAGS[dtype], *(["--cpu"] if device.type == "cpu" else []), "--base-directory", folder, "--disable-api-nodes"]
        flags += ["--cuda-device", str(device.index)] if device.type == "cuda" and device.index is not None else []
        whole = request | {
            "comfyui": str(comfyui.resolve()),
            "pack": str(find_pack(comfyui)),
            "flags": flags,
            "image": str(Path(folder, "image.pt")),
            "output": str(output),
        }
        Path(folder, "request.json").write_text(json.dumps(whole), encoding="utf-8")
        for kind in ("models", "input", "output", "temp", "user", "custom_nodes"):
            Path(folder, kind).mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python_of(comfyui), str(SCRIPT), str(Path(folder, "request.json"))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, cwd=comfyui)
        if done.returncode or not output.is_file():
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"the nodes failed in ComfyUI: {' | '.join(words[-3:])[-1000:] or f'exit status {done.returncode}'}")
        with safe_open(output, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return ByNodes(tensors, json.loads(metadata["seconds"]), metadata["comfyui"])
