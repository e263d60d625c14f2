"""Names and tooltips in the page's languages: each node, input and output is there, nothing stale, and ComfyUI serves them."""

import importlib
import json
import re

import pytest
from conftest import ROOT

LANGUAGES = ("en", "zh", "ja")


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture
def in_english(comfy) -> dict:
    """What the schemas say, in the form of the locales; a socket without a name of its own goes by its id or type."""
    schemas = {n: node.define_schema() for n, node in comfy.nodes.items() if getattr(node, "RELATIVE_PYTHON_MODULE", "").startswith("custom_nodes.")}
    return {
        node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {str(i): {"name": entry.display_name or entry.io_type, "tooltip": entry.tooltip} for i, entry in enumerate(schema.outputs)},
        }
        for node_id, schema in schemas.items()
    }


def texts(tree, path=()):
    for key, value in tree.items():
        yield from texts(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def test_english_is_the_schemas(in_english):
    assert locale("en") == in_english


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_everything_is_translated(language, in_english):
    translated = dict(texts(locale(language)))
    english = dict(texts(in_english))
    assert translated.keys() == english.keys()
    assert all(text.strip() for text in translated.values())
    untranslated = [path for path, text in translated.items() if path[-1] != "name" and text == english[path]]
    assert not untranslated


def test_comfyui_serves_them(comfy, monkeypatch, tmp_path):
    (tmp_path / "ComfyUI-FewStepSR").symlink_to(ROOT, target_is_directory=True)
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    served = importlib.import_module("app.custom_node_manager").CustomNodeManager().build_translations()
    assert {language: served[language]["nodeDefs"] for language in LANGUAGES} == {language: locale(language) for language in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_calls_things_as_the_page_does(language, comfy, in_english):
    """The help panel is narrow: lists, no tables. Its title is the node's, and each widget goes by its name on the page."""
    for node_id, names in locale(language).items():
        path = ROOT / "web" / "docs" / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {names['display_name']}\n") and "\n|" not in text, path
        for entry in comfy.nodes[node_id].define_schema().inputs:
            if getattr(entry, "default", None) is not None:
                name = entry.id if language == "en" else f"{names['inputs'][entry.id]['name']}\uff08{entry.id}\uff09"
                assert any(line.startswith("- **") and name in line.split("**")[1] for line in text.splitlines()), (path, name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_loaders_help_has_the_links(language):
    """In every language the same, and those that the README has."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs" / "osediff.md").read_text(encoding="utf-8")
    for node_id in ("OSEDiffLoader", "FewStepSRAdapterLoader", "InvSRNoisePredictorLoader", "S3DiffEstimatorLoader", "DAPETaggerLoader"):
        pages = [f"{node_id}.md", f"{node_id}/{language}.md"] if language != "en" else [f"{node_id}.md"]
        links = [re.findall(r"\]\((https:[^)]+)\)", (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")) for page in pages]
        assert links[0] and links[0] == links[-1]
        assert all(re.sub(r"/(resolve|raw)/.*", "", link).replace("/spaces", "") in readme.replace("/spaces", "") for link in links[0])


def test_the_command_line_calls_nodes_as_the_page_does():
    shown = {names["display_name"] for names in locale("en").values()}
    named = {name for path in (ROOT / "pipelines").rglob("*.py") for name in re.findall(r"\bnode '([^']+)'", path.read_text(encoding="utf-8"))}
    assert {"Load OSEDiff", "Load InvSR Noise Predictor"} <= named <= shown
