"""``upscale --method s3diff`` on real files."""

import numpy as np
import pipeline_toys
import pytest
import toys
from PIL import Image

from pipelines import S3DiffPipeline
from pipelines.cli import main
from pipelines.settings import Settings

ADAPTER, ESTIMATOR = toys.GOLDEN / "s3diff_square.pkl", toys.GOLDEN / "s3diff_square_de_net.pth"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    S3DiffPipeline(**pipeline_toys.components(0, folder / "clip")).save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def photos(tmp_path):
    for i in range(2):
        pixels = (toys.picture(i, 16, 20)[0].numpy() * (255 - 100 * i)).astype(np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"photo_{i}.png")
    return tmp_path


def upscale(base, photos, *words) -> int:
    words = ["upscale", photos / "in", "-o", photos / "out", "--method", "s3diff", "--base", base, "--weights", ADAPTER, "--device", "cpu", *words]
    return main([str(word) for word in words])


@pytest.mark.slow
def test_each_image_has_an_adapter_of_its_own(base, photos, capsys):
    assert upscale(base, photos, "--estimator", ESTIMATOR, "--scale", 2) == 0
    pipeline = S3DiffPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_s3diff(ADAPTER, ESTIMATOR)
    images = [Image.open(photos / "in" / f"photo_{i}.png") for i in range(2)]
    scores = pipeline.degradation(images)
    restored = pipeline(images, scale=2).images
    report = capsys.readouterr().err
    for i, (blur, noise) in enumerate(scores.tolist()):
        assert f"photo_{i}.png: note: blur {blur:.2f}, noise {noise:.2f} (--blur and --noise overrule them)." in report
        found = np.asarray(Image.open(photos / "out" / f"photo_{i}.png")).astype(int)
        assert found.shape == (32, 40, 3) and np.abs(found - np.asarray(restored[i])).max() <= 1
    assert upscale(base, photos, "--estimator", ESTIMATOR, "--scale", 2) == 0
    assert "2 of 2 are done already" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_given_need_no_estimator(base, photos, capsys, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(photos / "hub"))
    assert upscale(base, photos, "--blur", 0.5) == 2
    assert "S3Diff's degradation estimator (de_net.safetensors) was not found" in capsys.readouterr().err
    assert upscale(base, photos, "--blur", 0.5, "--noise", 0.25, "--scale", 1, "--estimator", "nowhere.pth", "--cfg", 1) == 0
    report = capsys.readouterr().err
    assert "--estimator is ignored: --blur and --noise say what it would." in report
    assert report.count("note: blur 0.50, noise 0.25") == 2
    with pytest.raises(SystemExit):
        upscale(base, photos, "--blur", 2)


@pytest.mark.parametrize(("words", "cfg"), [([], 1.07), (["--cfg", "2"], 2.0)])
def test_published_guidance(monkeypatch, words, cfg):
    found: list[Settings] = []
    monkeypatch.setattr("pipelines.upscale.upscale", lambda settings: found.append(settings) or 0)
    assert main(["upscale", "a.png", "--method", "s3diff", *words]) == 0
    assert main(["upscale", "a.png", "--method", "osediff"]) == 0
    assert [settings.cfg for settings in found] == [cfg, 1.0] and found[0].options == {"estimator": None, "blur": None, "noise": None}
