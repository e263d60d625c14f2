"""Templates under the names that they had: a link or a bookmark (``?template=osediff_x4&source=ComfyUI-FewStepSR``) keeps opening."""

import json
from pathlib import Path
from urllib.parse import quote

from aiohttp import web
from server import PromptServer

_RENAMED = Path(__file__).with_name("renamed_templates.json")
"""Old name -> today's, without suffixes."""


def serve_renamed(pack: str) -> None:
    """Send the page from a template's old address to today's. ``pack``: the folder's name in custom_nodes, by which the page asks."""
    server = getattr(PromptServer, "instance", None)
    if server is None:  # nodes without a page
        return
    for old, new in json.loads(_RENAMED.read_text(encoding="utf-8")).items():
        for suffix in (".json", ".jpg"):
            server.routes.get(f"/workflow_templates/{pack}/{old}{suffix}")(_send_to(f"/api/workflow_templates/{quote(pack)}/{quote(new)}{suffix}"))


def _send_to(address: str):
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound(address)

    return handler
