"""Which images a training uses: bad ones named and left out, alike in each run; its own output never."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.training.data import TrainingPictures
from pipelines.training.sources import find_pictures, find_training_set, parse_source

RNG = np.random.default_rng(0)


def noise(path, size=70):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        noise(tmp_path / "data" / f"{i}.png")
    return tmp_path / "data"


def test_bad_headers_are_named_and_left_out(folder, tmp_path, caplog):
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    Image.new("L", (70, 70)).save(folder / "moving.gif", save_all=True, append_images=[Image.new("L", (70, 70), 9)])
    with caplog.at_level(logging.WARNING):
        paths, weights = find_training_set([f"{folder}=3"], tmp_path / "run")
    assert [path.name for path in paths] == [f"{i}.png" for i in range(6)] and weights == [0.5] * 6
    for name, reason in (("empty.png", "the file is empty"), ("text.jpg", "cannot identify"), ("moving.gif", "2 frames")):
        assert any(name in message and reason in message for message in caplog.messages), name
    assert not any("._0" in message for message in caplog.messages)


def test_many_bad_ones_are_counted(folder, tmp_path, caplog):
    for i in range(15):
        (folder / f"bad{i:02}.png").write_bytes(b"")
    find_training_set([str(folder)], tmp_path / "run")
    assert sum("is left out" in message for message in caplog.messages) == 10 and "and 5 more" in caplog.text


def test_nothing_but_bad_ones(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found no picture in .*d that can be read; .*x.png: the file is empty"):
        find_training_set([str(tmp_path / "d")], tmp_path / "run")


def test_one_that_is_cut_does_not_end_a_training(folder, caplog):
    """A header that is whole over pixels that are not: another picture in its place, the same whenever that was noticed."""
    paths = sorted(folder.glob("*.png"))
    before = [TrainingPictures(paths, 64, 40, seed=1)[i]["hq"] for i in range(40)]
    paths[2].write_bytes(paths[2].read_bytes()[:400])
    pictures = TrainingPictures(paths, 64, 40, seed=1)
    with caplog.at_level(logging.WARNING):
        after = [pictures[i]["hq"] for i in range(40)]
    changed = [i for i in range(40) if not torch.equal(before[i], after[i])]
    assert changed and len(changed) < 20
    assert sum("2.png can't be read" in message for message in caplog.messages) == 1
    resumed = TrainingPictures(paths, 64, 40, seed=1)  # which meets the picture later, or earlier, than the uncut run
    for i in reversed(range(40)):
        assert torch.equal(resumed[i]["hq"], after[i])


def test_all_cut_is_an_error_not_a_loop(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"png, which can't be read \(.*\), expected a picture, and there is no other"):
        TrainingPictures(sorted(folder.glob("*.png")), 64, 1)[0]
    noise(folder / "0.png")
    pictures = sorted(folder.glob("*.png"))
    with pytest.raises(ValueError, match="there is no other"):
        TrainingPictures(pictures, 64, 1, weights=[0, 1, 1, 1, 1, 1])[0]


def test_deep_and_grey_pictures_are_in_range(tmp_path):
    ramp = np.linspace(0, 65535, 96, dtype=np.uint16)[None].repeat(96, 0)
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "f.tif")
    samples = [TrainingPictures([tmp_path / name], 64, 1)[0]["hq"] for name in ("8.png", "16.png", "f.tif")]
    for sample in samples:
        assert sample.shape == (3, 64, 64) and sample.is_contiguous() and (sample - samples[0]).abs().max() < 1 / 250
    Image.fromarray(ramp[:20]).save(tmp_path / "small.png")
    assert 0.3 < TrainingPictures([tmp_path / "small.png"], 64, 1)[0]["hq"].mean() < 0.7


@pytest.mark.parametrize("place", ["data/run", "data"])
def test_own_samples_are_never_taken(folder, place, caplog):
    output = folder.parent / place
    noise(output / "samples" / "0000500.png")
    noise(output / "logs" / "x.png")
    if place == "data/run":
        noise(output / "anything.png")
    paths, _ = find_training_set([str(folder)], output)
    assert [path.name for path in paths] == [f"{i}.png" for i in range(6)]
    assert "the run itself writes there" in caplog.text


def test_data_below_the_output(tmp_path):
    noise(tmp_path / "work" / "pictures" / "a.png")
    noise(tmp_path / "work" / "samples" / "b.png")
    assert [path.name for path in find_training_set([str(tmp_path / "work" / "pictures")], tmp_path / "work")[0]] == ["a.png"]
    with pytest.raises(ValueError, match="where the run writes its own samples"):
        find_training_set([str(tmp_path / "work" / "samples")], tmp_path / "work")
    with pytest.raises(ValueError, match="only pictures .* that the run itself has written"):
        find_training_set([str(tmp_path / "work" / "samples" / "b.png")], tmp_path / "work")


def test_shares(tmp_path):
    for name in ("year=2020", "plain", "a=b=3"):
        noise(tmp_path / name / "a.png")
    root = str(tmp_path)
    assert parse_source(f"{root}/year=2020") == (tmp_path / "year=2020", None)
    assert parse_source(f"{root}/year=2020=2.5") == (tmp_path / "year=2020", 2.5)
    assert parse_source(f"{root}/plain=3") == (tmp_path / "plain", 3.0)
    assert parse_source(f"{root}/a=b=3") == (tmp_path / "a=b=3", None)
    for share in ("nan", "inf", "0", "-1", "x", ""):
        with pytest.raises(ValueError, match="expected a number above 0 behind the ="):
            parse_source(f"{root}/plain={share}")
    with pytest.raises(ValueError, match="found nothing at .*year=2021, expected"):
        parse_source(f"{root}/year=2021")
    with pytest.raises(ValueError, match="found an empty name"):
        parse_source("")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_other_systems(tmp_path, encoding):
    noise(tmp_path / "Hütte.png")
    noise(tmp_path / "b.png")
    (tmp_path / "list.txt").write_bytes("Hütte.png\r\n\r\n b.png \r\n".encode(encoding))
    assert [path.name for path in find_pictures([tmp_path / "list.txt"])] == ["Hütte.png", "b.png"]


def test_lists_that_are_no_text(tmp_path):
    noise(tmp_path / "b.png")
    (tmp_path / "list.txt").write_bytes("b.png\nHütte.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list.txt, which is no text in UTF-8 \(line 2\).*Save it as UTF-8"):
        find_pictures([tmp_path / "list.txt"])
    (tmp_path / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ValueError, match="movie.mp4, which is no text"):
        find_pictures([tmp_path / "movie.mp4"])
