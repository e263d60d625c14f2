"""Every template in a real ComfyUI server, from a real photo to a saved picture."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import extra_models
import numpy as np
import pytest
import tagger_toys
import torch
from comfy_server import Server, execution_errors, to_prompt
from conftest import ROOT
from PIL import Image
from server_folder import RENAMED, fill, load, photo

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
RELEASED = sorted((ROOT / "tests" / "fixtures" / "workflows").glob("*/*.json"))


def start(comfy, base: Path, size: str) -> Server:
    fill(base, size)
    server = Server(comfy.path, base)
    extra_models.write_video(base / "input" / "video.mp4", frames())
    return server


def frames() -> torch.Tensor:
    """Three pictures of 50 x 36, each a pixel further to the right."""
    picture = torch.from_numpy(np.asarray(photo())[:36].copy()) / 255
    return torch.stack([picture.roll(i, dims=1) for i in range(3)])


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    with start(comfy, tmp_path_factory.mktemp("comfyui"), "reduced") as running:
        yield running


def run(server: Server, workflow: dict) -> dict[str, list[dict]]:
    """Run a workflow as the page saved it. Returns what its nodes showed or saved, by node class and in the nodes' order."""
    prompt = to_prompt(workflow, server.schemas)
    outputs = server.run(prompt)["outputs"]
    by_class = defaultdict(list)
    for node in sorted(outputs, key=lambda name: [int(part) for part in name.split(":")]):
        by_class[prompt[node]["class_type"]].append(outputs[node])
    return by_class


def check_saved(server: Server, outputs: dict[str, list[dict]], size: tuple[int, int] = (200, 148)) -> list[bytes]:
    """The saved pictures have this size and are not constant. Returns their pixels."""
    pictures = [saved for output in outputs["SaveImage"] for saved in output["images"]]
    assert pictures and all(saved["type"] == "output" and saved["filename"].endswith(".png") for saved in pictures)
    pictures = [server.image(saved).convert("RGB") for saved in pictures]
    assert [picture.size for picture in pictures] == [size] * len(pictures)
    assert all(min(high - low for low, high in picture.getextrema()) > 50 for picture in pictures)
    return [picture.tobytes() for picture in pictures]


def test_pack_is_there(server, comfy):
    assert "(IMPORT FAILED)" not in server.log  # a pack; core says it of its own files without the brackets
    info = server.get("/object_info")
    for node_id in ("OSEDiffLoader", "InvSRStartState", "FewStepScheduler"):
        assert info[node_id]["python_module"] == "custom_nodes.ComfyUI-FewStepSR"
    assert info["OSEDiffLoader"]["input"]["required"]["osediff_name"][1]["options"] == ["osediff.pkl"]
    for node_id in info:
        if info[node_id]["python_module"] == "custom_nodes.ComfyUI-FewStepSR":
            for page in (f"{node_id}.md", f"{node_id}/zh.md", f"{node_id}/ja.md"):
                assert server.get(f"/extensions/ComfyUI-FewStepSR/docs/{page}").startswith(b"# ")
    templates = server.get("/workflow_templates")["ComfyUI-FewStepSR"]
    assert templates == sorted(w.stem for w in WORKFLOWS)  # the page shows them in this order
    for workflow in WORKFLOWS:
        assert workflow.with_suffix(".jpg").is_file()
        assert server.get(f"/api/workflow_templates/ComfyUI-FewStepSR/{quote(workflow.name)}")["version"] == 0.4
    for old, new in RENAMED.items():
        assert server.get(f"/api/workflow_templates/ComfyUI-FewStepSR/{old}.json") == load(new)
        assert server.get(f"/api/workflow_templates/ComfyUI-FewStepSR/{old}.jpg").startswith(b"\xff\xd8")


PHOTO_X4 = [
    "osediff_x4",
    "osediff_x4_tagged",
    "invsr_x4",
    "large_picture_tiled",
    "osediff_lora_controlnet",
    "gan_then_osediff",
    "fidelity_and_detail",
    "s3diff_x4",
    "PiSA-SR x4, step by step",
]


