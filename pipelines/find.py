"""Where weights are: given by name, in a ComfyUI's models folder, in the cache; fetched only when the user says so."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from fewstep_sr.methods.method import Method, Source


def find_base(method: Method, given: str | None, comfyui: Path | None, download: bool) -> str:
    """:func:`find` for the diffusion model that a method is on."""
    return find(method.base, "--base", given, comfyui, download)


def find_weights(method: Method, given: str | None, comfyui: Path | None, download: bool) -> str:
    """:func:`find` for a method's own weights."""
    return find(method.weights, "--weights", given, comfyui, download)


def find_companions(method: Method, options: Mapping[str, Any], comfyui: Path | None, download: bool) -> dict[str, Path | None]:
    """:func:`find` for the files that a method needs beside its weights, by their options' names; None where other options replace one."""
    found: dict[str, Path | None] = {}
    for companion in method.companions:
        given = options.get(companion.option)
        needed = companion.is_needed(options)
        found[companion.option] = Path(find(companion.weights, f"--{companion.option}", given and str(given), comfyui, download)) if needed else None
    return found


def find(source: Source, option: str, given: str | None, comfyui: Path | None, download: bool) -> str:
    """A path or, for a base, a hub id that is in the cache or may be fetched.

    Args:
        option: the command line's, for messages.
        given: the user's own path, name of a file in the ComfyUI's folder, or (bases) hub id; None looks for the published ones.
        comfyui: a ComfyUI with a ``models`` folder.

    Raises:
        FileNotFoundError: it is nowhere, or cannot be fetched; the message says where it was looked for, where to put it and how to have it fetched.
    """
    folder = comfyui / "models" / source.folder if comfyui else None
    for name in (given,) if given else source.names:
        places = [Path(name).expanduser()] if given else []
        places += [folder / name] if folder else []
        if found := next((place for place in places if place.exists()), None):
            return str(found)
    if given:
        is_hub_id = option == "--base" and given.count("/") == 1 and not given.startswith((".", "/", "~"))
        if is_hub_id and (download or _cached(given, "model_index.json")):
            return given
        hint = f" (or, if it is a hub id, add --download to fetch it; licence: see https://huggingface.co/{given})" if is_hub_id else ""
        looked = f" or in {folder}" if folder else ""
        raise FileNotFoundError(f"{option}: there is no {given} here{looked}. Give the path of the file{hint}.")
    if cached := _published_in_cache(source):
        return cached
    if not download or source.by_hand:
        fetched = "It is linked from" if source.by_hand else "With --download it is fetched from"
        raise FileNotFoundError(
            f"{source.what} ({source.names[0]}) was not found: put it into {folder or '<ComfyUI>/models/' + source.folder} and name that ComfyUI "
            f"with --comfyui or COMFYUI_PATH, or give its path with {option}. {fetched} "
            f"{source.page} (licence: {source.licence})."
        )
    print(f"Fetching {source.what}. Licence: {source.licence}", file=sys.stderr)
    try:
        return _fetch(source)
    except OSError as error:  # no connection, no such page, no licence agreed to; the hub's and urllib's errors are among them
        raise FileNotFoundError(
            f"{source.what} ({source.names[0]}) could not be fetched from {source.page}: {error}. Check the connection, or fetch it by hand and give "
            f"its path with {option}."
        ) from error


def _fetch(source: Source) -> str:
    if source.url:
        target = _hub_folder() / Path(source.url).name
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source.url, str(target))
        return str(target)
    return str(hf_hub_download(source.repository, source.file) if source.file else source.repository)


def _published_in_cache(source: Source) -> str | None:
    if source.url:
        target = _hub_folder() / Path(source.url).name
        return str(target) if target.is_file() else None
    cached = source.repository and _cached(source.repository, source.file or "model_index.json")
    return (cached if source.file else source.repository) if cached else None


def _cached(repository: str, file: str) -> str | None:
    found = try_to_load_from_cache(repository, file)
    return found if isinstance(found, str) else None


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
