"""Files of methods that this project names but does not read as they are: by what each is recognised, and what running it would take.

The layouts are those that the authors' own code reads and writes.
"""

import re
from collections.abc import Mapping

from .kinds import FileKind, has_key, strip_wrappers


def _has_keys(*patterns: str):
    """Whether for each of the regular expressions there is a key, wrappers taken off."""
    searches = [has_key(pattern) for pattern in patterns]
    return lambda state: all(search(state) for search in searches)


def _is_omgsr(state: Mapping) -> bool:
    """PEFT's own file of one of OMGSR-S's two adapters: the UNet's or the VAE encoder's layers, both with their first convolution."""
    keys = [strip_wrappers(str(key)) for key in state]
    layers = r"base_model\.model\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb_proj)\b.*\.lora_[AB]\.(\w+\.)?weight"
    return "base_model.model.conv_in.lora_A.weight" in keys and all(re.fullmatch(layers, key) for key in keys)


NOT_RUN = (
    FileKind(
        "tadsr",
        "a TADSR adapter",
        lambda state: "state_dict_vae_time" in state,
        "not run here: its VAE encoder takes the timestep, in layers that Stable Diffusion's has not, and its step is another; for non-commercial use",
    ),
    FileKind(
        "adcsr",
        "AdcSR's network",
        _has_keys(r"^body\.1\.(conv_in|down_blocks\.)", r"^body\.2\.(attentions|resnets)\."),
        "not run here: it is a UNet of its own, of three quarters of the width, without text and timestep, from pixels to the features of AdcSR's decoder",
    ),
    FileKind(
        "omgsr",
        "one of an OMGSR-S adapter's two files",
        _is_omgsr,
        "give convert the folder that holds both, and it makes one file of them that is read as OSEDiff's",
    ),
    FileKind(
        "tsdsr",
        "a TSD-SR adapter",
        _has_keys(r"^transformer\.(pos_embed\.proj|encoder\.conv_in)\.lora"),
        "not run here: it is for Stable Diffusion 3, whose transformer and latents of 16 channels are none of the bases here",
    ),
    FileKind(
        "vosr",
        "VOSR's network",
        _has_keys(r"^blocks\.0\.cross_attn\.k_linear\.", r"^x_embedder\.proj\."),
        "not run here: it is a diffusion transformer of its own, conditioned on features of DINOv2; its light decoder alone is read here",
    ),
    FileKind(
        "resshift",
        "a network of ResShift or SinSR, whose files are alike",
        _has_keys(r"^input_blocks\.\d+\.\d+\.blocks\.0\.attn\.relative_position_bias_table"),
        "not run here: it is a Swin UNet of its own on a VQ autoencoder, with a schedule that shifts residuals; for non-commercial use",
    ),
    FileKind(
        "vq-autoencoder",
        "a VQ autoencoder, as ResShift and SinSR have",
        _has_keys(r"^quantize\.embedding\.weight$", r"^decoder\."),
        "not run here: its latents are not Stable Diffusion's",
    ),
)
