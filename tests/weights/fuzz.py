"""A seeded fuzzer of weight files: small valid files of every kind made wrong, each read within limits of time and memory.

    python tests/weights/fuzz.py --count 10000 --jobs 2

A file that hangs, dies, takes memory, raises anything but a sentence that names it, or loads with weights that are not finite is a
finding; its number repeats it (``--first N --count 1 --keep FOLDER``).
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "weights")]

SECONDS = 5  # of the processor, so that a busy machine makes no findings
WAIT = 60  # asleep on end, for what waits without working; and of the processor for the making of a file
POLL = 0.5
MEMORY = 256 << 20  # beyond the file's size
ADDRESSES = 8 << 30  # so that a runaway ends by itself

BROKEN = 77  # exit status of a worker in which not the reading failed, but the fuzzer

FORMS = ("zip", "legacy", "safetensors")


def write(folder: Path, number: int, seed: int = 0) -> tuple[str, Path]:
    """File ``number`` of the series, and the kind that it pretends to be."""
    import fuzz_bytes
    import fuzz_content
    import safetensors.torch
    import torch

    rng = random.Random(f"{seed}:{number}")
    kind, form = rng.choice(fuzz_content.KINDS), rng.choice(FORMS)
    torch.manual_seed(number)

    def encode(content, form: str) -> bytes:
        if form == "safetensors":
            tensors, metadata = flat(content)
            data = safetensors.torch.save(tensors, metadata)
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))  # in a fixed order
            return data[:8] + header.encode().ljust(length) + data[8 + length :]
        stream = io.BytesIO()
        with numbered_storages():
            torch.save(content, stream, _use_new_zipfile_serialization=form == "zip")
        return stream.getvalue()

    def flat(content: dict):
        """A kind's dictionary as it is kept in safetensors, and its metadata."""
        if kind == "adapter":
            parts = {"unet": content["state_dict_unet"], "vae": content["state_dict_vae"]}
            return {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}, {"timestep": "999", "rank_unet": "4"}
        if kind == "tagger":
            tags = {"tagger_tags": json.dumps(fuzz_content.TAGS), "tagger_thresholds": json.dumps(fuzz_content.THRESHOLDS), "tagger_dape": ""}
            return {k: v for k, v in content["model"].items() if not k.endswith("index")}, tags
        return content, {"format": "pt"}

    content = fuzz_content.valid(kind)
    if form == "safetensors":
        data = encode(content, form)
        data = fuzz_bytes.wrong_safetensors(rng, data) if rng.random() < 0.7 else fuzz_bytes.wrong_bytes(rng, data, data[::-1])
    elif rng.random() < 0.55:
        try:
            data = encode(fuzz_content.make_wrong(rng, content), form)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, RecursionError, pickle.PicklingError, UnicodeError):
            data = encode(fuzz_content.valid(kind), form)  # what cannot be written at all
    else:
        data = encode(content, form)
        if rng.random() < 0.35:
            data = fuzz_bytes.wrong_bytes(rng, data, encode(content, rng.choice(FORMS)))
        else:
            data = (fuzz_bytes.wrong_zip if form == "zip" else fuzz_bytes.wrong_legacy)(rng, data)
    path = folder / f"{kind}-{number}.{'safetensors' if form == 'safetensors' else 'pth'}"
    path.write_bytes(data)
    return kind, path


@contextlib.contextmanager
def numbered_storages():
    """In older files storages are named by their addresses, which change from run to run; here by numbers."""
    import torch

    numbers: dict[int, int] = {}
    torch.UntypedStorage._cdata = property(lambda storage: 10_000 + numbers.setdefault(super(torch.UntypedStorage, storage)._cdata, len(numbers)))
    try:
        yield
    finally:
        del torch.UntypedStorage._cdata


def _read_files(folder: Path, first: int, last: int, seed: int, send) -> None:
    """The worker: reads one file after the other and says of each what came of it, how long it took and what memory."""
    import fuzz_targets

    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES, resource.RLIM_INFINITY))
    for number in range(first, last):
        kind, path = write(folder, number, seed)
        send({"number": number, "started": True})
        _reset_peak()
        before, start = _memory("VmRSS"), time.process_time()
        result = fuzz_targets.outcome(kind, path)
        seconds, grown = time.process_time() - start, _memory("VmHWM") - before
        if result in ("loaded", "refused") and grown > path.stat().st_size + MEMORY:
            result = f"wrong: memory, {grown >> 20} MiB for {path.stat().st_size} bytes"
        path.unlink()
        send({"number": number, "result": result, "seconds": seconds, "kind": kind, "file": path.name})


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def run(first: int, last: int, seed: int) -> Iterator[dict]:
    """Read the files in a forked worker, and in another one from the next file on where one hangs or dies."""
    import fuzz_targets

    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fuzz_targets.prepare(folder)
        while first < last:
            worker, pipe = _fork(lambda send, first=first: _read_files(folder, first, last, seed, send))
            for result in _watch(worker, pipe):
                yield result
                first = result["number"] + 1


