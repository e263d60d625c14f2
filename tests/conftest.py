"""Where ComfyUI is, and how tests get at it.

ComfyUI is looked for in COMFYUI_PATH, then in the ``custom_nodes`` folder that this checkout lies in, then in ~/comfy/ComfyUI.
"""

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # which torch reads when it is imported: a forked process would wait for this one's other threads
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "weights"), str(ROOT / "tests")]


def find_comfyui() -> Path | None:
    candidates = [os.environ.get("COMFYUI_PATH"), ROOT.parent.parent if ROOT.parent.name == "custom_nodes" else None, "~/comfy/ComfyUI"]
    for candidate in candidates:
        if candidate and (Path(candidate).expanduser() / "main.py").is_file():
            return Path(candidate).expanduser().resolve()
        if candidate and candidate == os.environ.get("COMFYUI_PATH"):
            raise RuntimeError(f"COMFYUI_PATH is {candidate}, but there is no main.py in it.")
    return None


COMFYUI = find_comfyui()


def pytest_report_header() -> str:
    return f"ComfyUI: {COMFYUI or 'not found; the tests that need it are skipped (set COMFYUI_PATH)'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs ComfyUI, a server of it or a browser by the fixtures that it asks for; other ``slow`` marks stand at the tests themselves."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"comfy", "comfyui_path"}:
            item.add_marker(pytest.mark.comfy)
        if fixtures & {"server", "new_server"}:
            item.add_marker(pytest.mark.slow)
        if "browser" in fixtures:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session", autouse=True)
def processes_may_be_forked():
    """Autograd starts a thread for each device at its first backward pass, and processes that are forked from then on cannot take one.

    PyTorch's fake tensors register a CUDA device that is not there. A first pass before them finds none, and starts nothing for good.
    """
    import torch

    torch.ones(1, requires_grad=True).backward()


@pytest.fixture(autouse=True)
def the_same_on_all_processors(monkeypatch):
    """Nothing here is measured to be faster than float32 in the plain format, which ``upscale`` then takes."""
    if "diffusers" in sys.modules:  # else no pipeline computes in this process
        from pipelines import processor

        monkeypatch.setattr(processor, "seconds_of_a_block", lambda *choice: 1.0)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    if COMFYUI is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH, or put it at ~/comfy/ComfyUI")
    return COMFYUI


EXTRAS = ("custom_sampler", "mask", "model_advanced", "latent", "rebatch", "model_merging", "compositing")
"""Core's own nodes that lie in files of their own, by the middle of the file's name."""


@pytest.fixture(scope="session")
def comfy(comfyui_path, tmp_path_factory):
    """A real ComfyUI in this process, on the CPU, with the pack loaded as ComfyUI loads it.

    ``comfy.nodes[id]`` runs a node class; ``comfy.run(id, **inputs)`` runs its execute and gives the NodeOutput.
    """
    import torch

    sys.path.insert(0, str(comfyui_path))  # before the checkout, whose `nodes` folder has the name of ComfyUI's module
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = None
    import folder_paths

    import nodes
    from fewstep_sr.methods import METHODS

    for kind in (*(method.weights.folder for method in METHODS.values()), "dape"):
        folder_paths.add_model_folder_path(kind, str(tmp_path_factory.mktemp(kind)), is_default=True)
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))

    async def load():
        await nodes.init_public_apis()
        assert await nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"), "the pack did not load; see the log"
        for extra in EXTRAS:
            assert await nodes.load_custom_node(str(comfyui_path / "comfy_extras" / f"nodes_{extra}.py"), module_parent="comfy_extras")

    asyncio.run(load())

    def run(node_id: str, **inputs):
        node = nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            if hasattr(node, "define_schema"):
                return node.execute(**inputs)
            return getattr(node(), node.FUNCTION)(**inputs)

    return SimpleNamespace(
        path=comfyui_path,
        nodes=nodes.NODE_CLASS_MAPPINGS,
        run=run,
        module=lambda name: sys.modules[str(ROOT).replace(".", "_x_") + name],
        folder=lambda kind: Path(folder_paths.get_folder_paths(kind)[0]),
    )
