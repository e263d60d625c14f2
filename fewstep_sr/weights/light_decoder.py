"""Half-width decoders for Stable Diffusion's VAE, out of AdcSR (Chen et al., CVPR 2025) and VOSR (Wu et al., 2026).

Each comes alone in a file of its own layout, and nothing in the file says what the other half of the decoding is: AdcSR's decoder was trained behind
the base's ``post_quant_conv``, VOSR's on the latents themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .forked import safe_after_fork
from .kinds import ADCSR_DECODER, VOSR_DECODER, FileKind, without_wrappers
from .read import read_weights
from .save import save_safetensors
from .strict import printable
from .vae import coder_shapes, read_vae, require_shapes

GROUPS = 32
"""Of every normalisation, whatever the width."""

_KINDS = {"AdcSR": ADCSR_DECODER, "VOSR": VOSR_DECODER}


@dataclass(frozen=True)
class Decoder:
    """A decoder under diffusers' names and the ``post_quant_conv`` before it; None where that is the base's.

    ``family`` is ``"AdcSR"``, ``"VOSR"`` or, out of a whole VAE, ``"VAE"``.
    """

    family: str
    state_dict: dict[str, torch.Tensor]
    post_quant_conv: dict[str, torch.Tensor] | None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of its levels, the finest first."""
        return tuple(self.state_dict[f"up_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in (3, 2, 1, 0))

    @property
    def resnets(self) -> int:
        """Residual blocks of a level."""
        return sum(key.startswith("up_blocks.0.") and key.endswith(".conv2.weight") for key in self.state_dict)


def is_light_decoder(kind: FileKind) -> bool:
    return kind in _KINDS.values()


@safe_after_fork()
def read_light_decoder(path: str | Path, kind: FileKind) -> Decoder:
    """Read ``halfDecoder.ckpt`` or ``sd21_lwdecoder.pth``, which ``kind`` tells apart. What else such a checkpoint holds is passed over.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, refused or incomplete.
    """
    family = next(name for name, other in _KINDS.items() if other == kind)
    state, _ = read_weights(path, pass_over=True)
    name = printable(Path(path).name)
    if family == "AdcSR":
        inner = without_wrappers(state["state_dict"], name)
        weights = {key: value for key, value in inner.items() if key.startswith("decoder.")}
        identity = None
    else:
        weights = {f"decoder.{key}": value for key, value in without_wrappers(state["model_state_dict"], name).items()}
        identity = {"weight": torch.eye(4).view(4, 4, 1, 1), "bias": torch.zeros(4)}
    weights = {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
    shapes = {f"decoder.{key}": shape for key, shape in coder_shapes(weights, "decoder", name).items()}
    return Decoder(family, _without(require_shapes(weights, shapes, name), "decoder."), identity)


def decoder_of(vae: Mapping[str, torch.Tensor]) -> Decoder:
    """The decoding half of a whole VAE (:func:`fewstep_sr.weights.vae.read_vae`)."""
    return Decoder("VAE", _without(vae, "decoder."), _without(vae, "post_quant_conv."))


def merge(decoder: Decoder, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One VAE: the base's encoder and ``quant_conv``, the decoder, and the ``post_quant_conv`` that it was trained with."""
    merged = {key: value for key, value in base.items() if not key.startswith("decoder.")}
    merged |= {f"decoder.{key}": value for key, value in decoder.state_dict.items()}
    return merged | {f"post_quant_conv.{key}": value for key, value in (decoder.post_quant_conv or {}).items()}


@safe_after_fork()
def convert_light_decoder(path: Path, kind: FileKind, base: str | Path, output: Path) -> None:
    """Write a light decoder and a base's VAE as one VAE file under diffusers' names, which ComfyUI's Load VAE reads as well."""
    decoder = read_light_decoder(path, kind)
    treatment = "the base's" if decoder.post_quant_conv is None else "identity"
    notes = {"family": "VAE with a light decoder", "decoder": decoder.family, "post_quant_conv": treatment}
    save_safetensors(merge(decoder, read_vae(base)), output, notes)


def _without(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
