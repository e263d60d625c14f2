"""What trainings read: data sets and the degradation; and Muon."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from pipelines.training.data import TrainingPictures, find_pictures, load_batches
from pipelines.training.degradation import Degradation, Order, _blur_kernel, _sinc_kernel, jpeg
from pipelines.training.latents import Encoder
from pipelines.training.losses import gradient_loss
from pipelines.training.optimizers import Muon, orthogonalize
from tools.miniature.autoencoder import small_vae
from tools.miniature.synthetic import write_pictures


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures", count=3, size=96, seed=0)
    return tmp_path / "pictures"


def test_a_sample_depends_on_its_number_alone(folder):
    pictures = TrainingPictures(find_pictures([folder]), 64, 12, seed=3, degradation=Degradation())
    whole = list(load_batches(pictures, 2))
    later = list(load_batches(TrainingPictures(find_pictures([folder]), 64, 12, seed=3, degradation=Degradation()), 2, first=4))
    assert [len(whole), len(later)] == [6, 4]
    for a, b in zip(whole[2:], later, strict=True):
        assert torch.equal(a["hq"], b["hq"]) and torch.equal(a["lq"], b["lq"])
    assert whole[0]["hq"].shape == (2, 3, 64, 64) and whole[0]["lq"].shape == (2, 3, 16, 16)
    other = TrainingPictures(find_pictures([folder]), 64, 12, seed=4)[0]["hq"]
    assert not torch.equal(other, pictures[0]["hq"])


def test_crops_come_again_and_are_encoded_once(folder):
    torch.manual_seed(0)
    encoder = Encoder(small_vae((32, 32, 32, 32)).eval())
    pictures = TrainingPictures(find_pictures([folder]), 64, 7, degradation=Degradation(), crops=3)
    assert torch.equal(pictures[5]["lq"], pictures[2]["lq"]) and not torch.equal(pictures[1]["lq"], pictures[2]["lq"])
    first, again = (torch.utils.data.default_collate([pictures[i] for i in rows]) for rows in ((0, 1), (4, 2)))
    kept = encoder(first["hq"], first["number"])
    mixed = encoder(torch.cat([torch.zeros_like(again["hq"][:1]), again["hq"][1:]]), again["number"])
    each = encoder(again["hq"])
    assert torch.equal(mixed.mean[0], kept.mean[1])
    torch.testing.assert_close(mixed.mean, each.mean)
    torch.testing.assert_close(mixed.logvar, each.logvar)


def test_lists_small_pictures_and_shares(folder, tmp_path):
    Image.new("RGB", (20, 50), "red").save(tmp_path / "small.png")
    (tmp_path / "list.txt").write_text("small.png\npictures/000000.png\n")
    paths = find_pictures([tmp_path / "list.txt"])
    assert [path.name for path in paths] == ["small.png", "000000.png"]
    only_small = TrainingPictures(paths, 64, 5, weights=[1, 0])
    assert all(torch.allclose(only_small[i]["hq"], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 64, 64)) for i in range(5))


def test_shares_of_any_size():
    for share in (1e-300, 1.0, 1e308):
        chances = TrainingPictures([Path("a"), Path("b"), Path("c")], 32, 1, weights=[share, share, 0.5 * share]).chances
        assert np.allclose(chances, [0.4, 0.4, 0.2])


def test_data_errors_name_the_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("gone.png\n")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for source, message in (("nowhere", "found nothing at"), ("empty", "found no pictures"), ("list.txt", "gone.png, which is not there")):
        with pytest.raises(ValueError, match=message):
            find_pictures([tmp_path / source])
    with pytest.raises(ValueError, match="broken.png, which can't be read"):
        TrainingPictures([tmp_path / "broken.png"], 64, 1)[0]


def test_degradation_is_seeded_and_a_quarter(folder):
    picture = TrainingPictures(find_pictures([folder]), 64, 1)[0]["hq"]
    degradation = Degradation()
    results = [degradation(picture, seed) for seed in range(20)]
    assert all(result.shape == (3, 16, 16) and result.min() >= 0 and result.max() <= 1 for result in results)
    assert torch.equal(results[7], degradation(picture, 7)) and not torch.equal(results[7], results[8])
    assert torch.allclose(results[3] * 255, (results[3] * 255).round(), atol=1e-4)
    with pytest.raises(ValueError, match="found 62 x 64 pixels, expected multiples of 4"):
        degradation(picture[:, :, :62], 0)


def test_degradation_without_its_parts_is_a_resize():
    """Chances at zero and ranges at one leave an enlarged-by-one picture, reduced."""
    still = Order(0.0, (1, 1), (0, 0, 1), (1, 1), (0, 0), (0, 0), (100, 100))
    ramp = torch.linspace(0.1, 0.9, 64).expand(3, 64, 64)
    result = Degradation(first=still, second=still, final_sinc_chance=0.0)(ramp, 0)
    assert (result - ramp.unflatten(-1, (16, 4)).mean(-1)[:, ::4]).abs().max() < 0.03


def test_a_share_is_degraded_mildly_and_the_others_as_without_it():
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 64
    published, mixed = Degradation(), Degradation(mild_chance=0.5)
    same = [torch.equal(published(picture, (seed, 1)), mixed(picture, (seed, 1))) for seed in range(20)]
    assert 5 < sum(same) < 15
    reduced = torch.nn.functional.avg_pool2d(picture, 4)
    errors = [[(degrade(picture, seed) - reduced).abs().mean().item() for seed in range(10)] for degrade in (published, Degradation(mild_chance=1))]
    assert np.mean(errors[1]) < 0.5 * np.mean(errors[0])
    assert torch.equal(Degradation(mild_chance=1)(picture, 7), Degradation(mild_chance=1)(picture, 7))


def test_kernels_and_jpeg():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert abs(_blur_kernel(rng, 21, (0.2, 3.0)).sum() - 1) < 1e-5
    kernel = _sinc_kernel(21, np.pi)
    assert abs(kernel.sum() - 1) < 1e-5 and kernel.argmax() == 21 * 21 // 2
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = [(jpeg(noise, quality) - noise).abs().mean() for quality in (95, 60, 30)]
    assert errors == sorted(errors) and errors[0] > 0


def test_muon_makes_steps_orthogonal_and_learns():
    matrix = orthogonalize(torch.randn(12, 30, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(matrix)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.manual_seed(0)
    network, target = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
    optimizer, x = Muon(list(network.parameters()), lr=1e-2), torch.randn(4, 8, 8, 8)
    losses = []
    for _ in range(100):
        loss = (network(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_muon_in_bfloat16_steps_nearly_the_same():
    steps = []
    for dtype in (None, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(16, 16))
        weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0, matrix_lr=1.0, dtype=dtype).step()
        steps.append(weight.detach())
    assert steps[1].dtype == torch.float32 and not torch.equal(*steps)
    assert (steps[0] - steps[1]).norm() < 0.1 * steps[0].norm()


def test_muon_decays_what_gets_no_gradient():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.zeros(8, 8)
    Muon([weight], lr=1.0, matrix_lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((8, 8), 0.95))


def test_gradient_loss_by_hand():
    a, b = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    b[..., :2] = 1  # one edge of height 1 between columns 1 and 2
    assert gradient_loss(a, b, scales=1).item() == pytest.approx(1 / 3)  # of three differences in each row, one is off by 1
    assert gradient_loss(a, b, scales=2).item() == pytest.approx(1 / 3 + 1)
    assert gradient_loss(b + 5, b, scales=2).item() == 0
