"""What a new adapter family takes: a record, its networks, its nodes, its pipeline, and a line in METHODS. Everything else follows from the record."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PRODUCT = ("fewstep_sr", "nodes", "pipelines", "tools", "benchmarks", "__init__.py")
FIXTURE = ROOT / "tests" / "fixtures" / "new_family"


def test_files_that_name_the_last_family():
    """S3Diff has the most of all: networks of its own, nodes of its own, another adapter for each image."""
    files = [path for name in PRODUCT for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    naming = {path.relative_to(ROOT).as_posix() for path in files if "s3diff" in (path.name + path.read_text(encoding="utf-8")).lower()}
    assert naming == {
        "fewstep_sr/methods/__init__.py",
        "fewstep_sr/methods/s3diff.py",
        "fewstep_sr/networks/degradation.py",
        "nodes/s3diff.py",
        "pipelines/s3diff.py",
    }


@pytest.mark.slow
def test_a_new_family(tmp_path, comfyui_path):
    """A made-up method, by three files of its own and the line, in a copy of the tree: see tests/fixtures/new_family/checks.py."""
    here = tmp_path / "pack"
    for name in ("fewstep_sr", "nodes", "pipelines", "miniature", "tests/support", "tests/golden", "web"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, here / name)
    for file, place in {"record": "fewstep_sr/methods/toy", "pipeline": "pipelines/toy", "nodes": "nodes/toy", "checks": "tests/test_toy"}.items():
        shutil.copy(FIXTURE / f"{file}.py", here / f"{place}.py")
    listing = here / "fewstep_sr" / "methods" / "__init__.py"
    text = listing.read_text(encoding="utf-8")
    assert text.count("HYPIR, S3DIFF)") == 1
    text = text.replace("HYPIR, S3DIFF)", "HYPIR, S3DIFF, TOY)").replace(
        "from .s3diff import S3DIFF\n", "from .s3diff import S3DIFF\nfrom .toy import TOY\n"
    )
    listing.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "temp"), "tests/test_toy.py"]
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, env={**os.environ, "COMFYUI_PATH": str(comfyui_path)})
    assert found.returncode == 0 and "5 passed" in found.stdout, found.stdout[-6000:] + found.stderr[-2000:]
