"""The package's metadata says what requirements.txt says."""

import shutil
import subprocess

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


def test_requirements_are_in_step():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == lines
    operators = {spec.operator for line in lines for spec in Requirement(line).specifier}
    assert operators == {">="}, "no upper pins: version conflicts are the first complaint of every pack"
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()


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
