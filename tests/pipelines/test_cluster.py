"""``upscale --ray``: lists, blocks, the manifest and addresses; workers that die, machines that come and go, and the whole on a cluster of two nodes."""

import contextlib
import io
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from forked import free_port
from PIL import Image

pytest.importorskip("diffusers")

from pipelines.cli import main, make_parser
from pipelines.cluster import listing, run
from pipelines.cluster.files import open_address
from pipelines.cluster.listing import Item, list_items, pack, picture_size
from pipelines.cluster.manifest import Manifest
from pipelines.cluster.pool import Ahead, Pool
from pipelines.cluster.run import for_workers
from pipelines.cluster.worker import Row, Worker
from pipelines.pictures import OutputError
from pipelines.pictures.record import read_record
from pipelines.settings import Settings

fsspec = pytest.importorskip("fsspec")

PHOTO = (ROOT / "miniature" / "photo.png").read_bytes()


def settings(*words: str) -> Settings:
    argv = ["upscale", "--demo", "--scale", "1", "--device", "cpu", *words, "--ray"]
    return Settings.from_arguments(make_parser(argv).parse_args(argv))


@pytest.fixture
def inbox(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.png", "sub/b.bmp", "sub/b.png", "c.heic", ".hidden/d.png", "._e.png", "notes.md"):
        Image.new("RGB", (8, 6)).save(folder / name, "PNG")
    return folder


def test_folders_and_lists_are_streamed(tmp_path, inbox, monkeypatch):
    items = list_items([str(inbox)], "/out", None)
    assert iter(items) is items
    found = {item.source.removeprefix(f"{inbox}/"): item.target for item in items}
    assert found == {"a.png": "/out/a.png", "c.heic": "/out/c.heic.png", "sub/b.bmp": "/out/sub/b.bmp.png", "sub/b.png": "/out/sub/b.png"}
    inside = list_items([str(inbox)], str(inbox / "sub"), ".jpg")
    assert {item.source.removeprefix(f"{inbox}/"): item.target for item in inside} == {
        "a.png": f"{inbox}/sub/a.png.jpg",
        "c.heic": f"{inbox}/sub/c.heic.jpg",
    }
    (tmp_path / "list.txt").write_text(f"in/a.png\n\n{inbox}/sub/b.png\nmemory://bucket/deep/c.jpg\n")
    monkeypatch.chdir(tmp_path)
    listed = list(list_items(["list.txt", "in/a.png"], "memory://results", ".png"))
    assert [item.source for item in listed] == [f"{tmp_path}/in/a.png", f"{inbox}/sub/b.png", "memory://bucket/deep/c.jpg", f"{tmp_path}/in/a.png"]
    names = ["in/a.png", f"{inbox}/sub/b.png".lstrip("/"), "bucket/deep/c.jpg.png", "a.png"]
    assert [item.target for item in listed] == [f"memory://results/{name}" for name in names]
    memory = fsspec.filesystem("memory")
    for name in ("x/b.png", "x/deep/a.png", "x/out/a.png", "x/.fewstepsr/a.png"):
        memory.pipe_file(f"/{name}", b"")
    found = [item.source for item in list_items(["memory://x"], "memory://x/out", None)]
    assert [PurePosixPath(source).relative_to("memory:/") for source in found] == [PurePosixPath("x/b.png"), PurePosixPath("x/deep/a.png")], found
    with pytest.raises(ValueError, match="it is the output folder, too"):
        list(list_items(["in"], str(inbox), None))
    with pytest.raises(FileNotFoundError, match="no such folder, list or picture"):
        list(list_items([str(tmp_path / "nowhere")], "/out", None))


def test_blocks_are_sized_by_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK_PIXELS", 1000)
    for name, size in (("a", (10, 10)), ("b", (10, 10)), ("c", (40, 40)), ("d", (10, 10))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_text("no picture")
    items = [Item(str(tmp_path / f"{name}.png"), "") for name in ("a", "b", "c", "bad", "d")]
    blocks = [[Path(item.source).stem for item in block] for block in pack(items, settings("in", "-o", "out", "--scale", "2"))]
    assert blocks == [["a", "b"], ["c"], ["bad", "d"]]
    monkeypatch.setattr(listing, "BLOCK_PICTURES", 2)
    assert [len(block) for block in pack([items[0]] * 5, settings("in", "-o", "out"))] == [2, 2, 1]
    monkeypatch.setattr(listing, "BLOCK_PICTURES", 32)
    blocks = pack([items[0]] * 5, replace(settings("in", "-o", "out"), long_side=22))
    assert [len(block) for block in blocks] == [2, 2, 1]


def test_headers_on_other_file_systems_are_of_the_named_formats_alone():
    memory = fsspec.filesystem("memory")
    file = io.BytesIO()
    Image.new("L", (7, 5)).save(file, "PNG")
    memory.pipe_file("/bucket/a.png", file.getvalue())
    memory.pipe_file("/bucket/script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert picture_size(Item("memory://bucket/a.png", "")) == (7, 5)
    assert picture_size(Item("memory://bucket/script.png", "")) is None


@pytest.mark.parametrize("output", ["{tmp}/out", "memory://out"])
def test_the_manifest_knows_what_is_done_with_which_settings(tmp_path, output):
    output = output.replace("{tmp}", str(tmp_path))
    items = [Item(f"/in/{i}.png", f"{output}/{i}.png") for i in range(5)]
    manifest = Manifest(output, settings("in", "-o", "out"))
    for item in items[:3]:
        manifest.add(item)
    manifest.flush()
    manifest.add(items[3])  # never written: the run was killed
    again = Manifest(output, settings("in", "-o", "out"))
    assert [item in again for item in items] == [True] * 3 + [False] * 2
    assert not any(item in Manifest(output, settings("in", "-o", "out", "--seed", "7")) for item in items)
    filesystem, root = open_address(output)
    [path] = filesystem.ls(f"{root}/.fewstepsr", detail=False)
    filesystem.pipe_file(path, filesystem.cat_file(path)[:-3])  # cut: the last picture is done again, the others are known
    assert [item in Manifest(output, settings("in", "-o", "out")) for item in items] == [True] * 2 + [False] * 3
    filesystem.rm(f"{root}/.fewstepsr", recursive=True)


def test_a_worker_restores_and_reports(tmp_path):
    """As it is called by an actor, here with one file system's source and another's target, and with pictures that fail."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/in/a.png", PHOTO)
    memory.pipe_file("/in/bad.png", b"no picture")
    (tmp_path / "b.png").write_bytes(PHOTO)
    items = [
        Item("memory://in/a.png", str(tmp_path / "out" / "a.png")),
        Item(str(tmp_path / "b.png"), "memory://results/b.png"),
        Item("memory://in/bad.png", "memory://results/bad.png"),
        Item("memory://in/gone.png", "memory://results/gone.png"),
        Item(str(tmp_path / "b.png"), str(tmp_path / "b.png")),
        Item(str(tmp_path / "clip.mp4"), str(tmp_path / "out" / "clip.mp4")),
    ]
    worker = Worker(settings("in", "-o", "out"))
    worker.start()
    rows = worker.work(items)
    assert [row.item for row in rows] == items
    assert [row.bytes > 0 for row in rows] == [True, True, False, False, False, False]
    errors = [row.error or "" for row in rows]
    assert errors[:2] == ["", ""] and "cannot identify" in errors[2] and "gone.png" in errors[3]
    assert "replace the picture itself" in errors[4] and "it is a video, expected pictures" in errors[5]
    assert read_record(tmp_path / "out" / "a.png") is not None
    assert sorted(memory.find("/results")) == ["/results/b.png"]
    (tmp_path / "b_out.png").write_bytes(memory.cat_file("/results/b.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b_out.png")), np.asarray(Image.open(tmp_path / "out" / "a.png")))


@pytest.mark.slow
def test_s3(tmp_path, monkeypatch):
    """Sources, results and manifest in a bucket of a local server."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install s3fs)")
    moto = pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server]')")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        for name, value in (
            ("ACCESS_KEY_ID", "x"),
            ("SECRET_ACCESS_KEY", "x"),
            ("DEFAULT_REGION", "us-east-1"),
            ("ENDPOINT_URL", f"http://127.0.0.1:{port}"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("bucket")
        for name in ("a", "deep/b"):
            filesystem.pipe_file(f"bucket/in/{name}.png", PHOTO)
        chosen = settings("s3://bucket/in", "-o", "s3://bucket/out")
        blocks = list(pack(list_items(chosen.inputs, str(chosen.address), None), chosen))
        assert [[item.source for item in block] for block in blocks] == [["s3://bucket/in/a.png", "s3://bucket/in/deep/b.png"]]
        assert picture_size(blocks[0][0]) == (112, 75)
        worker = Worker(chosen)
        worker.start()
        rows = worker.work(blocks[0])
        assert not [row.error for row in rows if row.error]
        with pytest.raises(OutputError, match="cannot be written"):
            worker.work([Item(blocks[0][0].source, "s3://no-such-bucket/a.png")])
        manifest = Manifest("s3://bucket/out", chosen)
        for item in blocks[0]:
            manifest.add(item)
        manifest.flush()
        assert all(item in Manifest("s3://bucket/out", chosen) for item in blocks[0])
        filesystem.invalidate_cache()
        names = filesystem.find("bucket/out")
        assert [name for name in names if name.endswith(".png")] == ["bucket/out/a.png", "bucket/out/deep/b.png"] and len(names) == 3
    finally:
        server.stop()


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """One machine of a cluster."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"), ("RAY_worker_niceness", "0"), ("RAY_USAGE_STATS_ENABLED", "0")):
            environment.setenv(name, value)
        found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            yield found
        finally:
            found.shutdown()


@pytest.fixture
def machines(cluster):
    """A cluster of two nodes, to which others can be added. ``second`` is the one that can be lost: the driver is on the first."""
    import ray

    cluster.second = cluster.add_node(**NODE)
    try:
        yield cluster
    finally:
        ray.shutdown()
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
def test_each_picture_has_one_row_whatever_dies(machines):
    """Workers that die of a picture, a machine that cannot start or write, one that is killed, and one that joins."""
    import ray

    class Stub:
        def __init__(self, bad):
            self.bad = bad

        def start(self):
            if ray.get_runtime_context().get_node_id() == self.bad["start"]:
                raise FileNotFoundError("no weights here")

        def work(self, block):
            time.sleep(0.2)
            node = ray.get_runtime_context().get_node_id()
            if node == self.bad["write"]:
                raise OutputError("the disk is full")
            if any(item.source == "deadly" for item in block):
                os._exit(1)
            return [Row(item, 1, (node,)) for item in block]

    ray.init(address=machines.address, log_to_driver=False)
    cannot_start, cannot_write = (machines.add_node(**NODE).node_id for _ in range(2))
    items = [Item(f"{i}", "") for i in range(60)]
    items[9] = Item("deadly", "")
    pool = Pool(ray, Stub, "CPU", {"start": cannot_start, "write": cannot_write})
    rows: list[Row] = []
    killed, joined = machines.second.node_id, None
    try:
        for row in pool.run(Ahead((items[i : i + 2] for i in range(0, 60, 2)), 3)):
            rows.append(row)
            if killed in row.notes and machines.second is not None:
                machines.remove_node(machines.second, allow_graceful=False)
                machines.second, joined = None, machines.add_node(**NODE).node_id
    finally:
        pool.close()
    assert sorted(row.item.source for row in rows) == sorted(item.source for item in items)
    (failed,) = [row for row in rows if row.error]
    assert failed.item.source == "deadly" and "died 2 times while it had this picture alone" in failed.error
    at_work = {node for row in rows for node in row.notes}
    assert at_work == {killed, joined, machines.head_node.node_id}
    said = "\n".join(pool.notes)
    assert "gets no more pictures: no weights here" in said and "gets no more pictures: the disk is full" in said and "was lost" in said


@pytest.mark.slow
def test_where_no_machine_can_work_the_run_ends(machines):
    import ray

    class Broken:
        def start(self):
            raise FileNotFoundError("no weights here")

    ray.init(address=machines.address, log_to_driver=False)
    pool = Pool(ray, Broken, "CPU")
    with pytest.raises(RuntimeError, match="no machine of the cluster can work. no weights here"):
        list(pool.run(Ahead([[Item("a", "")]], 3)))
    pool.close()

    class Blind:
        def start(self):
            pass

    def listing():
        yield [Item("a", "")]
        raise FileNotFoundError("the list is gone")

    blocks = Ahead(listing(), 3)
    while not blocks.take():
        time.sleep(0.01)
    with pytest.raises(FileNotFoundError, match="the list is gone"):
        list(Pool(ray, Blind, "CPU").run(blocks))


def test_what_runs_ahead_is_bounded_and_ends():
    taken = []
    ahead = Ahead((taken.append(i) or i + 1 for i in range(100)), 5)
    time.sleep(0.2)
    assert len(taken) <= 7
    found = []
    while not ahead.ended:
        item = ahead.take()
        found += [item] if item is not None else []
    assert found == list(range(1, 101)) and ahead.take() is None

    def store():
        yield 1
        raise KeyError("no credentials")

    ahead = Ahead(store(), 5)
    while ahead.take() is None:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="the listing ended .KeyError: 'no credentials'"):
        while not ahead.ended:
            ahead.take()


def test_paths_are_whole_for_workers_and_the_device_follows_the_resource(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter.safetensors").touch()
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    argv = [
        "upscale",
        "in",
        "-o",
        "out",
        "--method",
        "osediff",
        "--ray",
        "--weights",
        "adapter.safetensors",
        "--base",
        "some/hub-id",
        "--comfyui",
        "ComfyUI",
    ]
    chosen = Settings.from_arguments(make_parser(argv).parse_args(argv))
    found = for_workers(chosen, "CPU")
    assert found.weights == str(tmp_path / "adapter.safetensors") and found.base == "some/hub-id" and found.comfyui == tmp_path / "ComfyUI"
    assert found.device == "cpu" and for_workers(chosen, "GPU").device is None


def is_at_work(node) -> bool:
    """Whether one of a node's workers has its networks and a block: Ray names a process by what it does."""
    import psutil

    [raylet] = [process.process for process in node.all_processes["raylet"]]
    for process in psutil.Process(raylet.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if " ".join(process.cmdline()).startswith("ray::Worker.work"):
                return True
    return False


@pytest.mark.slow
def test_a_node_is_killed_and_another_joins(tmp_path, machines, monkeypatch, capsys):
    """Every picture is there once, none half; the report names what failed; a second run does nothing."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    number = 20
    for i in range(number):
        Image.open(ROOT / "miniature" / "photo.png").convert("RGB").resize((64, 64)).rotate(i).save(source / f"{i:03}.png")
    (source / "bad.png").write_text("no picture")
    monkeypatch.setattr(listing, "BLOCK_PICTURES", 2)
    command = ["upscale", str(source), "-o", str(out), "--ray", machines.address, "--demo", "--scale", "4", "--device", "cpu"]
    ended: list[int] = []
    first = threading.Thread(target=lambda: ended.append(main(command)))
    first.start()
    begin = time.monotonic()
    while not (is_at_work(machines.second) and list(out.glob("*.png"))) and first.is_alive():
        time.sleep(0.1)
        assert time.monotonic() - begin < 600
    time.sleep(random.uniform(0, 1))
    there = len(list(out.glob("*.png")))
    machines.remove_node(machines.second, allow_graceful=False)
    assert first.is_alive() and there < number, capsys.readouterr()
    machines.add_node(**NODE)
    first.join(600)
    written, report = capsys.readouterr()
    print(f"killed at {there} results\n{written}{report}")
    assert ended == [1] and f"{number} images written" in written, report
    assert f"1 of {number + 1} failed" in report and "bad.png" in report and "cannot identify" in report and "was lost" in report
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:03}.png" for i in range(number)]
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.size == (256, 256)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (source / "bad.png").unlink()
    assert main(command) == 0
    written, report = capsys.readouterr()
    assert f"{number} are done already, says the manifest" in report and "0 images written" in written
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.png")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in", "--ray"], "found no -o"),
        (["in", "-o", "out.png", "--ray"], "out.png, expected a folder"),
        (["in", "-o", "out", "--ray", "--overwrite"], "expected another -o"),
        (["in", "-o", "out", "--ray", "--watch"], "is for one machine"),
        (["in", "-o", "out", "--ray", "--device", "cuda:1"], "expected cpu or cuda"),
        (["in", "-o", "s3://bucket/out"], "Other file systems need --ray"),
        (["s3://bucket/in", "-o", "out"], "INPUT: found s3://bucket/in"),
        (["more", "-o", "out", "--ray", "in"], "put INPUT before --ray"),
        (["in", "-o", "out", "--ray", "ray://head:10001"], "ray job submit"),
        (["in", "-o", "out", "--ray", "head"], "expected HOST:PORT"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    assert main(["upscale", *words, "--demo"]) == 2
    assert message in capsys.readouterr().err


def test_a_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["upscale", "in", "-o", "out", "--ray", "--demo"]) == 2
    assert "a launcher has started 2 processes" in capsys.readouterr().err


def test_a_protocol_that_is_unknown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace())
    assert main(["upscale", "in", "-o", "sss://bucket/out", "--ray", "--demo"]) == 2
    assert "sss://bucket/out: Protocol not known" in capsys.readouterr().err


def test_an_address_where_nothing_answers(tmp_path, monkeypatch, capsys):
    """Found out before Ray, which would try for two minutes, is asked."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace())
    assert main(["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--ray", f"127.0.0.1:{free_port()}", "--demo"]) == 2
    assert "no cluster answers at 127.0.0.1:" in capsys.readouterr().err


class RayError(Exception):
    pass


@pytest.mark.parametrize("error", [RuntimeError("no machine of the cluster can work."), RayError("the head is gone.")])
@pytest.mark.parametrize("done", [0, 2])
def test_a_run_that_ends_says_what_it_has_done(tmp_path, monkeypatch, capsys, error, done):
    """The driver alone, on rows that it is given."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 6)).save(inbox / f"{i}.png")

    class Pool:
        notes: list[str] = []

        def __init__(self, *_):
            pass

        def run(self, blocks):
            while not (block := blocks.take()):
                time.sleep(0.01)
            yield from (Row(item, 5) for item in block[:done])
            raise error

        def close(self):
            pass

    there = {"is_initialized": lambda: True, "cluster_resources": dict, "exceptions": SimpleNamespace(RayError=RayError)}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**there))
    monkeypatch.setitem(sys.modules, "ray.exceptions", there["exceptions"])
    monkeypatch.setattr(run, "Pool", Pool)
    words = ["upscale", str(inbox), "-o", str(out), "--ray", "--demo", "--scale", "1", "--device", "cpu"]
    assert main(words) == (1 if done else 2)
    written, said = capsys.readouterr()
    assert str(error) in said
    if done:
        assert "2 images written" in written and "The run ended before all were done" in said
    kept = Manifest(str(out), settings(str(inbox), "-o", str(out)))
    assert sum(item in kept for item in list_items([str(inbox)], str(out), None)) == done


def test_without_ray_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--ray", "--demo"]) == 2
    assert "pip install ray fsspec" in capsys.readouterr().err
