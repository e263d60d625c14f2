"""Mutation testing: change one thing at a time in a file, and see whether the tests notice.

    python tools/mutate.py fewstep_sr/diffusion.py --tests tests/methods/test_equations.py --tests "tests/methods tests/pipelines/test_pipelines_golden.py"

Each mutant is made in a copy of the tree, in which the tests that are not marked slow run until the first failure, in a process forked off after
the libraries are imported. Give --tests again for tests that take longer: they get what the first ones leave alive. What survives is printed with its
line and change. Mutants that cannot matter are listed in tools/equivalent_mutants.txt, a line each: file, the mutated line's text, the change, the
reason, with " | " between them; they do not count. Of changes that read alike on one line, or on lines that do, the second is "0 -> 1 (no. 2)".

What is changed: arithmetic and comparison operators, boolean operators and negations, conditions (made true and false), numbers, texts that code
compares or looks up, returned values, deleted statements, and default arguments.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tools" / "equivalent_mutants.txt"
SKIPPED = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", "node_modules"}

WARM = ("torch", "einops", "numpy", "PIL.Image", "safetensors.torch")
WARM_PIPELINES = (
    "accelerate", "peft", "transformers.models.clip.modeling_clip", "diffusers.models.unets.unet_2d_condition", "diffusers.training_utils",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)  # fmt: skip
"""What tests import that takes long."""

_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult}
_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a file: ``source`` is the whole file with it, ``original`` without."""

    file: Path
    line: int
    text: str
    change: str
    source: str
    original: str


def mutants(file: Path) -> Iterator[Mutant]:
    """Every mutant of a Python file. Messages of exceptions and docstrings are left alone: words are for people."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    seen: set[str] = set()
    alike: Counter[tuple[str, str]] = Counter()
    for index, node in enumerate(_nodes(tree)):
        for variant in range(_variants(node)):
            changed = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(_nodes(changed)) if i == index)
            change = _mutate(target, variant, changed)
            if change is None:
                continue
            mutated = ast.unparse(ast.fix_missing_locations(changed))
            if mutated not in seen and mutated != ast.unparse(tree):
                seen.add(mutated)
                text = lines[node.lineno - 1].strip()
                alike[text, change] += 1
                number = alike[text, change]
                yield Mutant(file, node.lineno, text, f"{change} (no. {number})" if number > 1 else change, mutated, source)


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """The nodes that may be changed, in a fixed order."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr):
            return  # what a message says
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            documented = body[0]
        else:
            documented = None
        for child in ast.iter_child_nodes(node):
            if child is documented or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                continue
            if isinstance(node, ast.FunctionDef | ast.AnnAssign) and child in (getattr(node, "returns", None), getattr(node, "annotation", None)):
                continue
            if isinstance(node, ast.arg):
                continue
            if hasattr(child, "lineno") and _variants(child):
                found.append(child)
            visit(child)

    visit(tree)
    return found


def _variants(node: ast.AST) -> int:
    if isinstance(node, ast.Constant):
        return 2 if isinstance(node.value, int | float) and not isinstance(node.value, bool) else int(isinstance(node.value, bool))
    if isinstance(node, ast.If | ast.IfExp):
        return 2
    if isinstance(node, ast.Compare):
        return len(node.ops)
    return int(isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.Return | ast.Expr | ast.AugAssign))


def _mutate(node: ast.AST, variant: int, tree: ast.AST) -> str | None:
    before = ast.unparse(node)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            node.value = not node.value
        else:
            node.value = node.value + 1 if variant == 0 else (node.value * 2 if node.value not in (0, 1) else -1)
    elif isinstance(node, ast.If | ast.IfExp):
        before = ast.unparse(node.test)
        node.test = ast.Constant(variant == 0)
        return f"condition {before} -> {variant == 0}"
    elif isinstance(node, ast.Compare):
        node.ops[variant] = _COMPARE[type(node.ops[variant])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        if type(node.op) not in _BINARY:
            return None
        node.op = _BINARY[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        if not isinstance(node.op, ast.USub | ast.Not):
            return None
        operand = node.operand
        _replace(tree, node, operand)
        return f"{before} -> {ast.unparse(operand)}"
    elif isinstance(node, ast.Return):
        if node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None):
            return None
        node.value = ast.Constant(None)
        return f"{before} -> return None"
    elif isinstance(node, ast.Expr):
        if not isinstance(node.value, ast.Call):
            return None
        node.value = ast.Constant(None)
        return f"{before} deleted"
    return f"{before} -> {ast.unparse(node)}"


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and old in value:
                value[value.index(old)] = new


def equivalents() -> set[tuple[str, str, str]]:
    """Mutants that cannot matter, as (file, line's text, change)."""
    if not EQUIVALENT.is_file():
        return set()
    rows = [line.split(" | ") for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {(row[0], row[1], row[2]) for row in rows}


def start(mutant: Mutant, folder: Path, tests: list[str], limit: int) -> multiprocessing.Process:
    """A process that runs the tests in ``folder`` with this mutant in place, and exits with 0 where they pass within ``limit`` seconds of the processor."""
    path = folder / mutant.file.relative_to(ROOT)
    path.write_text(mutant.source, encoding="utf-8")
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, tests, limit))
    process.start()
    return process


