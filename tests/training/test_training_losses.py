"""The losses of both trainings: score distillation against the authors' own code, the others against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
import toys
from diffusers import UNet2DConditionModel
from toys import gaussian, golden, relative_error

from fewstep_sr.diffusion import add_noise, alpha_bar_at, predict_x0
from fewstep_sr.networks.posterior import Posterior
from pipelines.training.adapters import adapt_regulariser
from pipelines.training.common import denoiser
from pipelines.training.discriminator import LatentDiscriminator, PatchDiscriminator
from pipelines.training.distillation import CLASSIFIER_TIMESTEPS, classifier_distillation_loss, distillation_loss, regulariser_loss
from pipelines.training.losses import (
    LATENT_BOUND,
    _gradient_magnitude,
    adversarial_loss,
    gaussian_constraint,
    gradient_loss,
    gradient_similarity,
    hinge_loss,
    texture_loss,
    variance_constraint,
)
from pipelines.training.perceptual import _VGG, LatentLPIPS, load_lpips

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def networks():
    """The frozen UNet and the regulariser of the golden case, whose updates act in the middle alone, as in the authors' program."""
    settings, _ = golden("vsd")
    frozen, regulariser = (UNet2DConditionModel(**settings["unet"]) for _ in range(2))
    for network in (frozen, regulariser):
        network.load_state_dict(toys.weights(settings["seed"], "unet", {k: tuple(v.shape) for k, v in network.state_dict().items()}))
    adapt_regulariser(regulariser, settings["lora_rank"])
    low_rank = {k: tuple(v.shape) for k, v in regulariser.state_dict().items() if ".lora_" in k}
    regulariser.load_state_dict(toys.weights(settings["seed"], "regulariser.unet", low_rank), strict=False)
    return frozen.requires_grad_(False), regulariser


@pytest.fixture
def tensors():
    settings, arrays = golden("vsd")
    seed, shape = settings["seed"], arrays["vsd_grad"].shape
    latents = gaussian(seed, "vsd_latents", shape).requires_grad_()
    embeds, negative = (gaussian(seed, name, (2, 77, 64)) for name in ("prompt_embeds", "negative_prompt_embeds"))
    return settings, arrays, latents, embeds, negative


def test_distillation(networks, tensors):
    frozen, regulariser = networks
    settings, arrays, latents, embeds, negative = tensors
    noise, timesteps = gaussian(settings["seed"], "vsd_noise", latents.shape), torch.tensor(settings["vsd_timesteps"])
    loss = distillation_loss(latents, noise, timesteps, denoiser(frozen), denoiser(regulariser), embeds, negative, settings["cfg"])
    loss.backward()
    assert relative_error(loss.detach(), arrays["vsd_loss"]) < TOLERANCE
    assert relative_error(latents.grad, arrays["vsd_grad"]) < TOLERANCE
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())


def test_regulariser(networks, tensors):
    _, regulariser = networks
    settings, arrays, latents, embeds, _ = tensors
    noise, timesteps = gaussian(settings["seed"], "diff_noise", latents.shape), torch.tensor(settings["diff_timesteps"])
    loss = regulariser_loss(latents, noise, timesteps, denoiser(regulariser), embeds)
    loss.backward()
    assert relative_error(loss.detach(), arrays["diff_loss"]) < TOLERANCE
    assert latents.grad is None
    assert {name for name, p in regulariser.named_parameters() if p.grad is not None} == {
        name for name in regulariser.state_dict() if ".lora_" in name
    }
    regulariser.zero_grad()


def test_distillation_stands_still_where_both_agree(tensors):
    """Without guidance, and with a regulariser that thinks as the frozen network does, nothing pulls."""
    _, _, latents, embeds, _ = tensors
    denoise = lambda noisy, timesteps, embeds: 0.3 * noisy  # noqa: E731
    loss = distillation_loss(latents, torch.randn_like(latents), torch.tensor([30, 900]), denoise, denoise, embeds, None, guidance=1)
    loss.backward()
    assert loss.item() == 0 and latents.grad.abs().max() == 0


