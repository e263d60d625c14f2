"""The quality read-out: its numbers are those of fewstep_sr, for batches too, and what cannot be compared is refused."""

import pytest
import torch
from toys import picture


def figures(comfy, image, reference):
    return comfy.run("FewStepSRQuality", image=image, reference=reference)


def test_numbers_and_text(comfy):
    good = picture(1, 24, 32)
    noisy = (good + 0.1 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = figures(comfy, noisy, good)
    expected = comfy.module(".fewstep_sr.image.quality").compare(noisy.movedim(-1, 1), good.movedim(-1, 1))
    assert list(found.args) == [expected[name].item() for name in ("psnr", "ssim", "gmsd")]
    assert all(isinstance(value, float) for value in found.args)
    (text,) = found.ui.as_dict()["text"]
    assert text.splitlines() == [f"PSNR {found.args[0]:.4f} dB", f"SSIM {found.args[1]:.4f}", f"GMSD {found.args[2]:.4f}"]


def test_batches(comfy):
    good = picture(1, 24, 32)
    batch = torch.cat([good, good + 0.05, good - 0.1]).clamp(0, 1)
    singles = [figures(comfy, image[None], good).args for image in batch]
    found = figures(comfy, batch, good)
    for i in range(3):
        assert found.args[i] == pytest.approx(sum(single[i] for single in singles) / 3)
    (text,) = found.ui.as_dict()["text"]
    assert "mean of 3 images:" in text and f"1: {singles[1][0]:.4f} dB" in text
    each = figures(comfy, batch, batch)
    assert each.args[0] == pytest.approx(80) and each.args[2] == 0
    (text,) = figures(comfy, good.repeat(20, 1, 1, 1), good).ui.as_dict()["text"]
    assert text.endswith("and 4 more")


@pytest.mark.parametrize(
    ("size", "batch", "message"),
    [
        ((24, 28), 1, "image: found 28 x 24 pixels, expected 32 x 24, as reference has"),
        ((24, 32), 3, "reference: found 2 images, expected 1 or 3"),
    ],
)
def test_what_is_refused(comfy, size, batch, message):
    with pytest.raises(ValueError, match=message):
        figures(comfy, picture(1, *size, batch=batch), picture(2, 24, 32, batch=2 if batch == 3 else 1))


def test_too_small_for_the_window(comfy):
    with pytest.raises(ValueError, match="image: found 8 x 8 pixels, expected 11 a side at least"):
        figures(comfy, picture(1, 8, 8), picture(1, 8, 8))
