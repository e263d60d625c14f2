"""What the page says before a run, where a widget names a file that is not there, and during one, on the node itself."""

import logging
from collections.abc import Callable, Iterable
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
    if name is None:
        return True
    if not isinstance(name, str):
        return f"found {quoted(name)}, expected the name of a file in models/{folder}. Choose one in the widget."
    files = folder_paths.get_filename_list(folder)
    if name in files:
        return True
    name = published if name == _empty(folder) else quoted(name)
    here = folder_paths.get_folder_paths(folder)[0]
    found = ", ".join(files[:5]) + ", ..." * (len(files) > 5) or "no file"
    misplaced = _find_elsewhere(folder, Path(name.replace("\0", "")).name)
    action = f"It is at {misplaced}: move it into that folder" if misplaced else f"{source} Download it into that folder"
    return f"found {found} in {here}, expected {name}. {action}, and press R on the page."


def full_path(folder: str, name: str, widget: str, answer: Callable[[str], bool | str]) -> str:
    """Path of a model folder's file. A link brings names past ``validate_inputs``, whose ``answer`` says what is wrong with one.

    Raises:
        ValueError: there is no such file.
    """
    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    if path is None:
        raise ValueError(f"{widget}: {answer('' if name is None else name)}")
    return path


def require_choice(value: str, name: str, options: Iterable[str]) -> str:
    """Refuse what a combo does not list, which links can bring."""
    if value not in list(options):
        raise ValueError(f"{name}: found {quoted(value)}, expected {listing(options, 'or')}.")
    return value


def listing(words: Iterable[str], last: str = "and") -> str:
    """Words as a sentence has them: "a, b and c"."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


def quoted(value) -> str:
    """A widget's value for a message: of bounded length, and of characters that can be written anywhere."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
    return text.encode("utf-8", "backslashreplace").decode()


LONGEST = 120
"""Characters of a widget's value that a message repeats."""

LONGEST_TEXT = 100_000
"""Characters that a text widget may hold: a prompt has a few hundred."""


def require_text(value: str, name: str) -> str:
    """Refuse what is no text, or none that can be shown and saved."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {quoted(value)}, expected text.")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"{name}: found {len(value)} characters, expected {LONGEST_TEXT} at most. Look at what is wired to it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: found half a character (a lone surrogate) at position {error.start}, expected text. Type it again.") from None
    return value


def require_number(value: float, name: str, low: float, high: float) -> float:
    """Refuse NaN and what lies outside a widget's range, which links and the API can bring."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN compares false
        raise ValueError(f"{name}: found {quoted(value)}, expected a number from {low:g} to {high:g}.")
    return value


def fingerprint(folder: str, *names: str | None, beside: Iterable[str] = ()) -> list[tuple]:
    """By which ComfyUI sees that files of a model folder were written over under the same name, so that it reads them again.

    Args:
        names: the widgets' values; a name that a link brings is not known yet (None), and stands for every file.
        beside: files that count too where they lie beside one of these.
    """
    names = folder_paths.get_filename_list(folder) if None in names else names
    files = [Path(path) for name in names if isinstance(name, str) and (path := folder_paths.get_full_path(folder, name))]
    files += sorted({file.parent / name for file in files for name in beside if (file.parent / name).is_file()})
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


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
