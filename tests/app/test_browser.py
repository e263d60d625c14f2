"""The pack on ComfyUI's own web page, in a Chromium without a window.

``pip install playwright`` drives the system's chromium, else the one that ``playwright install chromium`` fetched. FEWSTEP_SR_SCREENSHOTS
names a folder for what the page looked like.
"""

import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from comfy_server import Server, to_prompt
from conftest import ROOT
from PIL import Image
from server_folder import fill, load, photo

from fewstep_sr.methods import METHODS
from tools.thumbnails import BADGE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """Reduced networks with random weights under the names that the templates ask for, and a small photo."""
    base = tmp_path_factory.mktemp("comfyui")
    fill(base, "reduced")
    with Server(comfy.path, base) as running:
        yield running


@pytest.fixture(scope="module")
def new_server(comfy, tmp_path_factory):
    """A server of somebody who has a picture but no weights yet."""
    base = tmp_path_factory.mktemp("new")
    (base / "input").mkdir()
    photo().save(base / "input" / "example.png")
    with Server(comfy.path, base) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start (apt install chromium, or playwright install chromium): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def open_page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(60_000)
    page.request.post(f"{server.url}/settings/Comfy.TutorialCompleted", data="true", headers={"Content-Type": "application/json"})
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function("() => window.app?.graph && app.canvas && app.extensionManager?.command", timeout=120_000)
    return page


@pytest.fixture(scope="module")
def page(browser, server):
    return open_page(browser, server)


@pytest.fixture(scope="module")
def new_page(browser, new_server):
    return open_page(browser, new_server)


