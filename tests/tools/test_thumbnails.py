"""Each template has a thumbnail of its own: a list of equal pictures tells nothing."""

from conftest import ROOT
from PIL import Image

from tools.thumbnails import SIDE, THUMBNAILS


def test_each_template_has_one_of_its_own():
    templates = sorted((ROOT / "example_workflows").glob("*.json"))
    assert {path.stem for path in templates} == THUMBNAILS.keys()
    pictures = [path.with_suffix(".jpg").read_bytes() for path in templates]
    assert len(set(pictures)) == len(pictures)
    assert all(len(picture) < 50_000 for picture in pictures)
    assert all(Image.open(path.with_suffix(".jpg")).size == (SIDE, SIDE) for path in templates)
