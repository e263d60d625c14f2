"""What a server that runs for long is asked for: files written over, odd frames, values of broken workflows, and many runs.

``FEWSTEP_SR_SOAK=1000 python -m pytest tests/app/test_runs_again.py -k soak -s`` runs the miniature that often and samples the server's memory.
"""

import json
import os
import shutil
from pathlib import Path

import extra_models
import numpy as np
import pytest
import torch
from comfy_server import Server
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server_folder import photo

RUNS = int(os.environ.get("FEWSTEP_SR_SOAK", "0"))


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("again")
    for folder in ("models/osediff", "input"):
        (base / folder).mkdir(parents=True)
    shutil.copy(ROOT / "miniature" / "osediff.safetensors", base / "models" / "osediff" / "mine.safetensors")
    photo().resize((40, 30)).save(base / "input" / "a.png")
    extra_models.write_video(base / "input" / "v.mp4", torch.rand(2, 24, 36, 3, generator=torch.Generator().manual_seed(1)))
    with Server(comfy.path, base) as running:
        yield running


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def osediff(image: list, scale: float) -> dict:
    """From an image to the decoded result ``["x", 0]``, on the miniature with the adapter of the models folder."""
    return {
        "d": node("FewStepSRDemoLoader", method="InvSR"),
        "l": node("OSEDiffLoader", model=["d", 0], vae=["d", 1], osediff_name="mine.safetensors", strength_model=1.0, strength_vae=0.0),
        "u": node("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=scale),
        "e": node("FewStepSRVAEEncode", pixels=["u", 0], vae=["l", 1], posterior="mean", seed=0, tile_size=0),
        "o": node("OSEDiffOneStep", model=["l", 0], positive=["d", 2], latent=["e", 0], cfg=1.0, timestep=249),
        "x": node("FewStepSRVAEDecode", samples=["o", 0], vae=["l", 1], tile_size=0),
    }


def still(prefix: str) -> dict:
    return {"i": node("LoadImage", image="a.png"), **osediff(["i", 0], 2.0), "s": node("SaveImage", images=["x", 0], filename_prefix=prefix)}


def pixels(server, entry) -> np.ndarray:
    return np.asarray(server.image(entry["outputs"]["s"]["images"][0]).convert("RGB")).astype(int)


def cached(entry) -> set[str]:
    """Nodes that a run took from the one before."""
    return {node for kind, content in entry["status"]["messages"] if kind == "execution_cached" for node in content["nodes"]}


def test_an_adapter_written_over_is_read_again_and_only_then(server):
    file = server.base / "models" / "osediff" / "mine.safetensors"
    first = server.run(still("first"))
    again = server.run(still("again"))
    assert {"l", "e", "o", "x"} <= cached(again)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = {key: weight * 3 if "lora_B" in key else weight.clone() for key, weight in load_file(file).items()}
    save_file(weights, file, metadata)
    changed = server.run(still("changed"))
    assert "d" in cached(changed) and not {"l", "o"} & cached(changed)
    assert np.abs(pixels(server, changed) - pixels(server, first)).mean() > 1


def test_odd_frames_are_refused_before_they_are_restored(server):
    def video(scale: float) -> dict:
        ends = {
            "w": node("CreateVideo", images=["x", 0], fps=["g", 2]),
            "s": node("SaveVideo", video=["w", 0], filename_prefix="v", format="mp4", codec="h264"),
        }
        return {"i": node("LoadVideo", file="v.mp4"), "g": node("GetVideoComponents", video=["i", 0]), **osediff(["g", 0], scale), **ends}

    blamed, words = server.mistake(video(1.25))
    assert blamed == "FewStepSRVAEEncode" and words.startswith("pixels: found frames of 45 x 30 pixels for Create Video, expected even sides")
    server.run(video(1.5))


@pytest.mark.parametrize("value", [700, None, ["l", 5], {"a": 1}, "\ud83d", "x" * 1_000_000, float("nan")], ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize(("where", "name"), [("l", "osediff_name"), ("l", "strength_model"), ("o", "cfg")])
def test_broken_workflows_are_answered_briefly(server, value, where, name):
    prompt = still("broken")
    prompt[where]["inputs"][name] = value
    blamed, words = server.mistake(prompt)
    assert isinstance(blamed, str) and words
    if (where, name) == ("l", "osediff_name") and isinstance(value, str):
        assert "expected" in words and len(words) < 2000
    if value != value:  # NaN
        assert name in words and "found nan" in words
    assert "Traceback (most recent call last)" not in words
    server.run(still("well"))


def resident(server) -> float:
    """MiB of memory that the server has."""
    [line] = [line for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not RUNS, reason="many runs: set FEWSTEP_SR_SOAK to how many (1000 for a release)")
def test_soak(server):
    """Pictures of changing sizes through both methods: memory settles, and nothing fails."""
    samples = []
    for i in range(RUNS):
        prompt = still(f"soak{i % 3}")
        prompt["u"]["inputs"]["scale_by"] = 1.0 + (i % 7) * 0.25
        prompt["o"]["inputs"]["cfg"] = 1.0
        prompt["e"]["inputs"] |= {"posterior": "sample", "seed": i}
        server.run(prompt)
        samples.append(resident(server))
    warm = samples[len(samples) // 5 :]
    growth = (np.mean(warm[-len(warm) // 4 :]) - np.mean(warm[: len(warm) // 4])) / max(1, len(warm)) * 1000
    print(json.dumps({"runs": RUNS, "MiB": [round(s) for s in samples[:: max(1, RUNS // 20)]], "MiB per 1000 runs": round(float(growth), 1)}))
    assert max(warm) - min(warm) < 200, samples