def test_without_guidance_the_frozen_network_is_asked_once(tensors):
    """Guidance g takes negative + g (positive - negative); 1 needs no negative prompt, and does not compute one. The published guidance is 7.5."""
    _, _, latents, embeds, negative = tensors
    noise, timesteps, asked = torch.randn_like(latents), torch.tensor([30, 900]), []

    def frozen(noisy, timesteps, prompt):
        asked.append(prompt)
        return noisy * (0.3 if prompt is embeds else 0.1)

    def guided(factor):
        return lambda noisy, timesteps, prompt: noisy * factor

    arguments = latents, noise, timesteps
    loss = distillation_loss(*arguments, frozen, guided(0.2), embeds, None, guidance=1)
    assert len(asked) == 1 and asked[0] is embeds
    assert loss.item() == pytest.approx(distillation_loss(*arguments, guided(0.3), guided(0.2), embeds, None, guidance=1).item())
    loss = distillation_loss(*arguments, frozen, guided(0.2), embeds, negative)
    assert len(asked) == 3
    assert loss.item() == pytest.approx(
        distillation_loss(*arguments, guided(0.1 + 7.5 * 0.2), guided(0.2), embeds, None, guidance=1).item(), rel=1e-4
    )


def test_noise_and_x0_are_each_others_inverse():
    latents, noise, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    alpha_bar = alpha_bar_at(timesteps, latents)
    assert torch.allclose(predict_x0(add_noise(latents, noise, alpha_bar), noise, alpha_bar), latents, atol=1e-4)


def test_gaussian_constraint():
    """KL of N(m, s^2) to N(0, 1) is (m^2 + s^2 - 1 - ln s^2) / 2: with m = 2 and s^2 = 1 it is 2, with m = 0 and s^2 = e it is (e - 2) / 2."""
    mean, logvar = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert gaussian_constraint(Posterior(mean, logvar)).item() == pytest.approx((2 + (torch.e - 2) / 2) / 2)
    assert variance_constraint(Posterior(mean, logvar)).item() == pytest.approx((0 + (torch.e - 2) / 2) / 2)
    assert gaussian_constraint(Posterior(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))).item() == 0


def test_hinge_and_adversarial_losses():
    """Real logits 2 and 0.5 miss 1 by 0 and 0.5, fake ones -3 and 0 miss -1 by 0 and 1; halved, averaged in each map, then over the maps."""
    real, fake = [torch.tensor([2.0, 0.5]), torch.tensor([1.0])], [torch.tensor([-3.0, 0.0]), torch.tensor([-0.5])]
    assert hinge_loss(real, fake).item() == pytest.approx((0.5 * (0.25 + 0.5) + 0.5 * 0.5) / 2)
    assert adversarial_loss(fake).item() == pytest.approx((1.5 + 0.5) / 2)
    with pytest.raises(ValueError, match="shorter"):
        hinge_loss(real, fake[:1])