ONE_PHOTO = [f"2 Restore one photo ({method})" for method in ("OSEDiff", "PiSA-SR", "HYPIR", "S3Diff", "InvSR")]


@pytest.mark.parametrize("name", PHOTO_X4)
def test_template(server, name):
    outputs = run(server, load(name))
    check_saved(server, outputs)
    if name == "osediff_x4_tagged":
        assert outputs["DAPETagger"] == [{"text": [", ".join(tagger_toys.NAMES[:8])]}]
    if name == "s3diff_x4":
        [estimated], [acting] = outputs["S3DiffDegradation"], outputs["S3DiffAdapt"]
        assert estimated == acting and re.fullmatch(r"blur [01]\.\d{3}, noise [01]\.\d{3}", estimated["text"][0])
    if "InvSRStartState" in outputs:
        check_noise_map(server, outputs, (25 * 13, 19 * 13))
    assert len(outputs["ImageCompare"]) == sum(node["type"] == "ImageCompare" for node in load(name)["nodes"])
    for comparison in outputs["ImageCompare"]:
        a, b = (server.image(comparison[side][0]) for side in ("a_images", "b_images"))
        assert a.size == b.size == (200, 148) and a.tobytes() != b.tobytes()


def check_noise_map(server, outputs, size):
    for output in outputs["InvSRStartState"]:
        [noise_map] = output["images"]
        assert noise_map["type"] == "temp" and server.image(noise_map).size == size


def test_template_invsr_1_to_5_steps(server):
    """The server runs what five branches share once; every number of steps gives another picture."""
    pictures = check_saved(server, run(server, load("invsr_1_to_5_steps")))
    assert len(pictures) == len(set(pictures)) == 5


def test_template_hypir(server):
    workflow = load("hypir_x4")
    [decode] = [n for n in workflow["nodes"] if n["type"] == "FewStepSRVAEDecode"]
    assert decode["widgets_values_named"] == {"tile_size": 0, "clamp": False}
    check_saved(server, run(server, workflow))


def of_one_node(name: str, longest_side: int) -> dict:
    """A template of blueprints with this longest side of the result; of 1024 pixels as it is saved, which take minutes here."""
    workflow = load(name)
    for node in workflow["nodes"]:
        names = [widget for _, widget in node["properties"].get("proxyWidgets", [])]
        if "largest_size" in names:
            assert node["widgets_values"][names.index("largest_size")] == 1024
            node["widgets_values"][names.index("largest_size")] = longest_side
    return workflow


def test_templates_that_compare(server):
    """Every method's and every control's picture is another."""
    for workflow, results in ((of_one_node("all_methods_x4", 200), 5), (load("pisasr_fidelity_and_detail"), 3)):
        pictures = check_saved(server, run(server, workflow))
        assert len(pictures) == len(set(pictures)) == results


@pytest.mark.parametrize("name", ONE_PHOTO)
def test_templates_of_one_photo(server, name):
    """A photo above the limit is shrunk to it, one below is not; the slider has the same picture upscaled only, in the result's size."""
    outputs = run(server, of_one_node(name, 200))
    check_saved(server, outputs)
    [comparison] = outputs["ImageCompare"]
    before, after = (server.image(comparison[side][0]) for side in ("a_images", "b_images"))
    expected = photo().resize((200, 148), Image.Resampling.BICUBIC)
    assert before.size == after.size == (200, 148) and before.tobytes() != after.tobytes()
    assert np.corrcoef(np.asarray(before.convert("RGB")).ravel(), np.asarray(expected).ravel())[0, 1] > 0.99

    workflow = of_one_node(name, 200)
    [node] = [n for n in workflow["nodes"] if "proxyWidgets" in n["properties"]]
    names = [widget for _, widget in node["properties"]["proxyWidgets"]]
    assert node["widgets_values"][names.index("value")] == 512
    node["widgets_values"][names.index("value")] = 25  # half of the photo's
    [smaller] = run(server, workflow)["ImageCompare"]
    blurred = server.image(smaller["a_images"][0])
    detail = [np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).mean() for image in (before, blurred)]
    assert detail[1] < 0.9 * detail[0]


