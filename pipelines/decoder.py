"""Another decoder in a pipeline's VAE: a light one, or that of another VAE file."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import Decoder as DecoderNetwork
from torch import nn

from fewstep_sr.methods import identify
from fewstep_sr.weights.kinds import CHECKPOINT, LIGHT_VAE, VAE
from fewstep_sr.weights.light_decoder import GROUPS, Decoder, decoder_of, is_light_decoder, read_light_decoder
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.strict import printable
from fewstep_sr.weights.vae import read_vae


class DecoderMixin:
    """``load_decoder`` and ``unload_decoder`` of a pipeline with a ``vae``. What is loaded is not saved with the pipeline."""

    _own_decoder: dict[str, nn.Module] | None = None
    """The VAE's own modules that another decoder has taken the place of, by their names."""

    def load_decoder(self, path: str | Path) -> None:
        """Decode with another decoder from now on; :meth:`unload_decoder` goes back.

        Args:
            path: AdcSR's ``halfDecoder.ckpt`` or VOSR's ``sd21_lwdecoder.pth`` as they are, or a VAE file, of which the decoding half is taken.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it holds no decoder for Stable Diffusion's latents; the pipeline is as before then.
        """
        decoder = read_decoder(path)
        self.unload_decoder()
        vae = self.vae  # type: ignore[attr-defined]
        modules: dict[str, nn.Module] = {"decoder": build_decoder(decoder)}
        if decoder.post_quant_conv is not None:
            modules["post_quant_conv"] = nn.Conv2d(4, 4, 1)
            modules["post_quant_conv"].load_state_dict(decoder.post_quant_conv)
        self._own_decoder = {name: getattr(vae, name) for name in modules}
        for name, module in modules.items():
            setattr(vae, name, module.to(vae.device, vae.dtype).eval().requires_grad_(False))

    def unload_decoder(self) -> None:
        """Decode with the VAE's own decoder again."""
        for name, module in (self._own_decoder or {}).items():
            setattr(self.vae, name, module.to(self.vae.device, self.vae.dtype))  # type: ignore[attr-defined]
        self._own_decoder = None

    def save_pretrained(self, *args, **kwargs) -> None:
        """As diffusers', with the VAE's own decoder."""
        vae, own = self.vae, self._own_decoder or {}  # type: ignore[attr-defined]
        loaded = {name: getattr(vae, name) for name in own}
        for name, module in own.items():
            setattr(vae, name, module)
        try:
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name, module in loaded.items():
                setattr(vae, name, module)


def read_decoder(path: str | Path) -> Decoder:
    """A light decoder, or the decoding half of a VAE file or a checkpoint. Raises as :meth:`DecoderMixin.load_decoder`."""
    kind = identify(read_weights(path, pass_over=True)[0])
    if is_light_decoder(kind):
        return read_light_decoder(path, kind)
    if kind.id not in (VAE.id, LIGHT_VAE.id, CHECKPOINT.id):
        raise ValueError(
            f"decoder: found {kind.phrase} in {printable(Path(path).name)}, expected AdcSR's or VOSR's decoder, or a VAE of Stable Diffusion. "
            "Choose another file."
        )
    return decoder_of(read_vae(path))


def build_decoder(decoder: Decoder) -> DecoderNetwork:
    """diffusers' network of the decoder's own width, with its weights, float32."""
    widths = decoder.widths
    with torch.device("meta"):
        network = DecoderNetwork(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=decoder.resnets - 1,
            norm_num_groups=GROUPS,
        )
    network.load_state_dict({key: value.float() for key, value in decoder.state_dict.items()}, assign=True)
    return network
