"""``verify``: the miniature gives the figures that came with the package, whatever differs is found and said, and nodes are compared where ComfyUI is."""

import json
import os
import shutil
from pathlib import Path
from urllib.error import URLError

import pipeline_toys
import pytest
import stable_diffusion
import torch
import toys
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import GOLDEN

from fewstep_sr.image.quality import compare
from fewstep_sr.methods import METHODS
from fewstep_sr.miniature import PHOTO
from fewstep_sr.miniature import find as find_miniature
from pipelines import HYPIRPipeline, OSEDiffPipeline, pipeline_class
from pipelines.cli import main
from pipelines.evaluation import by_nodes, in_comfyui, verify
from pipelines.evaluation.stages import error_of_fingerprint, fingerprint, recorded, relative_error
from pipelines.evaluation.subjects import Run, Subject
from pipelines.pictures import read_pixels
from pipelines.settings import Settings
from pipelines.single_file import CONFIG, find_tokenizer

STAGES = {
    "osediff": ["latent", "noise prediction 1", "restored latent", "decoded", "image"],
    "invsr": ["latent", "start state", "noise map", "noise prediction 1", "restored latent", "decoded", "image"],
}


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.png"
    Image.open(find_miniature(PHOTO)).crop((40, 20, 64, 36)).save(path)
    return path


def run(tmp_path: Path, *words, output="verify.json", status=0) -> dict:
    assert main(["verify", "--device", "cpu", "--no-golden", "--json", str(tmp_path / output), *map(str, words)]) == status
    return json.loads((tmp_path / output).read_text())


def test_fingerprints_tell_tensors_apart():
    tensor = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    assert error_of_fingerprint(fingerprint(tensor), fingerprint(tensor)) == 0
    assert error_of_fingerprint(fingerprint(tensor * 1.01), fingerprint(tensor)) == pytest.approx(0.01, rel=1e-3)
    assert error_of_fingerprint(fingerprint(tensor[..., :6]), fingerprint(tensor)) is None
    broken = tensor.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert error_of_fingerprint(fingerprint(broken), fingerprint(tensor)) is None and relative_error(broken, tensor) is None


@pytest.mark.slow
def test_the_miniature_here_and_elsewhere(tmp_path, small, capsys):
    """A first report is the reference of a second; where a stage of it is changed, that stage is named and the status says so."""
    first = run(tmp_path, "--demo", "--picture", small)
    assert first["ok"] and [check["method"] for check in first["checks"]] == ["osediff", "invsr"] and first["half"] == "bfloat16"
    for check in first["checks"]:
        assert set(check["fingerprints"]) == set(STAGES[check["method"]])
        assert set(check["runs"]) == {"pipeline float32", "pipeline bfloat16"}
        seconds = check["runs"]["pipeline float32"]["seconds"]
        assert set(STAGES[check["method"]]) - {"restored latent"} < set(seconds) and seconds["all"] > 0
        half = check["errors"]["pipeline bfloat16 against pipeline float32"]
        assert all(0 < half[stage] < 0.2 for stage in ("latent", "restored latent", "image"))
        assert all(len(digest) == 64 for digest in check["weights"].values())
        assert any("no reference figures" in note for note in check["notes"]) and any("no ComfyUI was named" in note for note in check["notes"])
    text = capsys.readouterr().out
    assert "Nothing was found wrong." in text and "restored latent" in text

    changed = json.loads((tmp_path / "verify.json").read_text())
    changed["checks"][1]["fingerprints"]["start state"]["values"][3] += 1.0
    (tmp_path / "other.json").write_text(json.dumps(changed))
    second = run(tmp_path, "--demo", "--picture", small, "--reference", tmp_path / "other.json", output="second.json", status=1)
    against = [check["errors"]["pipeline float32 against reference figures"] for check in second["checks"]]
    assert max(against[0].values()) < 1e-5
    (fault,) = second["faults"]
    assert fault.startswith("InvSR on the miniature: pipeline float32 against reference figures: start state has a relative error of")


@pytest.mark.slow
def test_reference_figures_came_with_the_package(tmp_path):
    """Of the miniature's own photo. ``FEWSTEP_SR_FREEZE=1`` writes them anew where the miniature has changed."""
    report = run(tmp_path, "--demo")
    if os.environ.get("FEWSTEP_SR_FREEZE"):
        known = {check["key"]: check["fingerprints"] for check in report["checks"]}
        verify.REFERENCE.write_text(json.dumps({"report": verify.NAME, "fingerprints": known}) + "\n")
        report = run(tmp_path, "--demo")
    for check in report["checks"]:
        errors = check["errors"]["pipeline float32 against reference figures"]
        assert set(errors) == set(STAGES[check["method"]]) and max(errors.values()) < verify.TOLERANCE