@pytest.fixture(autouse=True)
def screenshot(request, tmp_path):
    pages = [request.getfixturevalue(name) for name in ("page", "new_page") if name in request.fixturenames]
    if "in_mode" in request.fixturenames:
        request.getfixturevalue("in_mode")  # so that the picture is taken before the mode ends
    yield
    folder = Path(os.environ.get("FEWSTEP_SR_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages:
        page.screenshot(path=folder / f"{request.node.name}.png")


def test_templates_are_listed_and_open(page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("ComfyUI-FewStepSR").first.click()
    first = page.wait_for_function(
        """names => {
            const cards = [...document.querySelectorAll('[role=dialog] *')].filter(e => !e.children.length && names.includes(e.textContent.trim()))
            return cards.length > 6 && cards.map(e => e.textContent.trim())
        }""",
        arg=[path.stem for path in TEMPLATES],
    ).json_value()
    assert [name.split()[0] for name in first[:7]] == ["1", "1", "2", "2", "2", "2", "2"]
    card = dialog.locator('[data-testid^="template-workflow-"]').first
    picture, badge = card.locator("img").first.bounding_box(), card.get_by_text("Node graph", exact=True).locator("..").bounding_box()
    covered = [(badge[start] + badge[size] - picture[start]) / picture[size] for start, size in (("x", "width"), ("y", "height"))]
    assert 0 < covered[0] <= BADGE[0] and 0 < covered[1] <= BADGE[1], f"the page's badge covers more of a thumbnail than is left free: {covered}"
    dialog.get_by_text(TEMPLATES[0].stem, exact=True).first.hover()
    missing = {path.stem for path in TEMPLATES}
    for _ in range(40):  # the page adds cards as one scrolls
        missing -= {name for name in missing if dialog.get_by_text(name, exact=True).count()}
        if not missing:
            break
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(250)
    assert not missing
    dialog.get_by_text("InvSR x4, step by step", exact=True).first.click()
    page.wait_for_function("() => app.graph._nodes.some(n => n.type === 'InvSRStartState')")


def test_an_old_name_opens(page, server):
    """A link to a template by the name that it had."""
    page.goto(f"{server.url}/?template=invsr_1_to_5_steps&source=ComfyUI-FewStepSR", wait_until="domcontentloaded")
    page.wait_for_function("() => window.app?.graph?._nodes?.some(n => n.title === '5 steps')", timeout=120_000)


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def in_mode(request, page):
    """The page with its classic nodes, or with Nodes 2.0."""
    mode = "on" if request.param else "off"
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param)
    page.wait_for_function(f"() => LiteGraph.vueNodesMode === {str(request.param).lower()}")
    yield mode
    page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


SMALLEST_TEXT = 0.58
"""Below this zoom the page draws no text (8 pixels of its 14, "Comfy.Graph.MinFontSizeForLOD" in the settings)."""


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_template_on_the_page(page, server, in_mode, path):
    """No node is unknown to the page, no two boxes overlap as the page lays them out, all is readable and in sight, and it queues what it loaded."""
    workflow = json.loads(path.read_text())
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(800)  # Nodes 2.0 measures its boxes after it has drawn them
    assert page.evaluate("() => app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)") == []
    boxes = page.evaluate("() => app.graph._nodes.map(n => [n.title, ...n.getBounding()])")
    assert len(boxes) == len(workflow["nodes"])
    for i, (title, *a) in enumerate(boxes):
        for other, *b in boxes[:i]:
            assert not overlap(a, b), f"{title} lies on {other}"
    scale, (left, top) = page.evaluate("() => [app.canvas.ds.scale, [...app.canvas.ds.offset]]")
    assert scale >= SMALLEST_TEXT
    for title, x, y, width, height in boxes:
        corners = [(x + left) * scale, (y + top) * scale, (x + left + width) * scale, (y + top + height) * scale]
        assert corners[0] >= 55 and corners[1] >= 45 and corners[2] <= 1600 and corners[3] <= 1000, f"{title} is out of sight: {corners}"
    links = page.evaluate("() => app.graph.serialize().links")
    assert sorted(link[1:] for link in links) == sorted(link[1:] for link in workflow["links"])
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    expected = to_prompt(workflow, server.schemas)
    assert {name: node["class_type"] for name, node in queued.items()} == {name: node["class_type"] for name, node in expected.items()}
    for name, node in expected.items():
        ours = {k: v for k, v in node["inputs"].items() if k != "compare_view"}
        assert {k: v for k, v in queued[name]["inputs"].items() if k in ours} == ours, node["class_type"]


@pytest.mark.parametrize("words", ["super resolution", "restore", "enhance", "upscale"])
def test_blueprints_are_found(page, words):
    """In the node search, by what people call it."""
    page.keyboard.press("Escape")
    page.evaluate("() => { app.graph.clear(); app.extensionManager.command.execute('Workspace.SearchBox.Toggle') }")
    page.keyboard.type(words, delay=20)
    page.get_by_text("Super Resolution (OSEDiff)").first.wait_for()
    page.keyboard.press("Escape")


IS_WHOLE = "e => { let box = e; while (!box.clientWidth) box = box.parentElement; return box.scrollWidth <= box.clientWidth + 1 }"
"""Whether a text is not cut: of itself, or where it flows in a line, of the box around it."""


def test_blueprints_can_be_told_apart(page):
    """In the side bar, which cuts their names, by their folders' names."""
    page.keyboard.press("Escape")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')")
    page.get_by_placeholder("Search").first.fill("upscale")
    page.get_by_text("Restore Enhance").nth(4).wait_for()
    whole = page.evaluate(f"""() => [...document.querySelectorAll('[role=treeitem] span')]
        .filter(e => !e.children.length && e.offsetWidth).filter({IS_WHOLE}).map(e => e.textContent.trim())""")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')")
    assert {record.title for record in METHODS.values()} <= set(whole)


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda p: p.stem)
def test_a_blueprints_title_fits(page, in_mode, path):
    page.evaluate("blueprint => app.loadGraphData(blueprint)", json.loads(path.read_text()))
    page.wait_for_timeout(800)
    if in_mode == "on":
        assert page.get_by_text(path.stem, exact=True).last.evaluate(IS_WHOLE)
    else:  # an icon before it, a button behind
        assert (
            page.evaluate("""() => { const [node] = app.graph._nodes, ctx = app.canvas.ctx; ctx.save(); ctx.font = node.titleFontStyle
            const width = ctx.measureText(node.getTitle()).width; ctx.restore(); return width + 2 * LiteGraph.NODE_TITLE_HEIGHT - node.size[0] }""")
            < 0
        )


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether two boxes (x, y, width, height) share an area."""
    return all(max(a[i], b[i]) < min(a[i] + a[i + 2], b[i] + b[i + 2]) for i in (0, 1))


def open_in_view(page, name: str) -> None:
    """The page fetches pictures of, and has a toolbox for, nodes in view alone."""
    page.evaluate("workflow => app.loadGraphData(workflow)", load(name))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)


@pytest.mark.parametrize(
    "template, samples, pictures",
    [("try_osediff", "OSEDiffOneStep", ["SaveImage"]), ("try_invsr", "SamplerCustomAdvanced", ["InvSRStartState", "SaveImage"])],
)
def test_a_run_shows_progress_noise_map_and_result(page, template, samples, pictures):
    open_in_view(page, template)
    page.evaluate(
        """() => {
            window.progress = {}
            const note = n => { progress[app.graph.getNodeById(n.node_id)?.type] = [n.value, n.max] }
            app.api.addEventListener('progress_state', event => Object.values(event.detail.nodes).forEach(note))
        }"""
    )
    page.evaluate("() => app.queuePrompt(0)")
    for node in pictures:
        page.wait_for_function("type => app.graph._nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth > 0", arg=node, timeout=120_000)
    restored = shown(page, "SaveImage")
    assert restored.size == (448, 300)
    enlarged = Image.open(ROOT / "miniature" / "photo.png").convert("RGB").resize(restored.size, Image.Resampling.BICUBIC)
    assert np.corrcoef(np.asarray(restored).ravel(), np.asarray(enlarged).ravel())[0, 1] > 0.9
    progress = page.evaluate("() => progress")
    assert progress[samples] == [1, 1] and set(pictures) <= progress.keys()


def test_the_first_photo_takes_five_clicks_and_a_minute(browser, server, tmp_path):
    """From the page's start to the restored own photo, with the files in place: Templates, the pack, the template, the photo, Run."""
    own = tmp_path / "mine.png"
    photo().rotate(90, expand=True).save(own)
    clicks = 0
    started = time.monotonic()
    page = open_page(browser, server)  # with a context of its own: nothing is cached

    def click(place) -> None:
        nonlocal clicks
        clicks += 1
        place.click()

    click(page.get_by_role("button", name="Templates").first)
    dialog = page.get_by_role("dialog")
    click(dialog.get_by_text("ComfyUI-FewStepSR").first)
    click(dialog.get_by_text("2 Restore one photo (OSEDiff)", exact=True).first)
    page.wait_for_function("() => app.graph._nodes.some(n => n.type === 'LoadImage')")
    set_widget_inside(page, "longest side", 128)  # the networks here are random and the CPU is shared; the clicks are those of 1024
    with page.expect_file_chooser() as chooser:
        clicks += 1
        page.mouse.click(*button_of(page, "LoadImage", "upload"))
    chooser.value.set_files(own)
    page.wait_for_function("() => app.graph._nodes.find(n => n.type === 'LoadImage').widgets[0].value.startsWith('mine')")
    click(page.get_by_test_id("queue-button").or_(page.get_by_role("button", name="Run", exact=True)).first)
    page.wait_for_function("() => app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0", timeout=120_000)
    seconds = time.monotonic() - started
    restored = shown(page, "SaveImage")
    page.screenshot(path=Path(os.environ.get("FEWSTEP_SR_SCREENSHOTS", tmp_path)) / "first_photo.png")
    page.close()
    print(f"{clicks} clicks, {seconds:.1f} s")
    assert restored.height == 128 and restored.width == round(128 * 37 / 50)
    assert clicks <= 5 and seconds < 60


def button_of(page, node_type: str, widget: str) -> list[float]:
    """Where the middle of a node's widget is on the page."""
    return page.evaluate(
        """([type, name]) => {
            const node = app.graph._nodes.find(n => n.type === type), ds = app.canvas.ds, widget = node.widgets.find(w => w.name === name)
            const canvas = app.canvas.canvas.getBoundingClientRect()
            const x = node.pos[0] + node.size[0] / 2, y = node.pos[1] + (widget.last_y ?? widget.y) + 10
            return [canvas.left + (x + ds.offset[0]) * ds.scale, canvas.top + (y + ds.offset[1]) * ds.scale]
        }""",
        [node_type, widget],
    )


def set_widget_inside(page, name: str, value) -> None:
    """A value of the one node that is a subgraph."""
    page.evaluate(
        "([name, value]) => { app.graph._nodes.find(n => n.subgraph).widgets.find(w => (w.label ?? w.name) === name).value = value }", [name, value]
    )


def shown(page, node_type: str) -> Image.Image:
    """The picture on a node."""
    source = page.evaluate("type => app.graph._nodes.find(n => n.type === type).imgs[0].src", node_type)
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


NODES = json.loads((ROOT / "tests" / "fixtures" / "nodes.json").read_text())


def add_node(page, node_id: str) -> None:
    """An empty graph with this node, selected, at its real size."""
    page.evaluate(
        """id => {
            app.graph.clear()
            const node = LiteGraph.createNode(id)
            app.graph.add(node)
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [300, 300]
            app.canvas.selectNode(node)
            app.canvas.setDirty(true, true)
        }""",
        node_id,
    )
    page.wait_for_timeout(1000)


@pytest.mark.parametrize("node_id", NODES)
def test_help_is_shown(page, node_id):
    """The panel has the node's page in the page's language, with its list, which fits its width, and pictures."""
    add_node(page, node_id)
    page.get_by_test_id("info-button").click()
    title = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    page.locator(".node-help-content h1", has_text=title).wait_for()
    shown = [entry["name"] for entry in NODES[node_id]["inputs"] if "default" in entry]
    for name in shown:
        page.locator(".node-help-content li", has_text=name).first.wait_for()
    assert page.evaluate("() => { const help = document.querySelector('.node-help-content'); return help.scrollWidth - help.clientWidth }") <= 1
    page.wait_for_function("() => [...document.querySelectorAll('.node-help-content img')].every(image => image.complete)")
    widths = page.evaluate("() => [...document.querySelectorAll('.node-help-content img')].map(image => image.naturalWidth)")
    assert widths and all(widths)


@pytest.mark.parametrize("language", ["zh", "ja"])
@pytest.mark.parametrize("node_id", NODES)
def test_help_in_other_languages_is_served(server, node_id, language):
    """With the pictures of the English page, from the folder to which the panel relates them in every language."""
    text = server.get(f"/extensions/ComfyUI-FewStepSR/docs/{node_id}/{language}.md").decode()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert text.startswith("# ") and pictures
    assert pictures == re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8"))
    for picture in pictures:
        assert len(server.get(f"/extensions/ComfyUI-FewStepSR/docs/{picture}")) < 60_000


def set_widget(page, node_type: str, name: str, value) -> None:
    page.evaluate(
        "([type, name, value]) => { app.graph._nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = value }",
        [node_type, name, value],
    )


def test_an_error_is_seen(page, server):
    """A node's message is in the page's error panel, behind the button of the notice that comes up."""
    shutil.copy(server.base / "models" / "invsr" / "noise_predictor_sd_turbo_v5.pth", server.base / "models" / "osediff")
    open_in_view(page, "osediff_x4")
    set_widget(page, "OSEDiffLoader", "osediff_name", "noise_predictor_sd_turbo_v5.pth")
    page.evaluate("() => app.queuePrompt(0)")
    page.get_by_text("View details").first.click()
    page.get_by_text("found an InvSR noise predictor; expected an OSEDiff adapter").first.wait_for()


def test_a_missing_file_is_seen(page):
    """What the loader says before the run is in the panel, too, and the run does not start."""
    open_in_view(page, "osediff_x4")
    set_widget(page, "OSEDiffLoader", "osediff_name", "osediff_face.pkl")
    page.evaluate("() => app.queuePrompt(0)")
    page.get_by_text("View details").first.click()
    page.get_by_label("Info for Load OSEDiff - osediff_name").click()
    page.get_by_text("expected osediff_face.pkl. osediff.pkl is at github.com/cswry/OSEDiff").first.wait_for()


def test_a_warning_is_seen_on_the_node(page):
    """An odd setting runs and says so on the node, until it is mended."""
    open_in_view(page, "osediff_x4")
    for strength, text in ((10.0, "strength_model: found 10, expected 1 (0 to 2)"), (1.0, "No warnings.")):
        set_widget(page, "OSEDiffLoader", "strength_model", strength)
        page.evaluate("() => app.queuePrompt(0)")
        page.get_by_text(text).first.wait_for(timeout=120_000)


def all_nodes(workflow: dict) -> list[dict]:
    """With those inside its subgraphs."""
    return workflow["nodes"] + [node for graph in workflow.get("definitions", {}).get("subgraphs", []) for node in graph["nodes"]]


def test_templates_name_the_sources_of_the_docs():
    readme = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/osediff.md"))
    nodes = [node for path in TEMPLATES for node in all_nodes(json.loads(path.read_text()))]
    named = {(model["name"], model["directory"], model["url"]) for node in nodes for model in node["properties"].get("models", [])}
    ours = {name: (directory, url) for name, directory, url in named if f"`{name}`" in readme}
    assert set(ours) == {"v2-1_512-ema-pruned.safetensors", "sd_turbo.safetensors", "noise_predictor_sd_turbo_v5.pth", "ram_swin_large_14m.pth"}
    for name, (directory, url) in ours.items():
        repository, _, path = url.partition("/resolve/main/")
        assert path == name and f"`{directory}`" in readme
        assert any(f"`{name}`" in line and f"({repository}" in line for line in readme.splitlines())


@pytest.mark.parametrize("path", [path for path in TEMPLATES if not path.stem.startswith("1 Try")], ids=lambda p: p.stem)
def test_missing_models_are_offered(new_page, path):
    """Each weight file that a template names a source for is in the page's list of missing models, with a button to download it."""
    workflow = json.loads(path.read_text())
    new_page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    new_page.get_by_text("View details").first.click()
    listed = new_page.get_by_test_id("error-group-missing-model")
    models = {model["name"]: model for node in all_nodes(workflow) for model in node["properties"].get("models", [])}.values()
    assert models
    for model in models:
        listed.get_by_text(model["name"]).first.wait_for()
    assert listed.get_by_test_id("missing-model-download").count() == len(models)


def test_an_empty_folder_says_so(new_page):
    add_node(new_page, "InvSRNoisePredictorLoader")
    assert new_page.evaluate("() => app.graph._nodes[0].widgets[0].value") == "models/invsr is empty"