def _fork(work) -> tuple[int, int]:
    reading, writing = os.pipe()
    worker = os.fork()
    if worker:
        os.close(writing)
        return worker, reading
    os.close(reading)
    status = BROKEN
    try:
        work(lambda message: os.write(writing, (json.dumps(message) + "\n").encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _watch(worker: int, pipe: int) -> Iterator[dict]:
    """The worker's results; a last one is made up where it hangs or dies. Only the reading of a file is timed, not its making."""
    waiting, reading, number, asleep, worked = b"", False, None, 0.0, 0.0
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], POLL)
            if not ready:
                asleep = asleep + POLL if _state(worker)[0] != "R" else 0.0  # what a busy machine leaves waiting for its turn is R
                if asleep > WAIT or _processor(worker) - worked > (SECONDS if reading else WAIT):
                    break
                continue
            read = stream.read(1 << 16)
            if not read:
                break
            *lines, waiting = (waiting + read).split(b"\n")
            asleep, worked = 0.0, _processor(worker)
            for message in map(json.loads, lines):
                reading, number = "result" not in message, message["number"]
                if not reading:
                    yield message
    os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
        raise RuntimeError("the fuzzer itself failed; see above.")
    if reading:
        yield {"number": number, "result": "wrong: died" if ready else "wrong: hang", "seconds": SECONDS, "kind": "", "file": ""}
    elif not ready:
        raise RuntimeError(f"making the file after number {number} took too long.")


def _state(pid: int) -> list[str]:
    """The fields of proc's stat, from the state's letter on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processor(pid: int) -> float:
    """Seconds that a process has worked."""
    fields = _state(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="only write the files here, and read none")
    parser.add_argument("--lines", action="store_true", help="print each file's result as a line of JSON, and no summary")
    arguments = parser.parse_args()
    last = arguments.first + arguments.count
    if arguments.keep:
        for number in range(arguments.first, last):
            write(arguments.keep, number, arguments.seed)
        return 0
    if arguments.lines:
        for result in run(arguments.first, last, arguments.seed):
            print(json.dumps(result), flush=True)
        return 0
    results = in_parallel(arguments.first, last, arguments.seed, arguments.jobs)
    findings = [result for result in results if result["result"].startswith("wrong")]
    for finding in findings:
        print(f"{finding['number']:>6} {finding['file']} {finding['result']}")
    print(summary(results))
    return bool(findings)


def in_parallel(first: int, last: int, seed: int, jobs: int) -> list[dict]:
    bounds = [first + (last - first) * i // jobs for i in range(jobs + 1)]
    command = [sys.executable, str(Path(__file__)), "--lines", "--seed", str(seed)]
    ranges = [["--first", str(a), "--count", str(b - a)] for a, b in itertools.pairwise(bounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command + part, stdout=subprocess.PIPE, text=True, env=environment) for part in ranges]
    lines = [line for worker in workers for line in worker.communicate()[0].splitlines()]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a fuzzing process ended with an error; see its output above.")
    return [json.loads(line) for line in lines]


def summary(results: list[dict]) -> str:
    """Counts of what came of the files."""

    def sort(result: str) -> str:
        if not result.startswith("wrong: "):
            return result
        wrong = result.removeprefix("wrong: ")
        if wrong.startswith("loads"):
            return "silent NaN" if wrong.endswith("not finite") else "wrong tensors loaded"
        return next((name for name in ("hang", "died", "memory") if wrong.startswith(name)), "wrong exceptions")

    counts = collections.Counter(sort(result["result"]) for result in results)
    slowest = max(results, key=lambda result: result["seconds"])
    parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{len(results)} files: {parts}; slowest {slowest['seconds']:.2f} s (file {slowest['number']})"


if __name__ == "__main__":
    sys.exit(main())
