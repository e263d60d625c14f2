"""A real ComfyUI server as a process of its own, and its HTTP interface as the web page uses it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """``Server(comfyui, base)`` starts ComfyUI on a free port with the pack in its custom_nodes; use it as a context manager.

    ``base`` is its base directory; files go into ``base / "models"`` and so on before the start. FEWSTEP_SR_FRONTEND names the ``static`` folder of
    another comfyui-frontend-package than the installed one.
    """

    def __init__(self, comfyui: Path, base: Path):
        custom_nodes = base / "custom_nodes"
        custom_nodes.mkdir(parents=True, exist_ok=True)
        link = custom_nodes / "ComfyUI-FewStepSR"
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base, self.url = base, f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base)]
        arguments += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        if frontend := os.environ.get("FEWSTEP_SR_FRONTEND"):
            arguments += ["--front-end-root", frontend]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen([sys.executable, str(comfyui / "main.py"), *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=base)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log[-3000:]}"
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise TimeoutError(f"ComfyUI did not answer within 600 s:\n{self.log[-3000:]}")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @cached_property
    def schemas(self) -> dict:
        """Every node's inputs, as they were when first asked for: what a choice lists may be out of date."""
        return self.get("/object_info")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def run(self, prompt: dict, timeout: float = 900) -> dict:
        """Queue an API-format prompt and wait. Returns the history entry; fails with the node's own message where a node failed."""
        answer = self._queue(prompt)
        assert "prompt_id" in answer, f"the server refused the prompt: {json.dumps(answer)}"
        entry = self._wait(answer["prompt_id"], timeout)
        messages = [error["exception_message"] for error in execution_errors(entry)]
        assert entry["status"]["status_str"] == "success", messages or self.log[-3000:]
        return entry

    def mistake(self, prompt: dict, timeout: float = 900) -> tuple[str, str]:
        """Queue a prompt that must fail, at once or in a node. Returns the class of the node that the page outlines, and what it says."""
        answer = self._queue(prompt)
        if "prompt_id" not in answer:
            [node] = answer["node_errors"].values()
            return node["class_type"], " ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        errors = execution_errors(self._wait(answer["prompt_id"], timeout))
        assert errors, "the prompt ran without an error"
        return errors[0]["node_type"], errors[0]["exception_message"].strip()

    def _queue(self, prompt: dict) -> dict:
        request = urllib.request.Request(self.url + "/prompt", json.dumps({"prompt": prompt}).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def _wait(self, prompt_id: str, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log[-3000:]}"
            history = self.get(f"/history/{prompt_id}")
            if entry := history.get(prompt_id):
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"the prompt did not finish within {timeout} s:\n{self.log[-3000:]}")

    def image(self, output: dict):
        """One entry of a node's ``images`` as a Pillow image."""
        import io
        from urllib.parse import urlencode

        from PIL import Image

        return Image.open(io.BytesIO(self.get("/view?" + urlencode(output))))


def execution_errors(entry: dict) -> list[dict]:
    """What nodes raised in a run, from its history entry."""
    return [content for kind, content in entry["status"]["messages"] if kind == "execution_error"]


LATER_WIDGETS = {("SaveVideo", "format.codec")}
"""Widgets of core nodes that the oldest ComfyUI does not have yet; its page leaves their values out."""


def _widget_values(node: dict, info: dict) -> list:
    """A node's saved values in the order of its widgets, without those of widgets that this ComfyUI does not have yet."""
    values = node.get("widgets_values") or []
    names = list(node.get("widgets_values_named") or [])
    known = {**info["input"].get("required", {}), **info["input"].get("optional", {})}

    def too_late(name: str) -> bool:
        parent = name.split(".")[0]
        return (node["type"], name) in LATER_WIDGETS and known[parent][0] != "COMFY_DYNAMICCOMBO_V3"

    return [value for i, value in enumerate(values) if i >= len(names) or not too_late(names[i])]


def unfold(workflow: dict) -> dict:
    """A workflow without subgraphs: the nodes of each in the place of the node that stands for it, by the ids that the page gives them, ``outer:inner``."""
    graphs = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes, links, inside, outside = [], [], {}, {}
    for node in workflow["nodes"]:
        graph = graphs.get(node["type"])
        if graph is None:
            nodes.append(node)
            continue
        own = json.loads(json.dumps(graph["nodes"]))
        by_id = {each["id"]: each for each in own}
        values = dict(zip([name for _, name in node["properties"]["proxyWidgets"]], node["widgets_values"], strict=True))
        for link in graph["links"]:
            if link["origin_id"] == -10:
                entry, target = graph["inputs"][link["origin_slot"]], by_id[link["target_id"]]
                socket = target["inputs"][link["target_slot"]]
                socket["link"] = None
                inside.setdefault((node["id"], link["origin_slot"]), []).append((f"{node['id']}:{target['id']}", link["target_slot"], socket))
                if entry["name"] in values:
                    target["widgets_values"][list(target["widgets_values_named"]).index(socket["name"])] = values[entry["name"]]
            elif link["target_id"] == -20:
                outside[node["id"], link["target_slot"]] = (f"{node['id']}:{link['origin_id']}", link["origin_slot"])
            else:
                name = f"{node['id']}:{link['id']}"
                by_id[link["target_id"]]["inputs"][link["target_slot"]]["link"] = name
                links.append(
                    [
                        name,
                        f"{node['id']}:{link['origin_id']}",
                        link["origin_slot"],
                        f"{node['id']}:{link['target_id']}",
                        link["target_slot"],
                        link["type"],
                    ]
                )
        nodes += [{**each, "id": f"{node['id']}:{each['id']}"} for each in own]
    for name, origin, slot, target, target_slot, kind in workflow["links"]:
        origin, slot = outside.get((origin, slot), (origin, slot))
        for i, (node, socket_slot, socket) in enumerate(inside.get((target, target_slot), [])):
            socket["link"] = f"{name}.{i}"
            links.append([socket["link"], origin, slot, node, socket_slot, kind])
        if (target, target_slot) not in inside:
            links.append([name, origin, slot, target, target_slot, kind])
    return {**workflow, "nodes": nodes, "links": links}


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """A workflow as the page saves it -> the prompt that the page queues (nodes, widgets and links, subgraphs unfolded)."""
    workflow = unfold(workflow)
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode", 0) in (2, 4):
            continue
        info = object_info[node["type"]]
        sockets = {i["name"]: i.get("link") for i in node.get("inputs", [])}
        values = iter(_widget_values(node, info))
        inputs = {}
        for name, spec in [*info["input"].get("required", {}).items(), *info["input"].get("optional", {}).items()]:
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[name] = next(values, options.get("default"))  # a widget that came after the workflow was saved
                if options.get("control_after_generate") or options.get("image_upload") or options.get("video_upload"):
                    next(values)
            if kind == "COMFY_DYNAMICCOMBO_V3":  # a choice, then the widgets that it brings, named "choice.widget"
                inputs |= {socket: next(values) for socket in sockets if socket.split(".")[0] == name}
            if kind == "COMFY_AUTOGROW_V3":  # as many sockets as are needed, named "values.a"
                for socket, link in sockets.items():
                    if socket.split(".")[0] == name and link is not None:
                        inputs[socket] = [str(links[link][1]), links[link][2]]
            if kind == "IMAGECOMPARE":  # the page's slider, of which the node makes nothing
                inputs[name] = ""
            if sockets.get(name) is not None:
                _, source, slot, *_ = links[sockets[name]]
                inputs[name] = [str(source), slot]
        assert next(values, None) is None, f"node {node['id']} ({node['type']}) has more widget values than widgets"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
