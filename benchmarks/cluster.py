"""What ``upscale --ray`` adds to a picture, and runs in which a machine is killed.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --kills 10

The first: the miniature enlarges pictures of 128 x 128 pixels four times, by the process itself and by one worker of Ray's, both with a single thread. What is compared is the
time on processors, which others on the machine change little: of the process, and of the driver, Ray's own processes and the worker together. Rounds come in pairs, in turns one
or the other first, with the same pictures; the median of the pairs' ratios is given with an interval of at least 95 % (order statistics). Then blocks that hold nothing show what a
call costs.

The second: on a cluster of two Ray nodes on this machine, one is killed at a random moment while it has a block, and another joins. A run is good where every picture is
there once and whole, and the report names the one that is no picture.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")

import psutil  # noqa: E402
import ray  # noqa: E402
from PIL import Image  # noqa: E402

from pipelines.cli import main as command  # noqa: E402
from pipelines.cli import make_parser  # noqa: E402
from pipelines.cluster import listing  # noqa: E402
from pipelines.cluster.listing import Item, list_items, pack  # noqa: E402
from pipelines.cluster.pool import Ahead, Pool  # noqa: E402
from pipelines.cluster.worker import Row, Worker  # noqa: E402
from pipelines.settings import Settings  # noqa: E402


class Nothing:
    """A worker that does nothing."""

    def start(self) -> None:
        pass

    def work(self, block: list[Item]) -> list[Row]:
        return [Row(item) for item in block]


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def is_at_work(node) -> bool:
    """Whether a worker of a node has a block: Ray names a process by what it does."""
    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Worker.work"):
                return True
    return False


def kills(number: int, seed: int) -> None:
    from ray.cluster_utils import Cluster

    listing.BLOCK_PICTURES = 2
    draw, good, pictures = random.Random(seed), 0, 24
    machines = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    second = machines.add_node(**NODE)
    ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in")
        source.mkdir()
        photo = Image.open(ROOT / "miniature" / "photo.png").convert("RGB").resize((64, 64))
        for i in range(pictures):
            photo.rotate(i).save(source / f"{i:02}.png")
        (source / "bad.png").write_text("no picture")
        for run in range(number):
            out, said, ended = Path(folder, f"out{run}"), io.StringIO(), []
            words = ["upscale", str(source), "-o", str(out), "--demo", "--scale", "4", "--device", "cpu", "--ray", machines.address]
            begin = time.monotonic()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                thread = threading.Thread(target=lambda words=words, ended=ended: ended.append(command(words)))
                thread.start()
                while not (is_at_work(second) and list(out.glob("*.png"))) and thread.is_alive():
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 1))
                at = len(list(out.glob("*.png")))
                machines.remove_node(second, allow_graceful=False)
                second = machines.add_node(**NODE)
                thread.join()
            (status,) = ended
            whole = 0
            for path in out.glob("*.png"):
                with Image.open(path) as image:
                    image.load()
                    whole += image.size == (256, 256)
            right = status == 1 and whole == pictures == len(list(out.glob("*.png"))) and at < pictures
            right &= f"1 of {pictures + 1} failed" in said.getvalue() and "bad.png: cannot identify" in said.getvalue()
            good += right
            lost = [line for line in said.getvalue().splitlines() if "was lost" in line]
            print(
                f"run {run + 1}: killed at {at} of {pictures} results, {whole} whole, {len(lost)} workers lost, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
            if not right:
                print(said.getvalue())
    ray.shutdown()
    machines.shutdown()
    print(f"{good} of {number} runs good")


def interval(ordered: list[float]) -> tuple[float, float]:
    """Of the median, of at least 95 %: as many values outside as a fair coin seldom exceeds. The whole range where there are fewer than six."""
    number, outside = len(ordered), 0
    while 2 * sum(math.comb(number, k) for k in range(outside + 1)) <= 0.05 * 2**number:
        outside += 1
    outside = max(1, outside)
    return ordered[outside - 1], ordered[-outside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16, help="in a round")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of them")
    parser.add_argument("--blocks", type=int, default=2000, help="that hold nothing")
    parser.add_argument("--kills", type=int, default=0, help="runs in which a machine is killed, in place of the measurement")
    parser.add_argument("--seed", type=int, default=1, help="of the moments at which it is")
    a = parser.parse_args()
    if a.kills:
        return kills(a.kills, a.seed)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), str(Path(folder, "out"))
        source.mkdir()
        photo = Image.open(ROOT / "miniature" / "photo.png").convert("RGB").resize((128, 128))
        for i in range(a.pictures):
            photo.rotate(i).save(source / f"{i}.png")
        argv = ["upscale", str(source), "-o", out, "--demo", "--scale", "4", "--device", "cpu", "--ray"]
        settings = Settings.from_arguments(make_parser(argv).parse_args(argv))
        blocks = list(pack(list_items([str(source)], out, None), settings))
        here = Worker(settings)
        here.start()
        here.work(blocks[0][:1])
        pool = Pool(ray, Worker, "CPU", settings)
        warm = list(pool.run(Ahead([blocks[0][:1]], 1)))
        assert not warm[0].error
        tree = psutil.Process()

        def processors() -> dict[str, float]:
            """Seconds on processors, so far, of the worker, of this process, and of all else that Ray has started."""
            taken = {"worker": 0.0, "driver": sum(tree.cpu_times()[:2]), "ray": 0.0}
            for process in tree.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    taken["worker" if process.cmdline()[0].startswith("ray::Worker") else "ray"] += sum(process.cpu_times()[:2])
            return taken

        def measured(work: Callable[[], Iterable[Row]]) -> dict[str, float]:
            """A picture's seconds."""
            begin, wall = processors(), time.perf_counter()
            rows = list(work())
            assert rows and not any(row.error for row in rows)
            wall, end = time.perf_counter() - wall, processors()
            return {name: (end[name] - begin[name]) / len(rows) for name in end} | {"clock": wall / len(rows)}

        def alone() -> dict[str, float]:
            found = measured(lambda: [row for block in blocks for row in here.work(block)])
            return {"processors": found["driver"], "clock": found["clock"], "idle": found["ray"] / found["clock"]}

        def with_ray() -> dict[str, float]:
            found = measured(lambda: pool.run(Ahead(pack(list_items([str(source)], out, None), settings), 10)))
            return found | {"processors": found["worker"] + found["driver"] + found["ray"]}

        pairs: list[dict] = []
        for number in range(a.rounds):
            order = (alone, with_ray) if number % 2 else (with_ray, alone)
            pairs.append({measure.__name__: measure() for measure in order})
            own, theirs = pairs[-1]["alone"], pairs[-1]["with_ray"]
            parts = ", ".join(f"{name} {theirs[name]:.3f}" for name in ("worker", "driver", "ray"))
            print(f"seconds on processors a picture: {own['processors']:.3f} alone, {theirs['processors']:.3f} with Ray ({parts})", flush=True)
        pool.close()
    for ours, theirs, name in (
        ("processors", "processors", "on processors, all together"),
        ("worker", "processors", "on processors, the worker alone"),
        ("clock", "clock", "by the clock"),
    ):
        ratios = sorted(pair["with_ray"][ours] / pair["alone"][theirs] - 1 for pair in pairs)
        seconds = [statistics.median(found) for found in ([pair["alone"][theirs] for pair in pairs], [pair["with_ray"][ours] for pair in pairs])]
        low, high = interval(ratios)
        print(
            f"{name}: {seconds[0]:.2f} s a picture in one process, {seconds[1]:.2f} s with Ray, {statistics.median(ratios):+.1%} "
            f"({low:+.1%} to {high:+.1%}, {len(pairs)} pairs)"
        )
    driver, others, idle = (
        statistics.median(pair[key][part] for pair in pairs) for key, part in (("with_ray", "driver"), ("with_ray", "ray"), ("alone", "idle"))
    )
    print(
        f"the driver, listing and headers included: {driver * 1000:.0f} ms a picture; Ray's own processes: {others * 1000:.0f} ms, and {idle:.1%} of a processor when idle"
    )
    empty = Pool(ray, Nothing, "CPU")
    list(empty.run(Ahead([[Item("", "")]], 1)))
    begin = time.perf_counter()
    list(empty.run(Ahead(([Item("", "")] for _ in range(a.blocks)), 100)))
    print(f"a block that holds nothing: {(time.perf_counter() - begin) / a.blocks * 1000:.1f} ms")
    empty.close()


if __name__ == "__main__":
    main()
