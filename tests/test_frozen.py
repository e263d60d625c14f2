"""What saved workflows and API prompts rely on stays: node ids, inputs in their order with types and defaults, outputs.

``FEWSTEP_SR_FREEZE=1 python -m pytest tests/test_frozen.py`` writes an addition down. What is released is never changed or taken away:
widget values are saved by position, so that a new input goes to the end and has a default.
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
            assert found[node_id][part][: len(node[part])] == node[part], f"saved workflows rely on {node_id}'s {part}: see the head of this file"
    if os.environ.get("FEWSTEP_SR_FREEZE"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(SNAPSHOT.read_text()), "an addition: write it down as the head of this file says"
