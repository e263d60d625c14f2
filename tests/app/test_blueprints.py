"""Blueprints: ComfyUI lists them, and they are the example workflows' stages with the same values."""

import asyncio
import importlib
import json

import pytest
from conftest import ROOT

METHODS = ("OSEDiff", "PiSA-SR", "HYPIR", "S3Diff", "InvSR")
# What people search for is in the name: of a pack's blueprints the page searches nothing else, and of a name the first 30 characters.
BLUEPRINTS = {f"Restore Enhance Upscale Super Resolution ({method})": f"{method} x4, step by step" for method in METHODS}
OUTSIDE = {"LoadImage", "SaveImage", "MarkdownNote", "ImageCompare"}
SIZE = {"ImageScaleBy", "PrimitiveInt", "GetImageSize", "ComfyMathExpression", "ImageScaleToMaxDimension"}
"""The blueprint takes a longest side, and a limit to the input's size, where the template has a factor."""


def stages(nodes: list[dict]) -> dict:
    """By the template's ids; a blueprint's are shifted by hundreds, since the page renumbers those that two graphs of a workflow share."""
    return {node["id"] % 100: (node["type"], node.get("widgets_values")) for node in nodes if node["type"] not in OUTSIDE | SIZE}


def test_comfyui_lists_them(comfy, monkeypatch, tmp_path):
    (tmp_path / "ComfyUI-FewStepSR").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(importlib.import_module("folder_paths"), "get_folder_paths", lambda kind: [str(tmp_path)])
    manager = importlib.import_module("app.subgraph_manager").SubgraphManager()
    listed = asyncio.run(manager.get_custom_node_subgraphs([]))
    assert {entry["name"] for entry in listed.values()} == set(BLUEPRINTS)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_unfolds_into_the_example(name):
    blueprint = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())
    (instance,), (graph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    workflow = json.loads((ROOT / "example_workflows" / f"{BLUEPRINTS[name]}.json").read_text())
    assert instance["type"] == graph["id"] and instance["title"] == graph["name"] == name
    assert stages(graph["nodes"]) == stages(workflow["nodes"])

    inside = set(stages(graph["nodes"]))
    between = [k for k in graph["links"] if k["origin_id"] > 0 and k["target_id"] > 0]
    wires = {(k["origin_id"] % 100, k["origin_slot"], k["target_id"] % 100, k["target_slot"]) for k in between}
    assert {w for w in wires if w[0] in inside and w[2] in inside} == {tuple(k[1:5]) for k in workflow["links"] if {k[1], k[3]} <= inside}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_each_socket_leads_to_an_input(name):
    """Every outer input ends at inputs of its type, every link is known at both ends, and each widget starts with the stage's value."""
    blueprint = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())
    (instance,), (graph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    nodes, links = {node["id"]: node for node in graph["nodes"]}, {link["id"]: link for link in graph["links"]}
    assert all(name.lower().find(word) in range(31) for word in ("super", "resolution", "restore", "enhance", "upscale"))
    assert [entry["name"] for entry in graph["inputs"]] == [entry["name"] for entry in instance["inputs"]]
    for slot, entry in enumerate(graph["inputs"]):
        assert entry["linkIds"]
        for link in (links[i] for i in entry["linkIds"]):
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert (link["origin_id"], link["origin_slot"], target["link"], target["type"]) == (-10, slot, link["id"], entry["type"])
    values = dict(zip([widget for _, widget in instance["properties"]["proxyWidgets"]], instance["widgets_values"], strict=True))
    assert values.keys() == {entry["name"] for entry in instance["inputs"] if "widget" in entry}
    for entry in graph["inputs"]:
        if entry["name"] in values:
            assert values[entry["name"]] in nodes[links[entry["linkIds"][0]]["target_id"]]["widgets_values"]
    for entry in graph["outputs"]:
        assert {link["target_id"] for link in links.values() if link["id"] in entry["linkIds"]} == {-20}


@pytest.mark.parametrize("method", METHODS)
def test_each_is_in_a_folder_of_its_methods_name(method):
    """The library's side bar cuts the names, which begin alike, so the folder has to tell them apart."""
    [name] = [name for name in BLUEPRINTS if f"({method})" in name]
    [graph] = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())["definitions"]["subgraphs"]
    assert graph["category"] == f"Image Tools/Upscale/{method}"


@pytest.mark.parametrize("method", METHODS)
def test_one_photo_is_the_blueprint(method):
    [name] = [name for name in BLUEPRINTS if f"({method})" in name]
    [blueprint] = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())["definitions"]["subgraphs"]
    workflow = json.loads((ROOT / "example_workflows" / f"2 Restore one photo ({method}).json").read_text())
    assert workflow["definitions"]["subgraphs"] == [blueprint]
    assert {node["type"] for node in workflow["nodes"]} == {"LoadImage", blueprint["id"], "ImageCompare", "SaveImage", "MarkdownNote"}


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_the_colour_fix_is_the_methods_default(path):
    """On the page as in the pipelines and on the command line; the miniature's, and templates that compare colour fixes, are others."""
    from fewstep_sr.methods import METHODS as RECORDS

    if path.stem.startswith("1 Try") or path.stem == "Fidelity or detail (OSEDiff)":
        return
    workflow = json.loads(path.read_text())
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    by_loader = {"OSEDiffLoader": "osediff", "InvSRNoisePredictorLoader": "invsr", "InvSRStartState": "invsr"}
    for graph in graphs:
        fixes = [node for node in graph["nodes"] if node["type"] == "FewStepSRColorFix"]
        kinds = {by_loader[node["type"]] for node in graph["nodes"] if node["type"] in by_loader}
        kinds |= {node["widgets_values"][0].split("/")[0] for node in graph["nodes"] if node["type"] == "FewStepSRAdapterLoader"}
        if fixes and kinds:
            [kind] = kinds
            assert {node["widgets_values"][0] for node in fixes} == {RECORDS[kind].color_fix or "none"}


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_no_two_graphs_of_a_template_share_an_id(path):
    workflow = json.loads(path.read_text())
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    ids = [node["id"] for graph in graphs for node in graph["nodes"]]
    assert len(ids) == len(set(ids))
