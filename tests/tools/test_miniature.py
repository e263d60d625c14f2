"""The miniature's workshop: synthetic pictures, the small VAE and UNet, packing, its commands; and that the product does without it."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from pipelines.cli import main as pipelines_main
from tools.miniature.autoencoder import AutoencoderTask, normalize_latents, small_vae
from tools.miniature.cli import main
from tools.miniature.synthetic import draw_picture


def test_a_seed_draws_one_picture():
    first, again, other = (np.asarray(draw_picture(48, seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 48, 3) and first.std() > 5
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_normalized_latents_have_deviation_one_and_reconstruct_the_same():
    torch.manual_seed(0)
    vae = small_vae().eval()
    torch.nn.init.normal_(vae.quant_conv.bias)
    pictures = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample
        normalize_latents(vae, pictures)
        posterior = vae.encode(pictures * 2 - 1).latent_dist
        latents = posterior.mean * vae.config.scaling_factor
        assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert (vae.decode(posterior.mode()).sample - before).norm() < 1e-3 * before.norm()


def test_decoder_only_leaves_the_encoder():
    vae = small_vae()
    task = AutoencoderTask(vae, torch.rand(1, 3, 32, 32), decoder_only=True)
    loss, _ = task.loss("autoencoder", {"hq": torch.rand(2, 3, 32, 32)}, torch.Generator().manual_seed(0))
    loss.backward()
    learned = {name.split(".")[0] for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert learned == {"decoder", "post_quant_conv"}


@pytest.mark.slow
def test_synthesize_vae_base_pack(tmp_path):
    folder = tmp_path / "pictures"
    assert main(["synthesize", "-o", str(folder), "--count", "3", "--size", "96"]) == 0
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    common = ["--data", str(folder), "--patch", "32", "--batch", "2", "--threads", "1", "--save-every", "2"]
    assert main(["vae", *common, "-o", str(tmp_path / "vae"), "--steps", "3", "--optimizer", "muon"]) == 0
    assert (
        main(["base", *common, "-o", str(tmp_path / "base"), "--steps", "3", "--vae", str(tmp_path / "vae" / "vae"), "--channels", "32", "64"]) == 0
    )
    for name in ("unet", "vae", "scheduler", "prompt_embeds.safetensors", "samples/0000003.png"):
        assert (tmp_path / "base" / name).exists(), name
    assert main(["base", *common, "-o", str(tmp_path / "base"), "--steps", "3", "--vae", str(tmp_path / "vae" / "vae")]) == 2
    assert main(["pack", "--base", str(tmp_path / "base"), "-o", str(tmp_path / "packed")]) == 0
    packed = load_file(tmp_path / "packed" / "prompt_embeds.safetensors")
    assert packed["prompt_embeds"].dtype == torch.float16


def test_old_commands_say_where_they_went(capfd):
    """Status 2 and the command to type, whatever options follow."""
    for old, new in ((["synthesize"], "synthesize"), (["train", "vae"], "vae"), (["train", "base"], "base"), (["train", "pack"], "pack")):
        for rest, tail in (([], ""), (["-o", "my run", "--steps", "3"], " -o 'my run' --steps 3")):
            assert pipelines_main([*old, *rest]) == 2
            found = capfd.readouterr().err
            assert f"'{' '.join(old)}'" in found and found.endswith(f"python -m tools.miniature {new}{tail}\n")


@pytest.mark.slow
def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "tools.miniature", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "synthesize" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["pipelines", "fewstep_sr", "nodes"])
def test_the_product_imports_nothing_of_the_tools(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in [*files, ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
            )
            assert not any("tools" in name.split(".") or "tests" in name.split(".") for name in names), f"{path}, line {node.lineno}"