def _run(folder: Path, tests: list[str], limit: int) -> None:
    os.setsid()  # its children go with it
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    os.chdir(folder)
    sys.path[:] = [str(folder) if entry in ("", str(ROOT), str(ROOT / "tools")) else entry for entry in sys.path]
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    status = pytest.main(["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", *tests])
    os._exit(int(status))


def _where(mutant: Mutant) -> str:
    return f"{mutant.file.relative_to(ROOT)}:{mutant.line} | {mutant.text} | {mutant.change}"


def survivors(found: list[Mutant], folders: list[Path], tests: list[str], limit: int, report: bool = False) -> list[bool]:
    """For each mutant whether the tests pass with it. One at which they take longer than ``limit`` seconds of the processor counts as noticed, and so does
    one at which they wait ten times as long.
    """
    alive = [False] * len(found)
    running: dict[Path, tuple[int, multiprocessing.Process, float]] = {}
    waiting, free = list(range(len(found)))[::-1], list(folders)
    while waiting or running:
        while waiting and free:
            index, folder = waiting.pop(), free.pop()
            running[folder] = index, start(found[index], folder, tests, limit), time.monotonic() + 10 * limit
        time.sleep(0.02)
        for folder, (index, process, deadline) in list(running.items()):
            if process.is_alive() and time.monotonic() < deadline:
                continue
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            alive[index] = process.exitcode == 0
            if alive[index] and report:
                print(f"  survived {_where(found[index])}", flush=True)
            (folder / found[index].file.relative_to(ROOT)).write_text(found[index].original, encoding="utf-8")
            free.append(folder)
            del running[folder]
    return alive


def _import_libraries(diffusers: bool) -> None:
    """Before processes are forked off: what takes long to import, and pytest's own modules, which an empty folder makes it import."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for module in (*WARM, *(WARM_PIPELINES if diffusers else ())):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-p", "no:cacheprovider", empty])
    gc.freeze()  # pytest collects garbage at its end, and need not look through the libraries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--tests", required=True, action="append", help="what pytest is given, such as 'tests/methods tests/tiling'; again: for the survivors"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn with --seed (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=120, help="seconds of the processor for the tests (default: %(default)s)")
    arguments = parser.parse_args()
    known = equivalents()
    found = [mutant for file in arguments.files for mutant in mutants(file.resolve())]
    found = [m for m in found if (str(m.file.relative_to(ROOT)), m.text, m.change) not in known]
    if arguments.sample and arguments.sample < len(found):
        found = random.Random(arguments.seed).sample(found, arguments.sample)
    stages = [tests.split() for tests in arguments.tests]
    _import_libraries(diffusers="pipelines" in " ".join([*map(str, arguments.files), *arguments.tests]))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(arguments.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=lambda _, names: SKIPPED & set(names))
        first = arguments.files[0].resolve()
        whole = first.read_text(encoding="utf-8")
        left = found
        for tests in stages:
            if not survivors([Mutant(first, 0, "", "", whole, whole)], folders, tests, 10 * arguments.timeout)[0]:
                raise SystemExit(f"The tests fail without any change: pytest {' '.join(tests)}")
            alive = survivors(left, folders, tests, arguments.timeout, report=tests is stages[-1])
            left = [mutant for mutant, survived in zip(left, alive, strict=True) if survived]
    for file in sorted({mutant.file for mutant in found}):
        mine, survived = (sum(mutant.file == file for mutant in some) for some in (found, left))
        print(f"{file.relative_to(ROOT)}: {mine - survived} of {mine} dead")
    print(f"{len(found) - len(left)} of {len(found)} dead ({1 - len(left) / max(len(found), 1):.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