@pytest.mark.slow
def test_nodes_beside_pipelines(comfyui_path, tmp_path, small):
    report = run(tmp_path, "--demo", "--picture", small, "--comfyui", comfyui_path)
    for check in report["checks"]:
        exact = check["errors"]["nodes float32 against pipeline float32"]
        assert {"latent", "restored latent", "decoded", "image"} <= set(exact) and max(exact.values()) < 1e-4
        half = check["errors"]["nodes bfloat16 against pipeline float32"]
        assert all(1e-4 < half[stage] < 0.2 for stage in ("latent", "restored latent"))
        assert check["runs"]["nodes float32"]["comfyui"]


class TextOf:
    """In the place of core's CLIPTextEncode: the golden cases' embeddings of a method's two prompts."""

    define_schema = None

    @staticmethod
    def execute(clip, text):
        return (toys.conditioning(2, "negative_prompt_embeds" if text and text == clip.negative_prompt else "prompt_embeds"),)


@pytest.mark.parametrize("key", ["hypir", *(pytest.param(key, marks=pytest.mark.slow) for key in ("pisasr", "s3diff"))])
def test_nodes_of_the_family(comfy, tmp_path, monkeypatch, key):
    """What the script in ComfyUI's process does with small networks, in this one: each stage is the pipeline's."""
    method, (weights, estimator) = METHODS[key], (tmp_path / f"{key}.pkl", GOLDEN / "s3diff_square_de_net.pth")
    if key == "s3diff":
        shutil.copy(GOLDEN / "s3diff_square.pkl", weights)
    else:
        torch.save(toys.adapter_checkpoint(toys.golden(f"{key}_square")[0]), weights)
    options = {option.name: option.default for option in method.options} | ({"pixel": 0.5} if key == "pisasr" else {})
    settings = Settings((), None, method, options, cfg=method.cfg, color_fix=method.color_fix, tile=0)
    pipeline = pipeline_class(method)(**pipeline_toys.components(2))
    pipeline.load_weights(weights)
    pipeline.prepare(options | ({"estimator": estimator} if key == "s3diff" else {}))
    image = toys.picture(1, 12, 10).movedim(-1, 1)
    texts = {"prompt_embeds": toys.conditioning(2)[0][0]}
    if key == "s3diff":
        texts["negative_prompt_embeds"] = toys.conditioning(2, "negative_prompt_embeds")[0][0]
    with recorded(pipeline, torch.device("cpu")) as stages:
        call = {"guidance_scale": method.cfg, "color_fix": method.color_fix, "output_type": "pt", **pipeline.call_options(options), **texts}
        stages.tensors["image"] = pipeline(image, **call).images
    (tmp_path / "base.safetensors").touch()
    companions = {"estimator": estimator} if key == "s3diff" else {}
    subject = Subject(settings, torch.device("cpu"), str(tmp_path / "base.safetensors"), str(weights), companions)
    request = subject.request(Run(stages, 0.0, 0.0, None), None)

    import folder_paths

    class Base:
        define_schema = None

        @staticmethod
        def execute(ckpt_name):
            return toys.comfy_model(2), method, toys.comfy_vae(2)

    classes = {**comfy.nodes, "CheckpointLoaderSimple": Base, "CLIPTextEncode": TextOf}
    monkeypatch.setattr(in_comfyui, "load", lambda *_: (classes, folder_paths))
    torch.save(image, tmp_path / "image.pt")
    whole = {"comfyui": "", "pack": "", "flags": [], "image": str(tmp_path / "image.pt"), "output": str(tmp_path / "stages.safetensors")}
    in_comfyui.main(request | whole)
    found = load_file(tmp_path / "stages.safetensors")
    assert set(found) == {"latent", "restored latent", "decoded", "image"} | ({"degradation"} if key == "s3diff" else set())
    assert all(relative_error(found[stage], stages.tensors[stage]) < 1e-4 for stage in found)


