"""The pack on ComfyUI's own web page, in a Chromium without a window.

``pip install playwright`` drives the system's chromium, else the one that ``playwright install chromium`` fetched. FEWSTEP_SR_SCREENSHOTS
names a folder for what the page looked like.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from comfy_server import Server
from conftest import ROOT
from test_server import photo, write_models

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """Reduced networks with random weights under the names that the templates ask for, and a small photo."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "input").mkdir()
    photo().save(base / "input" / "example.png")
    write_models(base / "models", "reduced")
    with Server(comfy.path, base) as running:
        yield running


@pytest.fixture(scope="module")
def page(server):
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start (apt install chromium, or playwright install chromium): {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && app.canvas && app.extensionManager?.command", timeout=120_000)
        yield page
        browser.close()


@pytest.fixture(autouse=True)
def screenshot(page, request, tmp_path):
    yield
    folder = Path(os.environ.get("FEWSTEP_SR_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{request.node.name}.png")


def test_templates_are_listed_and_open(page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("ComfyUI-FewStepSR").first.click()
    for path in TEMPLATES:
        dialog.get_by_text(path.stem, exact=True).first.wait_for()
    dialog.get_by_text("invsr_x4", exact=True).first.click()
    page.wait_for_function("() => app.graph._nodes.some(n => n.type === 'InvSRStartState')")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_template_on_the_page(page, path):
    """No node is unknown to the page, no two boxes overlap as the page lays them out, and it saves what it loaded."""
    workflow = json.loads(path.read_text())
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    assert page.evaluate("() => app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)") == []
    boxes = page.evaluate("() => app.graph._nodes.map(n => [n.title, ...n.getBounding()])")
    assert len(boxes) == len(workflow["nodes"])
    for i, (title, *a) in enumerate(boxes):
        for other, *b in boxes[:i]:
            assert not overlap(a, b), f"{title} lies on {other}"
    links = page.evaluate("() => app.graph.serialize().links")
    assert sorted(link[1:] for link in links) == sorted(link[1:] for link in workflow["links"])


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether two boxes (x, y, width, height) share an area."""
    return all(max(a[i], b[i]) < min(a[i] + a[i + 2], b[i] + b[i + 2]) for i in (0, 1))


def open_in_view(page, name: str) -> None:
    """The page fetches pictures of, and has a toolbox for, nodes in view alone."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads((ROOT / "example_workflows" / f"{name}.json").read_text()))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)


def test_a_run_shows_progress_noise_map_and_result(page):
    open_in_view(page, "invsr_x4")
    page.evaluate(
        """() => {
            window.progress = {}
            const note = n => { progress[app.graph.getNodeById(n.node_id)?.type] = [n.value, n.max] }
            app.api.addEventListener('progress_state', event => Object.values(event.detail.nodes).forEach(note))
        }"""
    )
    page.evaluate("() => app.queuePrompt(0)")
    for node in ("InvSRStartState", "SaveImage"):
        page.wait_for_function("type => app.graph._nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth > 0", arg=node, timeout=120_000)
    size = page.evaluate("() => { const [i] = app.graph._nodes.find(n => n.type === 'SaveImage').imgs; return [i.naturalWidth, i.naturalHeight] }")
    assert size == [200, 148]
    progress = page.evaluate("() => progress")
    assert progress["SamplerCustomAdvanced"] == [1, 1] and "InvSRStartState" in progress


def test_help_is_shown(page):
    open_in_view(page, "osediff_x4")
    page.evaluate("() => app.canvas.selectNode(app.graph._nodes.find(n => n.type === 'OSEDiffOneStep'))")
    page.get_by_test_id("info-button").click()
    page.locator(".node-help-content h1", has_text="OSEDiff One Step").wait_for()
    page.locator(".node-help-content table", has_text="timestep").wait_for()
