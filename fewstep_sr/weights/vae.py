"""Stable Diffusion's VAE out of a file of it, a whole checkpoint or a diffusers folder, under diffusers' names and complete."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from .forked import safe_after_fork
from .kinds import unwrap, without_wrappers
from .read import read_weights
from .strict import own_copies, printable

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_PREFIX = "first_stage_model."
"""Of the VAE's keys in a whole checkpoint."""

_FILES = tuple(f"diffusion_pytorch_model{end}" for end in (".safetensors", ".fp16.safetensors", ".bin"))

# The names of the original latent diffusion, and of diffusers before 0.18, as diffusers has them now. Up-blocks are counted from the other end.
_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
)


@safe_after_fork()
def read_vae(path: str | Path) -> dict[str, torch.Tensor]:
    """The VAE's weights under diffusers' names, copied to the CPU: encoder, ``quant_conv``, ``post_quant_conv`` and decoder.

    Args:
        path: a file of a VAE or of a whole checkpoint, a diffusers folder, or the ``vae`` folder in one.

    Raises:
        FileNotFoundError: there is nothing, or no VAE in the folder.
        ValueError: the file is damaged or incomplete, or its VAE is not Stable Diffusion's.
    """
    path = _file_of(Path(path))
    state, _ = read_weights(path, pass_over=True)
    name = printable(path.name)
    weights = _diffusers_names(without_wrappers(unwrap(state) or state, name))
    if not weights:
        raise ValueError(f"{name}: found no VAE, expected Stable Diffusion's: a file of it, a whole checkpoint, or a diffusers folder.")
    expected = {"quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,), "post_quant_conv.weight": (4, 4, 1, 1), "post_quant_conv.bias": (4,)}
    for part in ("encoder", "decoder"):
        expected |= {f"{part}.{key}": shape for key, shape in coder_shapes(weights, part, name).items()}
    return require_shapes(weights, expected, name)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    places = [folder / name for folder in (path / "vae", path) for name in _FILES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{printable(str(path))}: found no {_FILES[0]} in this folder or in its vae folder. Give a diffusers folder or a file."
        )
    return found


def _diffusers_names(state: Mapping) -> dict[str, torch.Tensor]:
    whole = any(str(key).startswith(_PREFIX) for key in state)
    weights = {str(key).removeprefix(_PREFIX): value for key, value in state.items() if not whole or str(key).startswith(_PREFIX)}
    weights = {key: value for key, value in weights.items() if key.startswith(PARTS) and isinstance(value, torch.Tensor)}
    levels = 1 + max((int(found.group(1)) for key in weights if (found := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    renamed = {}
    for key, value in weights.items():
        short = re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up.{levels - 1 - int(found.group(1))}.", key)
        for pattern, name in _NAMES:
            short = re.sub(pattern, name, short)
        linear = ".attentions." in short and value.ndim == 4 and tuple(value.shape[2:]) == (1, 1)  # a convolution in the original
        renamed[short] = value.flatten(1) if linear else value
    return renamed


def coder_shapes(weights: Mapping[str, torch.Tensor], part: str, name: str) -> dict[str, tuple[int, ...]]:
    """Every weight of Stable Diffusion's ``"encoder"`` or ``"decoder"`` by diffusers' name without the part, with its shape.

    Widths and layers are read off ``weights``.

    Raises:
        ValueError: a level has no weights by which its width is known, or the latents have not 4 channels.
    """
    down = part == "encoder"
    blocks = f"{part}.{'down' if down else 'up'}_blocks"
    numbers = [found.groups() for key in weights if (found := re.match(rf"{blocks}\.(\d+)\.resnets\.(\d+)\.conv2\.weight$", key))]
    levels, layers = 1 + max((int(i) for i, _ in numbers), default=-1), 1 + max((int(j) for _, j in numbers), default=-1)
    widths = [_width(weights, f"{blocks}.{i}.resnets.0.conv2.weight", name) for i in range(min(levels, 8))]
    if levels != 4 or not 1 <= layers <= 8:
        raise ValueError(
            f"{name}: found {levels} levels in the VAE's {part}, expected Stable Diffusion's 4; the file is incomplete or of another model."
        )
    shapes = _Shapes()
    first, last, deepest = widths[0], widths[-1], widths[-1] if down else widths[0]
    shapes.convolution("conv_in", 3 if down else 4, first)
    before = first
    for i, width in enumerate(widths):
        for j in range(layers):
            shapes.resnet(f"{'down' if down else 'up'}_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < levels - 1:
            shapes.convolution(f"down_blocks.{i}.downsamplers.0.conv" if down else f"up_blocks.{i}.upsamplers.0.conv", width, width)
    shapes.middle("mid_block", deepest)
    shapes.norm("conv_norm_out", last)
    shapes.convolution("conv_out", last, 8 if down else 3)
    return shapes.found


def _width(weights: Mapping[str, torch.Tensor], key: str, name: str) -> int:
    if key not in weights or not weights[key].ndim:
        raise ValueError(f"{name}: {key} is missing; the file is incomplete.")
    return weights[key].shape[0]


class _Shapes:
    """The shapes of a network's weights, layer by layer."""

    def __init__(self):
        self.found: dict[str, tuple[int, ...]] = {}

    def convolution(self, layer: str, before: int, after: int, kernel: int = 3) -> None:
        self.found |= {f"{layer}.weight": (after, before, kernel, kernel), f"{layer}.bias": (after,)}

    def norm(self, layer: str, width: int) -> None:
        self.found |= {f"{layer}.weight": (width,), f"{layer}.bias": (width,)}

    def resnet(self, layer: str, before: int, after: int) -> None:
        self.norm(f"{layer}.norm1", before)
        self.convolution(f"{layer}.conv1", before, after)
        self.norm(f"{layer}.norm2", after)
        self.convolution(f"{layer}.conv2", after, after)
        if before != after:
            self.convolution(f"{layer}.conv_shortcut", before, after, kernel=1)

    def middle(self, layer: str, width: int) -> None:
        for i in range(2):
            self.resnet(f"{layer}.resnets.{i}", width, width)
        self.norm(f"{layer}.attentions.0.group_norm", width)
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            self.found |= {f"{layer}.attentions.0.{linear}.weight": (width, width), f"{layer}.attentions.0.{linear}.bias": (width,)}


def require_shapes(weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], name: str) -> dict[str, torch.Tensor]:
    """Copies of exactly the expected weights.

    Raises:
        ValueError: one is missing or of another shape, there are others beside them, or one holds no finite floating-point numbers.
    """
    for key, shape in expected.items():
        found = tuple(weights[key].shape) if key in weights else None
        if found != shape:
            was = f"shape {found[:8]}" if found is not None else "no tensor"
            raise ValueError(f"{name}: {key} has {was}, expected {shape}; the file is incomplete or of another model.")
    if surplus := sorted(set(weights) - set(expected)):
        raise ValueError(f"{name}: {printable(surplus[0])} is no part of Stable Diffusion's VAE ({len(surplus)} such tensors).")
    return own_copies({key: weights[key] for key in expected}, name)
