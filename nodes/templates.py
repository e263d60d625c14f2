"""Templates in their order, and under the names that they had: a link (``?template=osediff_x4&source=ComfyUI-FewStepSR``) keeps opening."""

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


def list_in_order(pack: str) -> None:
    """Sort the pack's templates by name: ComfyUI lists them as the file system happens to, and the page shows them in that order."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @web.middleware
    async def sort_templates(request: web.Request, handler) -> web.StreamResponse:
        response = await handler(request)
        if request.path not in ("/workflow_templates", "/api/workflow_templates"):
            return response
        templates = json.loads(response.text)
        return web.json_response(templates | {pack: sorted(templates[pack])}) if pack in templates else response

    server.app.middlewares.append(sort_templates)


def _send_to(address: str):
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound(address)

    return handler