def test_template_text_to_image(server):
    workflow = load("text_to_image_invsr_x4")
    [canvas] = [n for n in workflow["nodes"] if n["type"] == "EmptyLatentImage"]
    assert canvas["widgets_values"] == [512, 512, 1]
    canvas["widgets_values"] = [64, 64, 1]  # 2048 pixels take minutes here
    outputs = run(server, workflow)
    check_saved(server, outputs, (256, 256))
    check_noise_map(server, outputs, (256, 256))


def test_template_video(server):
    import av

    [output] = run(server, load("video_osediff_x2"))["SaveVideo"]
    [saved] = output["images"]
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        assert video.streams.video[0].average_rate == 8
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(72, 100, 3)] * 3
    assert all(picture.std() > 10 for picture in pictures)


@pytest.mark.parametrize("template", ["try_osediff", "try_invsr"])
def test_templates_of_the_miniature(server, template):
    """The result is like the enlarged photo, which random weights would not give, and not the enlarged photo itself."""
    outputs = run(server, load(template))
    [restored] = check_saved(server, outputs, (448, 300))
    [enlarged] = [server.image(output["a_images"][0]).convert("RGB") for output in outputs["ImageCompare"]]
    a, b = (np.frombuffer(pixels, np.uint8).astype(float) for pixels in (restored, enlarged.tobytes()))
    assert np.corrcoef(a, b)[0, 1] > 0.9
    assert np.abs(a - b).mean() > 3


def outside_and_inside(server, comparison: dict, inside: np.ndarray) -> list[float]:
    """How much the slider's two pictures differ outside and inside a mask, in 8-bit steps."""
    a, b = (np.asarray(server.image(comparison[side][0]).convert("RGB"), float) for side in ("a_images", "b_images"))
    return [np.abs(a - b)[region].mean() for region in (~inside, inside)]


def test_template_region(server):
    """Outside the mask the photo is upscaled only, to the last digit; well inside it is restored."""
    masked = np.asarray(photo().convert("RGBA")).copy()
    masked[:, 25:, 3] = 0  # the page saves a painted mask as alpha
    Image.fromarray(masked).save(server.base / "input" / "masked.png")
    workflow = of_one_node("Only a region, by mask (OSEDiff)", 200)
    for kind, value in (("LoadImage", "masked.png"), ("GrowMask", 0)):
        [node] = [n for n in workflow["nodes"] if n["type"] == kind]
        node["widgets_values"][0] = value
    outputs = run(server, workflow)
    check_saved(server, outputs)
    inside = np.zeros((148, 200), bool)
    inside[:, 140:] = True  # the edge at 100 is soft, 8 pixels of the mask or 32 of the result
    outside = np.zeros((148, 200), bool)
    outside[:, :60] = True
    [comparison] = outputs["ImageCompare"]
    assert outside_and_inside(server, comparison, ~outside)[0] == 0 and outside_and_inside(server, comparison, inside)[1] > 3


def test_template_face(server):
    """Only the crop changes, and its middle most."""
    workflow = of_one_node("A face, cropped, restored, pasted back (OSEDiff)", 160)
    for node, value in zip([n for n in workflow["nodes"] if n["type"] == "PrimitiveInt"], (10, 5, 20), strict=True):
        node["widgets_values"][0] = value
    [feather] = [n for n in workflow["nodes"] if n["type"] == "FeatherMask"]
    feather["widgets_values"] = [4] * 4
    outputs = run(server, workflow)
    check_saved(server, outputs, (50, 37))
    inside = np.zeros((37, 50), bool)
    inside[5:25, 10:30] = True
    outside, changed = outside_and_inside(server, outputs["ImageCompare"][0], inside)
    assert outside == 0 and changed > 3