@pytest.fixture(scope="module")
def reduced(comfy, tmp_path_factory) -> Path:
    """Stable Diffusion 2.x' architecture with fewer levels and random weights: as one file for the nodes, as a folder for the pipelines, and all methods' weights."""
    folder = tmp_path_factory.mktemp("reduced")
    stable_diffusion.write_checkpoint(folder / "base.safetensors", "reduced")
    weights = load_file(folder / "base.safetensors")
    for name in ("weight", "bias"):  # random decoders overshoot by half of the range and more, trained ones by little
        weights[f"first_stage_model.decoder.conv_out.{name}"] *= 0.25
    save_file(weights, folder / "base.safetensors")
    stable_diffusion.write_osediff(folder / "osediff.pkl", "reduced")
    stable_diffusion.write_predictor(folder / "predictor.pth", "reduced")
    stable_diffusion.write_adapter(folder / "pisa_sr.pkl", "pisasr", "reduced")
    stable_diffusion.write_adapter(folder / "HYPIR_sd2.pth", "hypir", "reduced")
    stable_diffusion.write_s3diff(folder, "reduced")
    config = shutil.copytree(CONFIG, folder / "config")
    unet = json.loads((config / "unet" / "config.json").read_text())
    unet |= {"block_out_channels": [320, 640], "attention_head_dim": [5, 10], "layers_per_block": 1}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    (config / "unet" / "config.json").write_text(json.dumps(unet))
    tokenizer = find_tokenizer(local_files_only=True, comfyui=comfy.path)
    OSEDiffPipeline.from_single_file(folder / "base.safetensors", config=config, tokenizer=tokenizer, torch_dtype=torch.float16).save_pretrained(
        folder / "base"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "weights", "options"),
    [
        ("osediff", "osediff.pkl", []),
        ("invsr", "predictor.pth", []),
        ("pisasr", "pisa_sr.pkl", ["--pixel", "0.5", "--semantic", "1.5"]),
        ("hypir", "HYPIR_sd2.pth", ["--coeff-t", "150"]),
        ("s3diff", "s3diff.pkl", ["--noise", "0.3"]),
    ],
)
def test_stable_diffusion_with_fewer_levels(comfy, reduced, tmp_path, capsys, method, weights, options):
    """As with published weights: nodes give what pipelines give, and that nobody has figures of these weights yet is said."""
    path = tmp_path / "small.png"
    Image.open(find_miniature(PHOTO)).crop((40, 20, 52, 28)).save(path)
    words = ["--method", method, "--base", reduced / "base", "--weights", reduced / weights, "--checkpoint", reduced / "base.safetensors"]
    words += ["--estimator", reduced / "de_net.pth"] if method == "s3diff" else []
    report = run(tmp_path, *words, *options, "--comfyui", comfy.path, "--picture", path)
    check = report["checks"][-1]
    assert check["title"].endswith("on base") and weights in check["weights"]
    exact = check["errors"]["nodes float32 against pipeline float32"]
    assert {"latent", "restored latent", "image"} <= set(exact) and max(exact.values()) < 1e-4
    assert ("degradation" in exact) == (method == "s3diff")
    assert any("no reference figures of these weights" in note for note in check["notes"])
    assert "relative error, nodes float32 against pipeline float32" in capsys.readouterr().out


@pytest.mark.slow
def test_the_authors_outputs(monkeypatch):
    """Counted where they agree, a fault with pytest's words where they do not."""
    monkeypatch.setattr(verify, "GOLDEN_TESTS", ("tests/methods/test_family.py",))
    assert " passed" in verify._golden()["result"]
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing_of_this_name")
    found = verify._golden()
    assert found["faults"] == [f"the pipelines differ from the authors' outputs: {found['result']}"] and "deselected" in found["output"]


def test_an_installation_has_no_authors_outputs(monkeypatch):
    monkeypatch.setattr(verify, "GOLDEN_TESTS", ("tests/nowhere.py",))
    assert "this is an installation" in verify._golden()["note"]


def test_the_authors_outputs_are_all_there():
    root = Path(__file__).resolve().parents[2]
    found = {path.name for pattern in verify.GOLDEN_TESTS for path in root.glob(pattern)}
    assert found == {"test_light_decoders.py", *(path.name for path in (root / "tests" / "pipelines").glob("*golden.py"))} and len(found) >= 4


def test_missing_weights_are_said(tmp_path, monkeypatch, small, capsys):
    """Without the miniature's half there is nothing: the message of the file that is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert main(["verify", "--method", "pisasr", "--device", "cpu"]) == 2
    assert f"({METHODS['pisasr'].weights.names[0]})" in (error := capsys.readouterr().err) or METHODS["pisasr"].base.what in error


@pytest.mark.slow
def test_downloads_without_a_connection(tmp_path, monkeypatch, small):
    """Each file is named with its page, whether the hub or another server does not answer, and the miniature is verified all the same."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def unreachable(error: OSError):
        def fetch(*_):
            raise error

        return fetch

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable(URLError("Name or service not known")))
    monkeypatch.setattr("pipelines.find.hf_hub_download", unreachable(LocalEntryNotFoundError("An error happened while trying to locate the file")))
    monkeypatch.setattr("pipelines.find.try_to_load_from_cache", lambda *_: None)
    for method, error in (("osediff", "Name or service not known"), ("invsr", "trying to locate the file")):
        report = run(tmp_path, "--method", method, "--download", "--picture", small, output=f"{method}.json")
        (missing,), source = report["missing"], METHODS[method].weights
        assert f"({source.names[0]}) could not be fetched from {source.page}: " in missing and error in missing and "--weights" in missing
        assert report["ok"] and [check["method"] for check in report["checks"]] == [method]


