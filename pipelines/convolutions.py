"""Convolutions that take a CPU less time: the same sums in another order, equal to rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn


class Convolutions(NamedTuple):
    """What is faster on a processor (:func:`pipelines.processor.choose_convolutions`).

    Args:
        transposed: whether enlargements and the convolutions after them are transposed convolutions.
        product_pixels: images of at most so many pixels are convolved as a product of matrices.
    """

    transposed: bool = False
    product_pixels: int = 0


class ProductConv2d(nn.Conv2d):
    """A 3 x 3 convolution, padded by 1, as a product of matrices where its image is small: oneDNN would bring the weights into an order of its own, which then takes longer than the sums."""

    product_pixels = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        size = [(side - 1) // stride + 1 for side, stride in zip(input.shape[-2:], self.stride, strict=True)]
        if input.device.type != "cpu" or torch.compiler.is_compiling() or size[0] * size[1] > self.product_pixels:
            return super().forward(input)
        patches = F.unfold(input, 3, padding=1, stride=self.stride)  # (B, C * 9, pixels)
        weight = self.weight.flatten(1).expand(len(input), -1, -1)
        product = weight @ patches if self.bias is None else torch.baddbmm(self.bias[:, None], weight, patches)
        return product.view(len(input), self.out_channels, *size)


class TransposedUpsample(nn.Module):
    """Enlargement to twice the size by repeated pixels and a 3 x 3 convolution, as one transposed convolution with 16 products for each pixel instead of 36.

    Args:
        conv: the convolution.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.transposed: torch.Tensor
        self.register_buffer("transposed", transposed_weight(conv.weight.detach()), persistent=False)

    def forward(self, hidden_states: torch.Tensor, output_size=None, *args, **kwargs) -> torch.Tensor:
        if output_size is not None or hidden_states.device.type != "cpu":
            enlarged = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
            return self.conv(F.interpolate(hidden_states, **enlarged, mode="nearest"))
        return F.conv_transpose2d(hidden_states, self.transposed, self.conv.bias, stride=2, padding=1)


def transposed_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights (C, D, 4, 4) of a transposed convolution of stride 2 that does what a convolution with (D, C, 3, 3) does on repeated pixels."""
    kernels = weight.float().transpose(0, 1).flip(2, 3).flatten(0, 1)[:, None]
    sums = F.conv2d(kernels, kernels.new_ones(1, 1, 2, 2), padding=1)  # each weight falls on two rows and two columns
    sums = sums.view(weight.shape[1], weight.shape[0], 4, 4).to(weight.dtype)
    return sums.contiguous(memory_format=torch.channels_last) if weight.is_contiguous(memory_format=torch.channels_last) else sums


def replace_convolutions(unet: nn.Module, decoder: nn.Module, choice: Convolutions) -> None:
    """Let a UNet's convolutions, and a decoder's enlargements, run as ``choice`` says. Weights, and their names, stay as they are."""
    if choice.product_pixels:
        _replace(unet, _can_be_product, lambda conv: as_product(conv, choice.product_pixels))
    if choice.transposed:
        _replace(decoder, _repeats_and_convolves, lambda upsample: TransposedUpsample(upsample.conv))


def _replace(network: nn.Module, which: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if which(child):
                setattr(parent, name, make(child))


def _can_be_product(module: Any) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def as_product(conv: nn.Conv2d, pixels: int) -> ProductConv2d:
    """The convolution as one that is a product of matrices for images of at most so many ``pixels``; it has the same weights."""
    product = ProductConv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, device="meta")  # type: ignore[arg-type]
    product.weight, product.bias, product.product_pixels = conv.weight, conv.bias, pixels
    return product


def _repeats_and_convolves(module: Any) -> bool:
    plain = isinstance(module, Upsample2D) and module.interpolate and module.norm is None and isinstance(getattr(module, "conv", None), nn.Conv2d)
    return plain and module.conv.kernel_size == (3, 3) and module.conv.padding == (1, 1)
