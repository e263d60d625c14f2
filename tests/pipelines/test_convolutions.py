"""Convolutions in the order that takes a CPU less time give what they gave, under the names that their weights had."""

import copy

import pipeline_toys
import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from pipelines import processor
from pipelines.convolutions import Convolutions, ProductConv2d, TransposedUpsample, replace_convolutions
from pipelines.processor import MIN_GAIN, PRODUCT_SIDES, choose_convolutions, gains_of_convolutions


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (7, 4), (16, 16)])
@torch.no_grad()
def test_an_enlargement_is_a_transposed_convolution(memory_format, size):
    torch.manual_seed(0)
    upsample = Upsample2D(6, use_conv=True, out_channels=5).to(memory_format=memory_format)
    image = torch.randn(2, 6, *size).contiguous(memory_format=memory_format)
    transposed = TransposedUpsample(upsample.conv)
    assert torch.allclose(transposed(image), upsample(image), rtol=1e-5, atol=1e-6)
    other = 2 * size[0] - 1, 2 * size[1]  # which a UNet asks for
    assert torch.equal(transposed(image, other), upsample(image, other))


@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, True), (1, False)])
@torch.no_grad()
def test_a_convolution_of_a_small_image_is_a_product(monkeypatch, stride, bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 5, 3, stride, padding=1, bias=bias))
    replaced = copy.deepcopy(network)
    replace_convolutions(replaced, nn.Identity(), Convolutions(product_pixels=12))
    assert type(replaced[0]) is ProductConv2d and replaced.state_dict().keys() == network.state_dict().keys()
    whole, convolved = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, image: convolved.append(self) or whole(self, image))
    for height, width in ((3 * stride, 4 * stride), (3 * stride, 5 * stride)):
        image = torch.randn(2, 6, height, width)
        assert torch.allclose(replaced(image), network(image), rtol=1e-5, atol=1e-6)
    assert convolved.count(replaced[0]) == 1  # of the larger one alone


@torch.no_grad()
def test_networks_give_what_they_gave():
    torch.manual_seed(0)
    components = pipeline_toys.components(3)
    unet, vae = components["unet"], components["vae"]
    inputs = torch.randn(1, 4, 12, 8), torch.tensor(999), torch.randn(1, 77, unet.config.cross_attention_dim)
    run = lambda: (unet(*inputs).sample, vae.decode(inputs[0]).sample)  # noqa: E731
    expected, names = run(), [*unet.state_dict(), *vae.state_dict()]
    replace_convolutions(unet, vae.decoder, Convolutions(True, 16**2))
    kinds = {type(module) for network in (unet, vae) for module in network.modules()}
    assert {ProductConv2d, TransposedUpsample} <= kinds and [*unet.state_dict(), *vae.state_dict()] == names
    assert not any(isinstance(module, Upsample2D) for module in vae.decoder.modules())
    for found, before in zip(run(), expected, strict=True):
        assert torch.allclose(found, before, rtol=1e-4, atol=1e-5)


def test_what_is_not_plain_stays():
    kept = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 4, 3, padding=1, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, padding=1, dilation=2),
            "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "pointwise": nn.Conv2d(4, 4, 1),
            "unpadded": nn.Conv2d(4, 4, 3),
            "normalised": Upsample2D(4, use_conv=True, norm_type="ln_norm"),
            "transposed": Upsample2D(4, use_conv_transpose=True),
            "repeated": Upsample2D(4),
        }
    )
    before = dict(kept.named_modules())
    replace_convolutions(kept, kept, Convolutions(True, 1))
    assert [name for name, module in kept.named_modules() if module is not before[name]] == ["normalised.conv"]


@pytest.mark.parametrize(
    ("small", "large", "transposed", "expected"),
    [
        (2.0, 1.5, 2.0, Convolutions(True, PRODUCT_SIDES[1] ** 2)),
        (2.0, 1.0, 1.01, Convolutions(False, PRODUCT_SIDES[0] ** 2)),
        (1.0, 2.0, MIN_GAIN, Convolutions(True, 0)),
    ],
)
def test_only_what_is_measured_faster(monkeypatch, small, large, transposed, expected):
    gains = {PRODUCT_SIDES[0]: small, PRODUCT_SIDES[1]: large, "transposed": transposed}
    monkeypatch.setattr(processor, "gains_of_convolutions", lambda dtype, memory_format: gains)
    assert choose_convolutions(torch.float32, torch.channels_last) == expected


def test_gains_are_measured():
    assert all(0.01 < gain < 100 for gain in gains_of_convolutions(torch.float32, torch.contiguous_format, channels=16).values())
