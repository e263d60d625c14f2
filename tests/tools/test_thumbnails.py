"""Each template has a thumbnail of its own: a list of equal pictures tells nothing."""

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont

from fewstep_sr.methods import METHODS
from tools import thumbnails
from tools.thumbnails import BADGE, CAPTIONS, MADE, SIDE, THUMBNAILS


def test_each_template_has_one_of_its_own():
    templates = sorted((ROOT / "example_workflows").glob("*.json"))
    assert {path.stem for path in templates} == THUMBNAILS.keys()
    pictures = [path.with_suffix(".jpg").read_bytes() for path in templates]
    assert len(set(pictures)) == len(pictures)
    assert all(len(picture) < 50_000 for picture in pictures)
    assert all(Image.open(path.with_suffix(".jpg")).size == (SIDE, SIDE) for path in templates)


@pytest.mark.parametrize("template", sorted(THUMBNAILS))
def test_only_methods_with_a_miniature_claim_it(template):
    text = (ROOT / "example_workflows" / f"{template}.json").read_text()
    lacking = [record.title for record in METHODS.values() if not record.demo and f'"{record.key}/' in text]  # an adapter as its loader names it
    assert not lacking or CAPTIONS[template] != MADE


@pytest.mark.slow
@pytest.mark.parametrize("template", sorted(THUMBNAILS))
def test_the_pages_badge_covers_no_writing(template, monkeypatch):
    """Where each text lies; what the networks would make does not matter for it."""
    boxes = {}

    def note(image, text, at, anchor="mm", size=28):
        boxes[text, at] = ImageDraw.Draw(image).textbbox(at, text, ImageFont.load_default(size), anchor, stroke_width=2)

    monkeypatch.setattr(thumbnails, "write", note)
    monkeypatch.setattr(thumbnails, "restore", lambda image, method, **settings: image.resize((4 * image.width, 4 * image.height)))
    thumbnails.restored.cache_clear()
    THUMBNAILS[template]()
    thumbnails.restored.cache_clear()
    assert boxes
    for (text, _), (left, top, right, bottom) in boxes.items():
        assert left >= BADGE[0] * SIDE or top >= BADGE[1] * SIDE, f"the badge covers {text!r}"
        assert left >= 0 and top >= 0 and right <= SIDE and bottom <= SIDE
    placed = list(boxes.values())
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for i, a in enumerate(placed) for b in placed[:i])