def test_template_cutout(server):
    """A cut-out stays one: the file's green, hidden under alpha 0, is nowhere to be seen."""
    hidden = np.asarray(photo().convert("RGBA")).copy()
    y, x = np.linspace(-1, 1, hidden.shape[0])[:, None], np.linspace(-1, 1, hidden.shape[1])
    hidden[..., 3] = np.clip((0.8 - np.hypot(x, y)) * 2000, 0, 255)
    hidden[hidden[..., 3] == 0, :3] = (0, 255, 0)
    Image.fromarray(hidden).save(server.base / "input" / "cutout.png")
    workflow = load("cutout_osediff_x4")
    [source] = [n for n in workflow["nodes"] if n["type"] == "LoadImage"]
    source["widgets_values"][0] = "cutout.png"
    [output] = run(server, workflow)["SaveImage"]
    saved = server.image(output["images"][0])
    assert saved.mode == "RGBA" and saved.size == (200, 148)
    alpha = np.asarray(saved)[..., 3]
    expected = np.asarray(Image.fromarray(hidden[..., 3]).resize((200, 148), Image.Resampling.BILINEAR))
    assert np.abs(alpha.astype(int) - expected).mean() < 3 and alpha.min() == 0 and alpha.max() == 255


SERVICE = ROOT / "docs" / "service"


