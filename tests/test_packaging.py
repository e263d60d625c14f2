"""What an installation has, from the wheel and from the registry's archive, and that its metadata says what requirements.txt says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from PIL import Image


def test_requirements_are_in_step():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == lines
    operators = {spec.operator for line in lines for spec in Requirement(line).specifier}
    assert operators == {">="}, "no upper pins: version conflicts are the first complaint of every pack"
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()


def test_the_tests_also_run_on_the_declared_minimums():
    """.ci/minimums.txt and the workflow name the versions that requirements.txt and the registry's metadata declare."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    lines = (ROOT / ".ci" / "minimums.txt").read_text().splitlines()
    pinned = {requirement.name: requirement.specifier for requirement in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for requirement in map(Requirement, (ROOT / "requirements.txt").read_text().split()):
        for declared in requirement.specifier:
            (oldest,) = pinned[requirement.name]
            assert (oldest.operator, oldest.version.removesuffix(".*")) == ("==", declared.version), requirement.name
    comfyui = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert f'comfyui: ["v{comfyui}", "master"]' in workflow and "-c .ci/minimums.txt" in workflow


def test_the_wheel_has_every_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT).as_posix() for top in ("fewstep_sr", "pipelines") for file in (ROOT / top).rglob("__init__.py")}
    here = {"fewstep_sr." + folder.replace("/", ".") if folder.startswith("pipelines") else folder.replace("/", ".") for folder in folders}
    assert here <= set(setuptools["packages"])


def test_the_registrys_pictures_are_here():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version, comfy = metadata["project"]["version"], metadata["tool"]["comfy"]
    for picture in (comfy["Icon"], comfy["Banner"]):
        assert (ROOT / picture.partition("/main/")[2]).is_file(), picture
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_archive_holds_what_users_need():
    """What .comfyignore leaves out, by git's rules, which are the registry's: nothing of what runs, is shown or is read in the app."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-c", "core.quotePath=false", "-c", f"core.excludesFile={ROOT / '.comfyignore'}"]
    tracked = subprocess.run([*git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = subprocess.run([*git, "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input=tracked, capture_output=True, text=True)
    kept = set(tracked.splitlines()) - set(ignored.stdout.splitlines())
    assert {"__init__.py", "README.md", "LICENSE", "requirements.txt", "pyproject.toml", "CHANGELOG.md"} <= kept
    folders = {"example_workflows", "locales", "miniature", "nodes", "pipelines", "fewstep_sr", "subgraphs", "web"}
    assert {path for path in tracked.splitlines() if path.partition("/")[0] in folders} <= kept
    assert {path.partition("/")[0] for path in kept if "/" in path} == folders


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the package, from a copy of the checkout: building leaves files beside the sources.

    Without a network: dependencies and setuptools are those of this environment (requirements-dev.txt).
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "build", "tests", "docs"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    pip += ["--target", str(folder / "site"), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_has_one_package(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"fewstep_sr", "bin"}
    assert (installed / "bin" / "fewstep-sr").is_file() and not list(installed.rglob("*.jpg"))
    for name in ("sheet.html", "reference.json"):
        assert (installed / "fewstep_sr" / "pipelines" / "evaluation" / name).is_file()
    modules = {path.relative_to(ROOT / "fewstep_sr") for path in (ROOT / "fewstep_sr").rglob("*.py")}
    modules |= {Path("pipelines") / path.relative_to(ROOT / "pipelines") for path in (ROOT / "pipelines").rglob("*.py")}
    assert {path.relative_to(installed / "fewstep_sr") for path in (installed / "fewstep_sr").rglob("*.py")} == modules


@pytest.mark.slow
def test_the_command_outside_the_checkout(installed, tmp_path):
    shutil.copy(ROOT / "miniature" / "photo.png", tmp_path / "photo.png")
    done = run(installed, tmp_path, str(installed / "bin" / "fewstep-sr"), "upscale", "photo.png", "--demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "photo_x4.png").size == (448, 300)


HELP = """
from {package}.cli import main
for command in {commands}:
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert not end.code
"""


@pytest.mark.slow
def test_help_names_the_command_that_was_called(installed, tmp_path):
    """In an installation there is no ``python -m pipelines``, in a checkout no ``fewstep-sr``."""
    commands = ["upscale", "train osediff", "train invsr"]
    fresh, checkout = (
        run(path, tmp_path, "-c", HELP.format(package=package, commands=commands)).stdout
        for path, package in ((installed, "fewstep_sr.pipelines"), (ROOT, "pipelines"))
    )
    for command in commands:
        assert f"usage: fewstep-sr {command} " in fresh and f"usage: python -m pipelines {command} " in checkout
    assert "-m pipelines" not in fresh and "fewstep-sr" not in checkout


THERE = """
import sys
from fewstep_sr.pipelines import InvSRPipeline
pipeline = InvSRPipeline.from_pretrained("here")
assert type(pipeline.noise_predictor).__module__ == "fewstep_sr.pipelines.noise_predictor", type(pipeline.noise_predictor).__module__
assert "pipelines" not in sys.modules
pipeline.save_pretrained("there")
"""


@pytest.mark.slow
def test_a_saved_pipeline_loads_from_checkout_and_installation(installed, tmp_path):
    """Saved here and loaded there, saved there and loaded here."""
    from pipelines import InvSRPipeline
    from pipelines.demo import load_demo

    load_demo("invsr")[0].save_pretrained(tmp_path / "here")
    done = run(installed, tmp_path, "-c", THERE)
    assert done.returncode == 0, done.stderr
    assert type(InvSRPipeline.from_pretrained(tmp_path / "there").noise_predictor).__module__ == "pipelines.noise_predictor"
