"""Pixels under alpha 0 are filled from the visible ones."""

import pytest
import torch

from fewstep_sr.image.alpha import fill_transparent

RED = torch.tensor([220.0, 60.0, 40.0]).view(1, 3, 1, 1) / 255


def disc(height=64, width=64, soft=4.0) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.hypot(y - height / 2, x - width / 2)
    return ((0.35 * min(height, width) - distance) / soft).clamp(0, 1)[None, None]


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (1, 9), (5, 1)])
@pytest.mark.parametrize("hidden", [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)])
def test_one_visible_colour_fills_everything(size, hidden):
    alpha = disc(*size) if min(size) > 5 else torch.arange(size[0] * size[1]).view(1, 1, *size).remainder(3).float() / 2
    rgb = torch.where(alpha > 0, RED, torch.tensor(hidden).view(1, 3, 1, 1))
    filled = fill_transparent(rgb, alpha)
    assert (filled - RED).abs().max() < 1e-5
    assert torch.equal(filled.where(alpha > 0, 0), rgb.where(alpha > 0, 0))


def test_colours_come_from_nearby():
    """Left half red, right half blue, with a transparent frame: each side of the frame gets its neighbour's colour, smoothly between."""
    rgb = torch.zeros(1, 3, 40, 80)
    rgb[:, 0, :, :40], rgb[:, 2, :, 40:] = 1, 1
    alpha = torch.zeros(1, 1, 40, 80)
    alpha[..., 10:30, 10:70] = 1
    rgb[:, 1] = torch.where(alpha[0] > 0, 0.0, 1.0)  # green below the frame
    filled = fill_transparent(rgb, alpha)
    assert filled[:, 1].abs().max() < 1e-5
    assert filled[0, 0, 20, 8] > 0.95 and filled[0, 2, 20, 72] > 0.95
    assert 0.2 < filled[0, 0, 2, 40] < 0.8
    assert (filled[..., 1:] - filled[..., :-1]).abs()[..., :5, :].max() < 0.25


def test_faint_pixels_count_by_their_alpha():
    alpha = torch.tensor([1.0, 0.0, 1 / 255]).view(1, 1, 1, 3)
    rgb = torch.stack([torch.tensor([0.2, 0.9, 1.0])] * 3)[None, :, None]
    filled = fill_transparent(rgb, alpha)
    assert torch.equal(filled[..., [0, 2]], rgb[..., [0, 2]])
    assert filled[0, 0, 0, 1] < 0.45


def test_nothing_to_fill_and_nothing_to_fill_from():
    rgb = torch.rand(2, 3, 6, 7)
    assert torch.equal(fill_transparent(rgb, torch.ones(1, 1, 6, 7)), rgb)
    assert torch.equal(fill_transparent(rgb, torch.zeros(2, 1, 6, 7)), rgb)
    half = fill_transparent(rgb.half(), torch.ones(2, 1, 6, 7).tril())
    assert half.dtype == torch.float16 and torch.isfinite(half).all()


def test_each_picture_of_a_batch_has_its_own():
    rgb = torch.rand(2, 3, 9, 9)
    alpha = torch.stack([torch.ones(1, 9, 9), torch.eye(9)[None]])
    both = fill_transparent(rgb, alpha)
    assert torch.equal(both[0], rgb[0])
    assert torch.equal(both[1:], fill_transparent(rgb[1:], alpha[1:]))


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"alpha: found shape \(1, 1, 4, 5\), expected \(1, 1, 4, 6\)"):
        fill_transparent(torch.rand(1, 3, 4, 6), torch.ones(1, 1, 4, 5))