def test_latent_lpips(tmp_path):
    """A file with the published keys: the distance is the weighted one of unit features, computed here with torch's own functions."""
    torch.manual_seed(0)
    state, width = {}, 4
    for i, group in enumerate(_VGG):
        for place, channels in group:
            state[f"net.slice{i + 1}.{place}.weight"] = torch.randn(channels, width, 3, 3) / (3 * width**0.5)
            state[f"net.slice{i + 1}.{place}.bias"] = 0.1 * torch.randn(channels)
            width = channels
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    torch.save(state, tmp_path / "vgg16_sdturbo_lpips.pth")
    network = LatentLPIPS.from_file(tmp_path / "vgg16_sdturbo_lpips.pth")

    a, b = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    expected, features = torch.zeros(2), [a, b]
    for i, group in enumerate(_VGG):
        features = [F.max_pool2d(x, 2) if i == 4 else x for x in features]
        for place, _ in group:
            features = [
                F.conv2d(x, state[f"net.slice{i + 1}.{place}.weight"], state[f"net.slice{i + 1}.{place}.bias"], padding=1).relu() for x in features
            ]
        difference = (F.normalize(features[0], dim=1) - F.normalize(features[1], dim=1)) ** 2
        expected += F.conv2d(difference, state[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
    assert network(a, b).item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert network(a, a).item() == 0

    torch.save({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*vgg16_sdturbo_lpips\.pth"):
        LatentLPIPS.from_file(tmp_path / "other.pth")
    wrong = {
        r"net\.slice1\.0\.weight has the shape \(1,\), expected": {"net.slice1.0.weight": torch.ones(1)},  # which copy_ would spread over the layer
        r"net\.slice1\.0\.bias has no tensor, expected": {"net.slice1.0.bias": 5},
        r"lin0\.model\.1\.weight holds values that are not finite": {"lin0.model.1.weight": torch.full((1, 64, 1, 1), float("nan"))},
    }
    for message, changes in wrong.items():
        torch.save(state | changes, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=rf"^other\.pth: {message}"):
            LatentLPIPS.from_file(tmp_path / "other.pth")


def test_lpips_is_not_fetched(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_lpips() is None and "the LPIPS loss, which the published training uses, is left out" in caplog.text
    assert not any(tmp_path.rglob("*.pth"))


def test_discriminator_sees_every_scale():
    torch.manual_seed(0)
    network = LatentDiscriminator(text_width=32, channels=(32, 64))
    logits = network(torch.randn(2, 4, 8, 8), torch.tensor([199, 99]), torch.randn(2, 8, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 1, 4, 4), (2, 1, 8, 8), (2, 1, 8, 8)]
    adversarial_loss(logits).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # several processes wait for every gradient


def test_patch_discriminator_looks_at_patches():
    """Half the size twice; each logit sees a patch around it and no more; detail that is faint in the picture is not faint to it."""
    torch.manual_seed(0)
    network = PatchDiscriminator((8, 16, 32)).eval()  # whose power iteration rests
    picture = torch.randn(1, 3, 64, 64, requires_grad=True)
    (logits,) = network(picture)
    assert logits.shape == (1, 1, 16, 16)
    logits[0, 0, 8, 8].backward()
    rows = picture.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert 16 <= rows.max() - rows.min() < 32 and rows.min() < 33 < rows.max()
    flat, checks = torch.zeros(1, 3, 32, 32), 0.1 * (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32)).expand(1, 3, 32, 32)
    with torch.no_grad():
        changes = [(network(flat + change)[0] - network(flat)[0])[..., 2:-2, 2:-2].abs().mean() for change in (checks, 0.1)]
    assert changes[0] > changes[1]
    adversarial_loss(network.train()(picture)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_texture_loss():
    """Twice the texture is four times the energy; where there is none, the floor counts: an eight-bit step, squared, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.randn(1, 1, 96, 96, generator=generator).expand(-1, 3, -1, -1) for _ in range(2))
    flat = torch.zeros(1, 3, 96, 96)
    assert texture_loss(noise, noise).item() == 0
    assert texture_loss(2 * noise, noise).item() == pytest.approx(math.log(4), rel=1e-3)
    assert texture_loss(0.2 * noise, 0.2 * other) < 0.3 * texture_loss(flat, 0.2 * other)  # though it is farther by squared distance
    energy = 8 / 9 * (2 / 255) ** 2  # of noise by an eight-bit step, without its mean of nine; a quarter of that at half the size
    expected = (math.log(1 + 8 / 9) + math.log(1 + 2 / 9)) / 2
    assert texture_loss(flat, 2 / 255 * noise).item() == pytest.approx(expected, rel=0.05), energy
    bright = torch.cat([2 / 255 * noise[:, :1], flat[:, :2]], 1)
    assert texture_loss(flat, bright) < texture_loss(flat, 2 / 255 * noise) / 5  # red alone is three tenths of luma


def test_texture_loss_by_its_definition():
    """Detail is luma without its mean of 3 x 3; energies are over squares of 16 pixels, 8 apart, then, at half the size, over 8, 4 apart."""
    pictures = torch.rand(2, 2, 3, 66, 58, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    lumas = [0.299 * p[:, 0] + 0.587 * p[:, 1] + 0.114 * p[:, 2] for p in pictures]
    expected = 0.0
    for side in (16, 8):
        details = [luma[:, 1:-1, 1:-1] - luma.unfold(1, 3, 1).unfold(2, 3, 1).mean((-1, -2)) for luma in lumas]
        a, b = (detail.square().unfold(1, side, side // 2).unfold(2, side, side // 2).mean((-1, -2)) for detail in details)
        floor = 4 / 65025  # (2 / 255)^2
        expected += ((a + floor) / (b + floor)).log().abs().mean().item() / 2
        lumas = [luma.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)) for luma in lumas]
    assert texture_loss(*pictures).item() == pytest.approx(expected, rel=1e-9)


def prewitt(rows: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude of a grey picture (h, w) by its definition, away from the border: differences of neighbours two apart, averaged over three lines."""
    along = (rows[:, 2:] - rows[:, :-2])[:-2] + (rows[:, 2:] - rows[:, :-2])[1:-1] + (rows[:, 2:] - rows[:, :-2])[2:]
    down = (rows[2:] - rows[:-2])[:, :-2] + (rows[2:] - rows[:-2])[:, 1:-1] + (rows[2:] - rows[:-2])[:, 2:]
    return ((along / 3) ** 2 + (down / 3) ** 2).sqrt()


def test_gradient_similarity():
    found, expected = torch.rand(2, 1, 1, 24, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    found, expected = (F.pad(p, (8, 8, 8, 8), value=0.0) for p in (found, expected))  # no gradients at the border
    halves = [p[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)) for p in (found, expected)]
    g, h = (prewitt(F.pad(half, (1, 1, 1, 1))) for half in halves)
    constant = 170 / 255**2
    by_hand = ((2 * g * h + constant) / (g**2 + h**2 + constant)).mean()
    similarity = gradient_similarity(found.expand(-1, 3, -1, -1), expected.expand(-1, 3, -1, -1))
    assert relative_error(similarity, by_hand) < 1e-4
    assert by_hand < 0.95
    assert gradient_similarity(expected.expand(-1, 3, -1, -1), expected.expand(-1, 3, -1, -1)) == pytest.approx(1)


def test_gradient_magnitude_is_of_luma():
    """A ramp of 0.01 a pixel in one channel is one of 0.02 times its share of luma at half the size, 0.04 over two of its pixels; a flat picture has 1e-4."""
    for channel, share in enumerate((0.299, 0.587, 0.114)):
        for turned in (False, True):
            picture = torch.zeros(1, 3, 32, 32)
            picture[0, channel] = 0.01 * torch.arange(32)
            magnitude = _gradient_magnitude(picture.mT if turned else picture)
            assert magnitude.shape == (1, 16, 16)
            assert magnitude[0, 8, 8].item() == pytest.approx(0.04 * share, rel=1e-3, abs=4e-6)
    assert _gradient_magnitude(torch.full((1, 3, 32, 32), 0.5))[0, 8, 8].item() == pytest.approx(1e-4)


def test_gradient_similarity_is_the_papers():
    """(2 a b + c) / (a^2 + b^2 + c), c = 170 of eight-bit pictures squared (Xue et al.), in the mean; faint pictures show what c is."""
    a, b = 0.1 * torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, h = _gradient_magnitude(a), _gradient_magnitude(b)
    c = 170 / 255 / 255
    assert gradient_similarity(a, b).item() == pytest.approx(((2 * g * h + c) / (g * g + h * h + c)).mean().item(), rel=1e-9)


def test_gradient_loss():
    """Of three sizes, whole, half and quarter: rows' and columns' differences, in each channel by itself."""
    a, b = torch.rand(2, 2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(())
    for side in (1, 2, 4):
        x, y = (p.unfold(2, side, side).unfold(3, side, side).mean((-1, -2)) for p in (a, b))
        expected += ((x[:, :, 1:] - x[:, :, :-1]) - (y[:, :, 1:] - y[:, :, :-1])).abs().mean()
        expected += ((x[..., 1:] - x[..., :-1]) - (y[..., 1:] - y[..., :-1])).abs().mean()
    assert torch.allclose(gradient_loss(a, b), expected)


def test_guidance_needs_a_negative_prompt(tensors):
    _, _, latents, embeds, _ = tensors
    with pytest.raises(ValueError, match=r"negative_prompt_embeds: found none with guidance 7\.5\. Give the negative prompt"):
        distillation_loss(latents, latents, torch.tensor([30, 900]), lambda x, t, e: x, lambda x, t, e: x, embeds, None)


def test_classifier_distillation(tensors):
    """The gradient leads from the prediction for the negative prompt to the guided one, in units of the latents' distance to the latter."""
    _, _, latents, embeds, negative = tensors
    assert CLASSIFIER_TIMESTEPS == (20, 500)
    noise, timesteps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 400])
    loss = classifier_distillation_loss(latents, noise, timesteps, lambda x, t, e: x * (0.3 if e is embeds else 0.1), embeds, negative)
    loss.backward()
    alpha_bar = alpha_bar_at(timesteps, latents)
    noisy = add_noise(latents.detach(), noise, alpha_bar)
    fake, real = (predict_x0(noisy, noisy * factor, alpha_bar) for factor in (0.1, 0.1 + 7.5 * 0.2))
    pull = (fake - real) / (latents.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert relative_error(latents.grad, 2 / latents.numel() * pull) < 1e-4
    assert loss.item() == pytest.approx(pull.square().mean().item(), rel=1e-4)


def test_discriminator_bound():
    """InvSR's trainer clamps the latents that its discriminator sees to -10 and 10."""
    assert LATENT_BOUND == 10


def test_gradient_similarity_wants_texture():
    """Between a flat picture and one with as much texture but another, the latter is nearer; by squared distance it is farther."""
    generator = torch.Generator().manual_seed(0)
    expected, other = (torch.randn(1, 3, 64, 64, generator=generator) * 0.1 + 0.5 for _ in range(2))
    flat = torch.full_like(expected, 0.5).requires_grad_()
    assert gradient_similarity(other, expected) > gradient_similarity(flat, expected) + 0.1
    assert F.mse_loss(other, expected) > F.mse_loss(flat, expected)
    gradient_similarity(flat, expected).backward()  # where there are no edges, too
    assert flat.grad.isfinite().all()
