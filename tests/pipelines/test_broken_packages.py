"""The command line where diffusers, peft, accelerate or transformers are broken, and what each command imports."""

import os
import subprocess
import sys

import pytest
import torch
import toys
from conftest import ROOT

from pipelines.cli import main

HEAVY = ["diffusers", "peft", "accelerate", "transformers"]


def run(code: str, *folders) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


@pytest.fixture
def broken(tmp_path):
    """A folder of packages that fail as versions do that do not fit each other."""
    folder = tmp_path / "site"
    for number, name in enumerate(HEAVY):
        (folder / name).mkdir(parents=True)
        error = ["ImportError", "RuntimeError", "AttributeError", "SystemError"][number]
        (folder / name / "__init__.py").write_text(f"raise {error}('{name} is broken')\n")
    return folder


@pytest.mark.slow
def test_files_are_read_where_other_packages_are_broken(tmp_path, broken):
    torch.save(toys.osediff_checkpoint(3, 4), tmp_path / "osediff.pkl")
    torch.save(toys.predictor_state_dict(3), tmp_path / "predictor.pth")
    code = f"""
import sys
from pipelines.cli import main
files = [{str(tmp_path / "osediff.pkl")!r}, {str(tmp_path / "predictor.pth")!r}]
assert main(["info", *files]) == 0 and main(["convert", *files]) == 0
for command in ([], ["upscale"], ["evaluate"], ["compare"], ["verify"], ["convert"], ["info"], ["train"], ["train", "osediff"], ["train", "invsr"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
photos = {str(ROOT / "tests" / "data" / "photos")!r}
assert main(["evaluate", "--results", photos, "--hq", photos]) == 0
assert main(["compare", photos, "-o", {str(tmp_path / "sheet.png")!r}]) == 0
assert main(["upscale", {str(ROOT / "miniature" / "photo.png")!r}, "--demo", "-o", {str(tmp_path / "out.png")!r}]) == 2
"""
    found = run(code, broken)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("fits:") == 2 and found.stdout.count("usage:") == 10
    assert (tmp_path / "osediff.safetensors").exists() and (tmp_path / "predictor.safetensors").exists()
    line = found.stderr.strip().splitlines()[-1]
    assert (
        line.startswith("error: accelerate cannot be imported (AttributeError: accelerate is broken). Install")
        and not (tmp_path / "out.png").exists()
    )


@pytest.mark.slow
def test_what_commands_import(tmp_path):
    """``--help`` does without torch everywhere, though the methods' options are in their records; files are read with torch alone."""
    torch.save(toys.osediff_checkpoint(3, 4), tmp_path / "osediff.pkl")
    code = f"""
import sys
from pipelines.cli import main
for command in ([], ["compare"], ["convert"], ["info"], ["train"], ["train", "osediff"], ["train", "invsr"]):
    try:
        main([*command, "--help"])
    except SystemExit:
        pass
    print("imported:", [name for name in ["torch", "numpy", "PIL", *{HEAVY}] if name in sys.modules])
for command in ("upscale", "evaluate", "verify"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
    print("imported:", [name for name in ["torch", "numpy", *{HEAVY}] if name in sys.modules])
for command in ("info", "convert"):
    assert main([command, {str(tmp_path / "osediff.pkl")!r}]) == 0
    print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("imported: []") == 12, found.stdout


def test_a_bad_file_does_not_stop_the_others(tmp_path, capsys):
    good, bad, other = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pkl"
    torch.save(toys.predictor_state_dict(3), good)
    bad.write_bytes(b"no weights")
    torch.save(toys.osediff_checkpoint(3, 4), other)
    for command, count in (("info", "fits:"), ("convert", "->")):
        assert main([command, *map(str, (good, bad, other))]) == 1
        said = capsys.readouterr()
        assert said.out.count(count) == 2 and said.err.startswith("error: b.pth") and len(said.err.splitlines()) == 1
        assert main([command, str(bad), str(tmp_path / "missing.pth")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["convert", str(good), str(other), "-o", str(tmp_path / "one.safetensors")]) == 2
    assert "-o: found one name for 2 files" in capsys.readouterr().err
