"""What saved workflows and API prompts rely on stays: node ids, inputs in their order with types and defaults, outputs.

``FEWSTEP_SR_FREEZE=1 python -m pytest tests/test_frozen.py`` writes an addition down. What is released is never changed or taken away:
widget values are saved by position, so that a new input goes to the end and has a default. A choice is saved by its text: options may be
appended to a list of them, never renamed, reordered or taken away.
"""

import json
import os

from conftest import ROOT

SNAPSHOT = ROOT / "tests" / "fixtures" / "nodes.json"
FROZEN_OPTIONS = ("default", "min", "max", "step", "control_after_generate", "multiline")


def frozen(entry) -> dict:
    """An input's name, type and what its widget does; lists of files differ from machine to machine and are left out."""
    options = {k: getattr(entry, k) for k in FROZEN_OPTIONS if getattr(entry, k, None) is not None}
    if entry.io_type == "COMBO" and not entry.id.endswith("_name"):
        options["options"] = entry.options
    return {"name": entry.id, "type": entry.io_type, "optional": entry.optional, **options}


def kept(found: list[dict], released: list[dict]) -> list[dict]:
    """The entries that were released, as they are now, without what was appended since."""
    return [
        now | {"options": now["options"][: len(then["options"])]} if "options" in then else now for now, then in zip(found, released, strict=False)
    ]


def test_only_appending_is_no_change():
    def choice(*options):
        return [{"name": "method", "type": "COMBO", "default": "a", "options": list(options)}]

    assert kept(choice("a", "b", "c"), choice("a", "b")) == choice("a", "b")
    for changed in (choice("a", "c"), choice("b", "a"), choice("a"), [choice("a", "b")[0] | {"default": "b"}]):
        assert kept(changed, choice("a", "b")) != choice("a", "b")
    assert kept([], choice("a", "b")) != choice("a", "b")


def test_nodes_are_as_released(comfy):
    schemas = {n: node.define_schema() for n, node in comfy.nodes.items() if getattr(node, "RELATIVE_PYTHON_MODULE", "").startswith("custom_nodes.")}
    found = {
        node_id: {
            "inputs": [frozen(entry) for entry in schema.inputs],
            "outputs": [{"type": entry.io_type, "list": entry.is_output_list} for entry in schema.outputs],
            "output_node": schema.is_output_node,
        }
        for node_id, schema in sorted(schemas.items())
    }
    for node_id, node in json.loads(SNAPSHOT.read_text()).items():
        for part in ("inputs", "outputs"):
            assert kept(found[node_id][part], node[part]) == node[part], f"saved workflows rely on {node_id}'s {part}: see the head of this file"
    if os.environ.get("FEWSTEP_SR_FREEZE"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(SNAPSHOT.read_text()), "an addition: write it down as the head of this file says"
