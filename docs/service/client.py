"""Restore a picture on a ComfyUI server, with progress. With ComfyUI's Python, or another with aiohttp:

python client.py cat.png cat_x4.png --server http://127.0.0.1:8188 --workflow osediff.json
"""

import argparse
import asyncio
import json
import uuid
from pathlib import Path

try:
    import aiohttp
except ImportError as error:
    raise SystemExit("aiohttp is not installed. Run this with ComfyUI's Python, or: python -m pip install aiohttp") from error


async def upscale(server: str, workflow: dict, source: Path, target: Path) -> None:
    client = uuid.uuid4().hex
    async with aiohttp.ClientSession(server) as session, session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as events:
        form = aiohttp.FormData()
        form.add_field("image", source.read_bytes(), filename=f"{client}{source.suffix}")
        async with session.post("/upload/image", data=form) as answer:
            answer.raise_for_status()
            uploaded = await answer.json()
        for node in workflow.values():
            if node["class_type"] == "LoadImage":
                node["inputs"]["image"] = uploaded["name"]
        async with session.post("/prompt", json={"prompt": workflow, "client_id": client}) as answer:
            queued = await answer.json()
        if "prompt_id" not in queued:
            raise SystemExit(f"the server refused the workflow: {json.dumps(queued, indent=2)}")
        await finished(events, queued["prompt_id"], workflow)
        async with session.get(f"/history/{queued['prompt_id']}") as answer:
            outputs = (await answer.json())[queued["prompt_id"]]["outputs"]
        images = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
        if len(images) != 1:
            raise SystemExit(f"the workflow: found {len(images)} saved images, expected 1. Leave one Save Image in it.")
        (image,) = images
        async with session.get("/view", params=image) as answer:
            target.write_bytes(await answer.read())
    print(f"{target} written")


async def finished(events: aiohttp.ClientWebSocketResponse, prompt_id: str, workflow: dict) -> None:
    """Print what the server says of this prompt until it is done."""
    async for message in events:
        if message.type != aiohttp.WSMsgType.TEXT:  # previews
            continue
        event = json.loads(message.data)
        data = event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        if event["type"] == "executing":
            if data["node"] is None:  # done, and in the history: execution_success comes before that
                return
            print(workflow[data["node"]]["class_type"], flush=True)
        elif event["type"] == "progress":
            print(f"  {data['value']} of {data['max']}", flush=True)
        elif event["type"] == "execution_error":
            raise SystemExit(f"{data['node_type']}: {data['exception_message']}")
        elif event["type"] == "execution_interrupted":
            raise SystemExit("stopped on the server")
    raise SystemExit("the server closed the connection")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--workflow", type=Path, default=Path(__file__).with_name("osediff.json"))
    arguments = parser.parse_args()
    for path in (arguments.source, arguments.workflow):
        if not path.is_file():
            raise SystemExit(f"{path}: there is no such file.")
    if not arguments.target.absolute().parent.is_dir():
        raise SystemExit(f"{arguments.target.parent}: there is no such folder. Create it first.")
    try:
        workflow = json.loads(arguments.workflow.read_text(encoding="utf-8"))
    except ValueError:
        workflow = None
    if not isinstance(workflow, dict) or not all(isinstance(node, dict) and "class_type" in node for node in workflow.values()):
        raise SystemExit(f"{arguments.workflow}: found no workflow in API format. Save one with Export (API) in ComfyUI's File menu.")
    try:
        asyncio.run(upscale(arguments.server, workflow, arguments.source, arguments.target))
    except aiohttp.ClientConnectionError as error:
        raise SystemExit(f"{arguments.server}: no server answers ({error}). Start ComfyUI, or give its address with --server.") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise SystemExit(f"{arguments.server}: found no ComfyUI there ({error}). Give its address with --server.") from None
