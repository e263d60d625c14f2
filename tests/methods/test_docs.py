"""README and docs against the methods' records: what a record says of its files, a table of files says, too."""

import re
from functools import cache
from urllib.parse import urlsplit

import pytest
from conftest import ROOT

from fewstep_sr.methods import METHODS
from fewstep_sr.methods.method import Source

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def rows() -> list[str]:
    """The lines of all tables, without emphasis."""
    return [line.replace("**", "") for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


def facts(source: Source) -> dict[str, str]:
    """What a row says of a file, besides its name: folder, size, the repository that it is linked to, and the licence's name."""
    page = urlsplit(source.page)
    licence = re.split(r" \(|, https?:", source.licence)[0]
    return {
        "folder": f"| `{source.folder}` |",
        "size": source.size,
        "link": "/".join([f"({page.scheme}://{page.netloc}", *page.path.split("/")[1:3]]),
        "licence": licence,
        "terms": "non-commercial use only" if "non-commercial" in source.licence else "",
    }


SOURCES = [
    pytest.param(source, name, id=f"{key}-{name}")
    for key, m in METHODS.items()
    for source, name in ((m.base, m.base.names[0]), (m.weights, m.published_name))
]


@pytest.mark.parametrize(("source", "name"), SOURCES)
def test_every_file_is_in_a_table(source, name):
    naming = [row for row in rows() if f"`{name}`" in row]
    assert naming, f"no table in README.md or docs/ has {name}"
    lacking = [{what: fact for what, fact in facts(source).items() if fact not in row} for row in naming]
    assert {} in lacking, f"{name}: the tables lack {min(lacking, key=len)}"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_paper_is_linked(method):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert method.title in text and f"({method.paper.url})" in text and f"({method.paper.code})" in text


def test_a_method_without_docs_is_noticed():
    """The rows that there are do not do for a file, a folder or a licence that they do not have."""
    (row,) = (row for row in rows() if "`osediff.pkl`" in row and "`osediff_face.pkl`" in row)
    known = facts(METHODS["osediff"].weights)
    assert all(fact in row for fact in known.values()) and known["link"] == "(https://github.com/cswry/OSEDiff"
    other = facts(METHODS["invsr"].weights)
    assert [what for what, fact in other.items() if fact not in row] == ["folder", "size", "link", "licence", "terms"]
    assert not any("`nothing.pth`" in row for row in rows())


def published_rows(benchmark: str) -> list[dict[str, str]]:
    """The rows of docs/benchmark.md's table of a benchmark, by the columns' names and without footnotes."""
    text = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {benchmark}\b.*?$(.*?)^## ", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)[1]
    head, _, *lines = ([cell.strip(" *¹²") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|"))
    return [dict(zip(["method", *head[1:]], line, strict=True)) for line in lines]


@pytest.mark.parametrize(("method", "one"), [pytest.param(m, one, id=f"{key}-{one.benchmark}") for key, m in METHODS.items() for one in m.published])
def test_published_figures_are_the_tables(method, one):
    """To the table's digits, neither more nor fewer of them."""
    row = next(row for row in published_rows(one.benchmark) if row["method"].startswith(method.title))
    columns = [name for name in row if name not in ("method", "source", "GMSD")]
    assert {name for name in columns if row[name]} == {name.removesuffix("-pipal").upper() for name in one.figures}
    for name, value in one.figures.items():
        cell = row[name.removesuffix("-pipal").upper()]
        assert f"{value:.{len(cell.partition('.')[2])}f}" == cell and len(cell) >= 4


def test_readmes_lines_run_on_three_systems():
    """As they stand in README, but for the clone, which is there already."""
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    lines = re.findall(r"(?:python3|py) -m venv [^`\n]*?(?:--demo|not browser\")", (ROOT / "README.md").read_text())
    assert len(lines) == 6 and [line for line in lines if line not in workflow] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.stem)
def test_pages_say_whose_python_runs_their_commands(page):
    """Before the first command: a system may have no ``python``, and none that installs packages."""
    text = page.read_text(encoding="utf-8")
    command = re.search(r"^(?:python|accelerate|fewstep-sr) ", text, re.MULTILINE)
    if command:
        assert "](../README.md#without-comfyui)" in text[: command.start()] and "`.venv/bin/python" in text[: command.start()]
    assert not re.search(r"^pip install", text, re.MULTILINE)
