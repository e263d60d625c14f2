"""The package's metadata says what requirements.txt says."""

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
