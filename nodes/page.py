"""What the page says before a run, where a widget names a file that is not there, and during one, on the node itself."""

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..fewstep_sr.methods.method import Method


def list_files(folder: str) -> list[str]:
    """A model folder's files for a widget. Where there is none it says so, since the page shows an empty list as "undefined" and sends nothing."""
    return folder_paths.get_filename_list(folder) or [_empty(folder)]


def _empty(folder: str) -> str:
    return f"models/{folder} is empty"


def find_listed(published: Method, name: str | None) -> bool | str:
    """:func:`find_in_folder` for a method's weights."""
    return find_in_folder(published.weights.folder, name, published.published_name, published.source)


def find_in_folder(folder: str, name: str | None, published: str, source: str) -> bool | str:
    """Whether a model folder has a file of that name, as ``validate_inputs`` answers: True, or what to do.

    Args:
        folder: the folder's kind, such as "osediff".
        name: the widget's value; None where another node's output is wired to it.
        published: the authors' file.
        source: a sentence that says where that can be had.
    """
    files = folder_paths.get_filename_list(folder)
    if name is None or name in files:
        return True
    name = published if name == _empty(folder) else name
    here = folder_paths.get_folder_paths(folder)[0]
    found = ", ".join(files[:5]) + ", ..." * (len(files) > 5) or "no file"
    misplaced = _find_elsewhere(folder, Path(name).name)
    action = f"It is at {misplaced}: move it there" if misplaced else f"{source} Put it there"
    return f"found {found} in {here}, expected {name}. {action}, and press R on the page."


def _find_elsewhere(folder: str, name: str) -> str | None:
    """Path of a file of that name in another kind's model folder."""
    for kind in folder_paths.folder_names_and_paths:
        if kind not in (folder, "custom_nodes", "configs"):
            for file in folder_paths.get_filename_list(kind):
                if Path(file).name == name:
                    return folder_paths.get_full_path(kind, file)
    return None


_warned: set[str] = set()
"""Nodes of the page that show a warning, which the page itself never takes away."""


def warn(node: type[io.ComfyNode], warnings: list[str]) -> None:
    """Say what will probably spoil the result, if anything: in the log, and on the node where a page shows one."""
    for warning in warnings:
        logging.warning("%s: %s", node.define_schema().display_name, warning)
    if node.hidden and (warnings or node.hidden.unique_id in _warned):  # run by the server
        PromptServer.instance.send_progress_text("\n".join(warnings) or "No warnings.", node.hidden.unique_id)
        (_warned.add if warnings else _warned.discard)(node.hidden.unique_id)
