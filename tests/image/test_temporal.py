"""Frames steadied over time: noise falls, and what moves leaves no ghost."""

import pytest
import torch
import torch.nn.functional as F

from fewstep_sr.image.temporal import Steady, global_shift


def picture(side=96) -> torch.Tensor:
    noise = torch.rand(1, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)


def run(frames: list[torch.Tensor]) -> list[torch.Tensor]:
    steady = Steady()
    return [steady(frame) for frame in frames]


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -5), (-2, 7)])
def test_the_shift_of_a_whole_picture(shift):
    wide = picture(128)
    before, after = wide[..., 16:112, 16:112], wide[..., 16 - shift[0] : 112 - shift[0], 16 - shift[1] : 112 - shift[1]]
    assert global_shift(before, after) == shift
    unrelated = torch.rand(before.shape, generator=torch.Generator().manual_seed(5))
    assert global_shift(before, unrelated) == (0, 0) or (after - unrelated).abs().mean() > 0


def test_noise_falls_with_the_number_of_frames():
    generator = torch.Generator().manual_seed(2)
    clean = picture() * 0.8 + 0.1
    noisy = [clean + 0.03 * torch.randn(clean.shape, generator=generator) for _ in range(8)]
    errors = [(frame - clean).std().item() for frame in run(noisy)]
    assert errors[0] == pytest.approx(0.03, rel=0.05) and errors[-1] < 0.4 * errors[0]


def test_clean_frames_stay_as_they_are_along_a_pan():
    wide = picture(160)
    frames = [wide[..., 32:128, i * 3 : i * 3 + 96] for i in range(6)]
    for frame, steadied in zip(frames, run(frames), strict=True):
        assert (frame - steadied).abs().max() < 1e-5


def texture(height, width, seed) -> torch.Tensor:
    """A checkerboard on grey, whose mean over a few pixels says nothing."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    contrast = 0.1 + 0.1 * torch.rand((), generator=torch.Generator().manual_seed(seed))
    return 0.5 + contrast * (1 - 2 * ((rows + columns) % 2)).float().expand(1, 3, height, width)


@pytest.mark.parametrize("kind", ["red", "texture", "same_luma"])
def test_what_moves_by_itself_leaves_no_ghost(kind):
    """A square over a grainy background: neither it nor what it uncovers is mixed with what was there."""
    generator = torch.Generator().manual_seed(3)
    background = picture() if kind == "red" else torch.full((1, 3, 96, 96), 0.5)
    frames, clean, masks = [], [], []
    for i in range(8):
        frame, mask = background.clone(), torch.zeros(96, 96, dtype=torch.bool)
        mask[40:56, i * 8 : i * 8 + 16] = True
        colors = {"red": (0.9, 0.1, 0.1), "same_luma": (0.7, 0.4, 0.4)}
        frame[..., mask] = texture(16, 16, 1).flatten(2) if kind == "texture" else torch.tensor(colors[kind])[:, None]
        clean.append(frame)
        frames.append(frame + 0.02 * torch.randn(frame.shape, generator=generator))
        masks.append(mask)
    steadied = run(frames)[-1]
    far = torch.zeros(96, 96, dtype=torch.bool)
    far[:30] = True
    for region in (masks[-1], masks[-2] & ~masks[-1]):
        ghost = (steadied - clean[-1])[..., region]
        grain = (frames[-1] - clean[-1])[..., region]
        assert ghost.std() < 1.3 * grain.std() and ghost.mean().abs() < 0.01
    assert (steadied - clean[-1])[..., far].std() < 0.6 * (frames[-1] - clean[-1])[..., far].std()


def test_a_cut_leaves_no_ghost_and_another_size_begins_anew():
    generator = torch.Generator().manual_seed(4)
    shots = [picture() * 0.8 + 0.1, texture(96, 96, 2), torch.full((1, 3, 96, 96), 0.5), 0.9 - picture().flip(-1) * 0.8]
    steady, before = Steady(), None
    for clean in shots:
        for i in range(5):
            grain = 0.02 * torch.randn(clean.shape, generator=generator)
            left = steady(clean + grain) - clean
            if i == 0 and before is not None:
                shown = (left * (before - clean)).mean() / (before - clean).square().mean()  # the share of the shot before that is still seen
                assert shown.abs() < 0.02, shown
        assert left.std() < 0.7 * grain.std()
        before = clean
    assert steady(picture(64)).equal(picture(64))


def test_small_and_flat_frames():
    for size in ((1, 1), (2, 7), (16, 16)):
        flat = torch.full((1, 3, *size), 0.25)
        assert all(frame.equal(flat) for frame in run([flat, flat, flat]))
