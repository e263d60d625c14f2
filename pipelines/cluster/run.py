"""The driver of ``upscale --ray``: it streams the listing, drops what the manifest says is done, hands blocks to the workers and writes down what became of them."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fewstep_sr.image.formats import WRITTEN, readable

from ..files import size_in_words
from ..processes import launched
from ..settings import Settings
from .files import is_remote, open_address
from .listing import Item, list_items, pack
from .manifest import Manifest
from .pool import Ahead, Pool
from .worker import Worker

_AHEAD = 1000
"""Blocks whose pictures are listed, and their headers read, before workers ask for them."""


def require_ray() -> Any:
    """Ray, with fsspec.

    Raises:
        RuntimeError: one of them is missing or broken.
    """
    try:
        import fsspec  # noqa: F401
        import ray
        import ray.exceptions
    except Exception as error:
        raise RuntimeError(
            f"--ray needs Ray and fsspec, which cannot be imported ({error or type(error).__name__}). "
            "Install them on every machine: pip install ray fsspec (and s3fs for S3)."
        ) from error
    return ray


def upscale_on_cluster(settings: Settings) -> int:
    """Restore all pictures on the cluster. Returns 1 where some failed, else 0.

    Raises:
        RuntimeError: Ray is missing, no cluster is there, or none of its machines can work.
        FileNotFoundError: an input is nowhere, or there is no picture in any.
        ValueError: options that do not go together.
    """
    output = _output(settings)
    _require_cluster(settings)
    ray = require_ray()
    for address in (*settings.inputs, output):
        _require_address(address)
    began = time.monotonic()
    _join(ray, settings.ray or "")
    try:
        manifest = Manifest(output, settings)
    except Exception as error:  # fsspec's packages have errors of their own, such as a lack of credentials
        raise RuntimeError(f"-o: {output} cannot be reached ({error or type(error).__name__}).") from error
    seen = skipped = 0

    def todo() -> Iterator[Item]:
        nonlocal seen, skipped
        for seen, item in enumerate(list_items(settings.inputs, output, settings.suffix), 1):
            if item in manifest:
                skipped += 1
            else:
                yield item

    blocks = Ahead(pack(todo(), settings), _AHEAD)
    written, size = 0, 0
    failures: list[tuple[str, str]] = []
    pool, ended = None, None
    try:
        resource = "GPU" if settings.device == "cuda" or (settings.device is None and ray.cluster_resources().get("GPU", 0) >= 1) else "CPU"
        pool = Pool(ray, Worker, resource, for_workers(settings, resource))
        with tqdm(unit="picture", dynamic_ncols=True) as bar:
            for row in pool.run(blocks):
                bar.update()
                if row.error is not None:
                    failures.append((row.item.source, row.error))
                    tqdm.write(f"{row.item.source}: {row.error}", file=sys.stderr)
                else:
                    manifest.add(row.item)
                    written, size = written + 1, size + row.bytes
                for note in row.notes:
                    tqdm.write(f"{row.item.source}: note: {note}.", file=sys.stderr)
                while pool.notes:
                    tqdm.write(pool.notes.popleft(), file=sys.stderr)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        if not written:
            raise RuntimeError(str(error)) from error
        ended = error
    finally:
        blocks.close()
        if pool is not None:
            pool.close()
        manifest.flush()
    if not seen:
        raise FileNotFoundError(f"no images found in {', '.join(settings.inputs)}; expected {', '.join(sorted(readable()))}.")
    if skipped:
        print(f"{skipped} are done already, says the manifest, and left as they are.", file=sys.stderr)
    print(f"{written} images written to {output}: {size_in_words(size)}, {time.monotonic() - began:.1f} s")
    if failures:
        lines = (f"  {name}: {why}" for name, why in failures)
        print(f"\n{len(failures)} of {written + skipped + len(failures)} failed:", *lines, sep="\n", file=sys.stderr)
    if ended:
        print(f"The run ended before all were done: {ended} The same command continues.", file=sys.stderr)
    return 1 if failures or ended else 0


def _output(settings: Settings) -> str:
    output = settings.address or (str(settings.output.expanduser().resolve()) if settings.output else "")
    if not output:
        raise ValueError("--ray: found no -o, expected a folder for the results, or its address (s3://bucket/results).")
    if Path(output).suffix.lower() in WRITTEN and not Path(output).is_dir():
        raise ValueError(f"-o: found the file {output}, expected a folder: --ray is for many pictures.")
    if settings.overwrite:
        raise ValueError("--ray: found --overwrite, expected another -o: a resumed run could not tell what it has redone.")
    return output


def _require_cluster(settings: Settings) -> None:
    if launched() > 1:
        raise ValueError(
            f"--ray: a launcher has started {launched()} processes, expected 1, which Ray's workers share. Start it without accelerate or torchrun."
        )
    address = settings.ray or "auto"
    if re.fullmatch(r"auto|local|(\[[0-9a-fA-F:]+\]|[^\s/:]+):\d+", address):
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray: found {address}, expected HOST:PORT. Start the command on one of the cluster's machines (or with `ray job submit`)."
        )
    hint = " It is a file or folder: put INPUT before --ray." if Path(address).exists() or is_remote(address) else ""
    raise ValueError(f"--ray: found {address}, expected HOST:PORT, as `ray start --head` says it.{hint}")


def _require_address(address: str) -> None:
    try:
        open_address(address)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{address}: {error or type(error).__name__}. Give a path, or a protocol of an fsspec package that is installed on every machine."
        ) from error


def for_workers(settings: Settings, resource: str) -> Settings:
    """The same settings where paths are whole: a worker runs in another folder."""
    paths = {name: _whole(getattr(settings, name)) for name in ("base", "weights", "decoder", "comfyui")}
    options = {name: _whole(value) for name, value in settings.options.items()}
    return replace(settings, options=options, device="cpu" if resource == "CPU" and settings.device is None else settings.device, **paths)


def _whole(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    path = Path(value).expanduser()
    return type(value)(path.resolve()) if path.exists() else value


def _join(ray: Any, address: str) -> None:
    if ray.is_initialized():
        return
    if (host_port := address.rpartition(":"))[1]:  # Ray itself would try for minutes
        try:
            socket.create_connection((host_port[0].strip("[]"), int(host_port[2])), timeout=10).close()
        except OSError as error:
            raise _no_cluster(address, error) from error
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 gives workers next to nothing of a machine that does something else as well
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers, and asks nobody where the log is quiet
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RuntimeError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    where = f"at {address}" if address else "here"
    return RuntimeError(f"--ray: no cluster answers {where} ({said}). Start one (ray start --head), or leave the address out.")
