"""The example workflows in a real ComfyUI server, from a real photo to a saved picture four times larger."""

import json
import os
from pathlib import Path

import pytest
import stable_diffusion
import tagger_toys
from comfy_server import Server, to_prompt
from conftest import ROOT

PHOTO = Path(__file__).parent / "data" / "chelsea.png"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def write_models(models: Path, size: str) -> None:
    """Files under the names that the example workflows ask for."""
    for folder in ("checkpoints", "osediff", "invsr", "dape"):
        (models / folder).mkdir(parents=True)
    base = models / "checkpoints" / "v2-1_512-ema-pruned.safetensors"
    stable_diffusion.write_checkpoint(base, size)
    (models / "checkpoints" / "sd_turbo.safetensors").symlink_to(base)
    stable_diffusion.write_osediff(models / "osediff" / "osediff.pkl", size)
    stable_diffusion.write_predictor(models / "invsr" / "noise_predictor_sd_turbo_v5.pth", size)
    # A small tagger that always finds its first eight tags.
    tagger_toys.write_ram(models / "dape", thresholds=[0.0 if i < 8 else 2.0 for i in range(len(tagger_toys.NAMES))])


def start(comfy, base: Path, size: str) -> Server:
    write_models(base / "models", size)
    server = Server(comfy.path, base)
    server.put_input(PHOTO, "example.png")
    return server


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    with start(comfy, tmp_path_factory.mktemp("comfyui"), "reduced") as running:
        yield running


def check_workflow(server: Server, workflow: dict) -> dict:
    """Run a saved workflow; the saved picture is four times the photo's size and not constant. Returns the outputs by class."""
    from PIL import Image

    prompt = to_prompt(workflow, server.get("/object_info"))
    outputs = server.run(prompt)["outputs"]
    by_class = {prompt[node]["class_type"]: output for node, output in outputs.items()}
    [saved] = by_class["SaveImage"]["images"]
    assert saved["type"] == "output" and saved["filename"].endswith(".png")
    picture, photo = server.image(saved), Image.open(PHOTO)
    assert picture.size == (4 * photo.width, 4 * photo.height)
    assert min(high - low for low, high in picture.convert("RGB").getextrema()) > 50
    return by_class


def test_pack_is_there(server, comfy):
    assert "IMPORT FAILED" not in server.log
    info = server.get("/object_info")
    for node_id in ("OSEDiffLoader", "InvSRStartState", "FewStepScheduler"):
        assert info[node_id]["python_module"] == "custom_nodes.ComfyUI-FewStepSR"
    assert info["OSEDiffLoader"]["input"]["required"]["osediff_name"][1]["options"] == ["osediff.pkl"]
    for node_id in info:
        if info[node_id]["python_module"] == "custom_nodes.ComfyUI-FewStepSR":
            for page in (f"{node_id}.md", f"{node_id}/zh.md"):
                assert server.get(f"/extensions/ComfyUI-FewStepSR/docs/{page}").startswith(b"# ")
    templates = server.get("/workflow_templates")["ComfyUI-FewStepSR"]
    assert set(templates) == {w.stem for w in WORKFLOWS}
    for workflow in WORKFLOWS:
        assert workflow.with_suffix(".jpg").is_file()
        assert server.get(f"/api/workflow_templates/ComfyUI-FewStepSR/{workflow.name}")["version"] == 0.4


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_example_workflow(server, path):
    outputs = check_workflow(server, json.loads(path.read_text()))
    if "tagged" in path.stem:
        assert outputs["DAPETagger"]["text"] == [", ".join(tagger_toys.NAMES[:8])]
    if "invsr" in path.stem:
        [noise_map] = outputs["InvSRStartState"]["images"]
        assert noise_map["type"] == "temp" and server.image(noise_map).size == (50 * 6, 38 * 6)


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_invsr_steps(server, steps):
    workflow = json.loads((ROOT / "example_workflows" / "invsr_x4.json").read_text())
    [scheduler] = [n for n in workflow["nodes"] if n["type"] == "FewStepScheduler"]
    scheduler["widgets_values"][1] = steps
    check_workflow(server, workflow)


def test_a_wrong_file_is_named_to_the_user(server):
    (server.base / "models" / "osediff" / "page.pkl").write_text("<!DOCTYPE html><html>sign in</html>")
    workflow = json.loads((ROOT / "example_workflows" / "osediff_x4.json").read_text())
    prompt = to_prompt(workflow, server.get("/object_info"))
    [loader] = [n for n in prompt.values() if n["class_type"] == "OSEDiffLoader"]
    loader["inputs"]["osediff_name"] = "page.pkl"
    with pytest.raises(AssertionError, match=r"page\.pkl: this is a web page saved under a weight file's name"):
        server.run(prompt)


@pytest.mark.skipif(not os.environ.get("FEWSTEP_SR_FULL"), reason="2.6 GB of weights and several minutes: set FEWSTEP_SR_FULL=1")
def test_full_size_architecture(comfy, tmp_path):
    with start(comfy, tmp_path, "full") as server:
        for path in WORKFLOWS:
            check_workflow(server, json.loads(path.read_text()))