@pytest.fixture
def two_pairs(tmp_path, monkeypatch) -> Path:
    """A benchmark in the current folder, where there are no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    for folder, side in (("test_LR", 8), ("test_HR", 32)):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(2):
            Image.fromarray((toys.picture(i, side, side)[0] * 255).byte().numpy()).save(tmp_path / "data" / folder / f"p{i}.png")
    return Path("data")


@pytest.fixture
def stages_left_out(monkeypatch):
    """What is about the benchmark alone needs no stages."""
    monkeypatch.setattr(verify, "_check", lambda subject, *_: verify.Checked(subject, "key"))


def test_the_miniature_on_a_benchmark(tmp_path, stages_left_out, two_pairs):
    """With --demo, where nothing else is asked for. An image that fails is a fault."""
    (two_pairs / "test_LR" / "p1.png").write_bytes(b"no image")
    report = run(tmp_path, "--demo", "--method", "osediff", "--data", two_pairs, status=1)
    (check,) = report["checks"]
    assert check["benchmark"]["mean"]["psnr"] > 5 and list(check["benchmark"]["failed"]) == ["p1"]
    assert report["faults"] == ["OSEDiff on the miniature: of the benchmark's 2 images 1 failed, p1 first"]
    assert (tmp_path / "results_osediff_demo" / "p0.png").is_file()


def test_a_benchmark_that_fails_costs_no_report(tmp_path, stages_left_out, two_pairs):
    for path in (two_pairs / "test_LR").iterdir():
        path.write_bytes(b"no image")
    (fault,) = run(tmp_path, "--demo", "--method", "osediff", "--data", two_pairs, status=1)["faults"]
    assert fault.startswith("OSEDiff on the miniature: the benchmark fails: no image could be measured")


def test_a_benchmark_without_any_weights_is_said(tmp_path, stages_left_out, two_pairs, capsys):
    report = run(tmp_path, "--method", "osediff", "--data", two_pairs)
    assert report["missing"][-1] == "the methods on data: no weights were found. --demo measures the miniature on it."
    assert f"Not verified: {report['missing'][-1]}" in capsys.readouterr().out and not list(tmp_path.glob("results_*"))


@pytest.mark.slow
def test_a_benchmark(tmp_path, two_pairs, small):
    """Methods on weights that were found, the miniature apart, restore the whole folder; the figures are evaluate's own."""
    HYPIRPipeline(**pipeline_toys.components(2, tmp_path / "tokenizer")).save_pretrained(tmp_path / "base")
    torch.save(toys.adapter_checkpoint(toys.golden("hypir_square")[0]), tmp_path / "hypir.pth")
    words = ["--method", "hypir", "--base", tmp_path / "base", "--weights", tmp_path / "hypir.pth"]
    (check,) = run(tmp_path, *words, "--data", two_pairs, "--picture", small)["checks"]
    written = [read_pixels(tmp_path / "results_hypir" / f"p{i}.png").tensor() for i in range(2)]
    originals = [read_pixels(tmp_path / "data" / "test_HR" / f"p{i}.png").tensor() for i in range(2)]
    expected = sum(compare(*pair)["psnr"].item() for pair in zip(written, originals, strict=True)) / 2
    assert check["benchmark"]["mean"]["psnr"] == pytest.approx(expected, abs=1e-3) and check["benchmark"]["failed"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "x"], "--method: found none with --base or --weights"),
        (["--checkpoint", "nowhere.safetensors", "--demo"], "--checkpoint: there is no file"),
        (["--demo", "--method", "pisasr"], "--demo: the miniature has no weights for PiSA-SR"),
        (["--demo", "--reference", "README.md"], "is no report of verify"),
        (["--demo", "--device", "warp"], "--device: found 'warp'"),
        (["--demo", "--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--demo", "--data", "docs"], "--data: found no originals in docs, expected test_LR and test_HR"),
        (["--demo", "--json", "README.md/verify.json"], "a file is where a folder is needed"),
    ],
)
def test_what_cannot_be_begun(monkeypatch, capsys, words, message):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_comfyui_that_fails_is_a_fault_in_words(tmp_path):
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("")
    with pytest.raises(RuntimeError, match=r"the nodes failed in ComfyUI: .*comfy"):
        by_nodes.run_nodes(comfyui, torch.zeros(1, 3, 8, 8), {}, torch.device("cpu"), "float32")