def test_service_client(server, tmp_path):
    """docs/service.md: the client restores a picture, tells of the nodes as they run, and repeats a node's own words where one fails."""
    photo().save(tmp_path / "cat.png")
    words = [sys.executable, SERVICE / "client.py", tmp_path / "cat.png", tmp_path / "cat_x4.png", "--server", server.url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "cat_x4.png").size == (200, 148)
    lines = done.stdout.splitlines()
    assert lines.index("OSEDiffOneStep") < lines.index("SaveImage") and lines[-1] == f"{tmp_path / 'cat_x4.png'} written"
    assert any(re.fullmatch(r"  \d+ of \d+", line) for line in lines)
    workflow = json.loads((SERVICE / "osediff.json").read_text())
    workflow["step"]["inputs"]["timestep"] = -5
    (tmp_path / "wrong.json").write_text(json.dumps(workflow))
    refused = subprocess.run([*words, "--workflow", tmp_path / "wrong.json"], capture_output=True, text=True, timeout=600)
    assert refused.returncode == 1 and "timestep" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "x4.png"], "none.png: there is no such file."),
        (["cat.png", "none/x4.png"], "none: there is no such folder. Create it first."),
        (["cat.png", "x4.png", "--workflow", "none.json"], "none.json: there is no such file."),
        (["cat.png", "x4.png", "--workflow", "page.json"], "page.json: found no workflow in API format."),
        (["cat.png", "x4.png", "--workflow", "cat.png"], "cat.png: found no workflow in API format."),
        (["cat.png", "x4.png", "--server", "http://127.0.0.1:PORT"], "http://127.0.0.1:PORT: no server answers ("),
        (["cat.png", "x4.png", "--server", "127.0.0.1"], "127.0.0.1: found no ComfyUI there ("),
    ],
)
def test_service_client_ends_with_a_sentence(tmp_path, words, message):
    """Where its picture, its folder, its workflow or its server is not there."""
    photo().save(tmp_path / "cat.png")
    (tmp_path / "page.json").write_text('{"nodes": [], "links": []}')  # as the page saves it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        words = [word.replace("PORT", str(free.getsockname()[1])) for word in words]
        message = message.replace("PORT", str(free.getsockname()[1]))
        ended = subprocess.run([sys.executable, SERVICE / "client.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.startswith(message) and "Traceback" not in ended.stderr
    assert not (tmp_path / "x4.png").exists()


def test_service_curl(server):
    """docs/service.md: the command as it stands there, at this server's port."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    [command] = re.findall(r"^curl .*$", (ROOT / "docs" / "service.md").read_text(), re.MULTILINE)
    command = command.replace("http://127.0.0.1:8188", server.url)
    answer = json.loads(subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout)
    entry = server._wait(answer["prompt_id"], 600)
    assert entry["status"]["status_str"] == "success", execution_errors(entry)
    [image] = entry["outputs"]["save"]["images"]
    assert server.image(image).size == (200, 148)


def test_a_clip_in_groups(server):
    """docs/service.md: Trim Video hands on a part alone, and the parts have all three frames."""
    import av

    prompt = to_prompt(load("video_osediff_x2"), server.schemas)
    [components] = [node for node in prompt.values() if node["class_type"] == "GetVideoComponents"]
    prompt["trim"] = {"class_type": "Video Slice", "inputs": {"video": components["inputs"]["video"], "strict_duration": False}}
    components["inputs"]["video"] = ["trim", 0]
    numbers = []
    for start in (0.0, 0.25):
        prompt["trim"]["inputs"] |= {"start_time": start, "duration": 0.25}
        outputs = server.run(prompt)["outputs"]
        [saved] = [image for output in outputs.values() for image in output.get("images", []) if image["filename"].endswith(".mp4")]
        with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
            numbers.append(sum(1 for _ in video.decode(video=0)))
    assert numbers == [2, 1]


def test_template_long_video(server):
    """The node's file is Save Video's, packet for packet."""
    import av

    output = run(server, load("Long video x2 (OSEDiff)"))["SaveVideo"]
    [saved] = output[0]["images"]
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        packets = [bytes(packet) for packet in video.demux(video=0) if packet.size]
        assert video.streams.video[0].average_rate == 8 and (video.streams.video[0].width, video.streams.video[0].height) == (100, 72)
    [made] = (server.base / "temp").glob("fewstepsr_*.mp4")
    with av.open(str(made)) as video:
        assert [bytes(packet) for packet in video.demux(video=0) if packet.size] == packets and len(packets) == 3


def test_every_template_is_run():
    compared = {"pisasr_fidelity_and_detail", "all_methods_x4"}
    run_here = {
        *PHOTO_X4,
        *ONE_PHOTO,
        *compared,
        "hypir_x4",
        "cutout_osediff_x4",
        "Only a region, by mask (OSEDiff)",
        "A face, cropped, restored, pasted back (OSEDiff)",
        "invsr_1_to_5_steps",
        "text_to_image_invsr_x4",
        "video_osediff_x2",
        "Long video x2 (OSEDiff)",
        "try_osediff",
        "try_invsr",
    }
    assert {RENAMED.get(name, name) for name in run_here} == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", RELEASED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_released_workflow(server, path):
    """What users saved with an earlier version still runs."""
    check_saved(server, run(server, json.loads(path.read_text())))


def test_a_wrong_file_is_named_to_the_user(server):
    (server.base / "models" / "osediff" / "page.pkl").write_text("<!DOCTYPE html><html>sign in</html>")
    prompt = to_prompt(load("osediff_x4"), server.schemas)
    [loader] = [n for n in prompt.values() if n["class_type"] == "OSEDiffLoader"]
    loader["inputs"]["osediff_name"] = "page.pkl"
    with pytest.raises(AssertionError, match=r"page\.pkl: this is a web page saved under a weight file's name"):
        server.run(prompt)


@pytest.mark.skipif(not os.environ.get("FEWSTEP_SR_FULL"), reason="4 GB of weights and several minutes: set FEWSTEP_SR_FULL=1")
def test_full_size_architecture(comfy, tmp_path):
    """Every method on SD 2.1's own shape, with files of the released layouts and ranks."""
    with start(comfy, tmp_path, "full") as server:
        results = []
        for name in ("osediff_x4", "osediff_x4_tagged", "invsr_x4", "PiSA-SR x4, step by step", "hypir_x4", "s3diff_x4"):
            results += check_saved(server, run(server, load(name)))
        assert len(set(results)) == len(results)
