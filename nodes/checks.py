"""What fits what: every check raises a ValueError that says what was found, what is needed and what to do."""

import comfy.model_management
import comfy.model_sampling
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..fewstep_sr.bases import BASES, TEXT_WIDTHS, require_text_width
from ..fewstep_sr.diffusion import sigmas
from ..fewstep_sr.image.pixels import require_pixel_values
from ..fewstep_sr.image.sizes import VAE_MULTIPLE

LATENT_CHANNELS = 4
PIXELS_PER_CELL = VAE_MULTIPLE


def require_stable_diffusion(model) -> None:
    """Refuse a MODEL that is not a noise-predicting UNet of Stable Diffusion 2.x."""
    network = model.model.diffusion_model  # below object patches such as a compiled network
    if not isinstance(network, UNetModel):
        raise ValueError(f"model: found {type(network).__name__}, expected the UNet of Stable Diffusion 2.x. Load {BASES}.")
    config = model.model.model_config.unet_config
    channels = config.get("in_channels")
    if channels != LATENT_CHANNELS:
        raise ValueError(f"model: found a UNet with {channels} input channels (inpainting or upscaling), expected {LATENT_CHANNELS}. Load {BASES}.")
    require_text_width(context_dim(model), config.get("model_channels", 0), "model")
    kind = _unfit_sampling(model.get_model_object("model_sampling"))
    if kind:
        raise ValueError(f"model: found {kind}, expected a model that predicts noise (epsilon) on Stable Diffusion's noise schedule. Load {BASES}.")


_PREDICTIONS = {
    "CONST": "a flow (rectified flow)",
    "COSMOS_RFLOW": "a flow (rectified flow)",
    "IMG_TO_IMG_FLOW": "a flow (rectified flow)",
    "EDM": "EDM sampling",
    "LCM": "LCM sampling",
    "IMG_TO_IMG": "x0 prediction",
    "X0": "x0 prediction",
    "V_PREDICTION_DDPM": "v-prediction",
    "V_PREDICTION": "v-prediction (SD 2.1 at 768 pixels)",
}
"""What ComfyUI's kinds of prediction are called in the field, by class."""


def _unfit_sampling(sampling) -> str | None:
    """What keeps a ``model_sampling`` from being Stable Diffusion's: its prediction, or its noise schedule. None where it is."""
    eps, discrete = comfy.model_sampling.EPS, comfy.model_sampling.ModelSamplingDiscrete
    bases = [kind.__name__ for kind in type(sampling).__mro__]
    settings = next((name for name in bases if name not in ("ModelSampling", "ModelSamplingAdvanced")), type(sampling).__name__)
    predicts_noise = isinstance(sampling, eps) and type(sampling).calculate_denoised is eps.calculate_denoised
    if not predicts_noise or type(sampling).calculate_input is not eps.calculate_input:
        named = next((_PREDICTIONS[name] for name in bases if name in _PREDICTIONS), None)
        return named or settings
    if not isinstance(sampling, discrete):
        return f"a continuous noise schedule ({settings})"
    if sampling.sigmas.shape != sigmas().shape or not torch.allclose(sampling.sigmas.cpu().log(), sigmas().log(), atol=1e-2):
        return "a zero-terminal-SNR noise schedule (zsnr)" if getattr(sampling, "zsnr", False) else f"another noise schedule ({settings})"
    return None


def context_dim(model) -> int | None:
    """Width of the text conditioning of a MODEL's UNet."""
    return model.model.model_config.unet_config.get("context_dim")


def require_conditioning(conditioning, model, name: str) -> None:
    """Refuse text conditioning made by another model's text encoder."""
    expected = context_dim(model)
    for embedding, _ in conditioning:
        if embedding.shape[-1] != expected:
            base = TEXT_WIDTHS.get(embedding.shape[-1], "another model")
            raise ValueError(
                f"{name}: found conditioning of embedding size {embedding.shape[-1]} ({base}), expected {expected}. "
                "Use the CLIP output of the checkpoint that the MODEL comes from."
            )


def require_latent(latent: dict, name: str = "latent") -> torch.Tensor:
    """The LATENT's samples (B, 4, h, w). Refuses latents of other VAEs."""
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"{name}: found a latent of shape {tuple(samples.shape)}, expected (batch, {LATENT_CHANNELS}, height, width), "
            "as Stable Diffusion's VAE gives. Encode the picture with 'VAE Encode (Few-Step SR)'."
        )
    return samples


def require_picture(latent: dict, name: str = "latent") -> torch.Tensor:
    """:func:`require_latent` for a latent that must hold a picture. Refuses an empty one."""
    samples = require_latent(latent, name)
    if not samples.any():
        raise ValueError(
            f"{name}: found an empty latent, expected the encoded low-quality picture: these methods restore an existing image; they do not generate one. "
            "Wire 'VAE Encode (Few-Step SR)' here instead of 'Empty Latent Image'."
        )
    return samples


def require_own_noise(model, samples: torch.Tensor) -> None:
    """Refuse context windows that shuffle noise between pictures (FreeNoise, Qiu et al., ICLR 2024): here a picture's noise is made of the picture."""
    if len(samples) > 1 and getattr(model.model_options.get("context_handler"), "freenoise", False):
        raise ValueError(
            f"model: found context windows with freenoise, which gives pictures of a batch one another's noise, expected each of the {len(samples)} "
            "pictures' own. Turn freenoise off."
        )


def require_memory(model, samples: torch.Tensor) -> None:
    """Refuse a picture of which a single activation, the output of the UNet's first feed-forward, is larger than the device's memory."""
    height, width = samples.shape[-2:]
    channels = 8 * model.model.model_config.unet_config["model_channels"]
    needed = height * width * channels * comfy.model_management.dtype_size(model.model.get_dtype_inference())
    total = comfy.model_management.get_total_memory(model.load_device)
    if needed > total:
        raise ValueError(
            f"latent: found a picture of {width * PIXELS_PER_CELL} x {height * PIXELS_PER_CELL} pixels, which in one piece takes more than "
            f"{needed / 2**30:.0f} GiB, expected one that fits into the device's {total / 2**30:.0f}. {TILE_IT}"
        )


TILE_IT = "Add 'Tiled Model (Few-Step SR)' as the last node before the model input, with smaller tiles if it is there already, or upscale less."


def require_vae(vae) -> None:
    """Refuse a VAE whose latents are not Stable Diffusion's."""
    if vae.latent_channels != LATENT_CHANNELS or vae.downscale_ratio != PIXELS_PER_CELL:
        raise ValueError(
            f"vae: found {vae.latent_channels} latent channels at a reduction of {vae.downscale_ratio}, expected {LATENT_CHANNELS} at "
            f"{PIXELS_PER_CELL}. Use the VAE output of the Stable Diffusion 2.x checkpoint."
        )


MOST_OVERSHOOT = 0.5
"""How far below 0 bicubic enlargement of [0, 1] can reach: its negative weights in two dimensions sum to 0.445."""


DECODED_BEYOND = 2.0
"""How far outside [0, 1] what a decoder gave without a clamp may reach: the published HYPIR's code was seen to reach 0.9 with random weights."""


def require_image(image: torch.Tensor, name: str, decoded: bool = False) -> torch.Tensor:
    """An IMAGE (B, H, W, C) as float32 (B, 3, H, W): alpha is left out, one channel becomes three.

    Values a little outside [0, 1], which bicubic enlargement makes, are kept, as the methods do. Refuses an empty picture, values that
    are not finite and pictures that are not scaled to [0, 1].

    Args:
        decoded: keep what a decoder without a clamp makes, too: values far outside. :func:`require_same_scale` looks at their scale.
    """
    if image.ndim != 4 or 0 in image.shape or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name}: found shape {tuple(image.shape)}, expected (batch, height, width, channels) with 1, 3 or 4 channels.")
    image = image[..., :3].float().movedim(-1, 1)  # BHWC -> BCHW
    require_pixel_values(image, name, beyond=DECODED_BEYOND if decoded else 1.0)
    if not decoded and (mostly_negative(image) or image.amin() < -MOST_OVERSHOOT):
        if not overshoots(image):
            raise scaled_to_minus_one(image, name)
        raise ValueError(
            f"{_found(image, name)}: this image overshoots as a decoder's output does. Switch clamp on at 'VAE Decode (Few-Step SR)', or put "
            "'Color Fix (Few-Step SR)' between, which clamps after its correction."
        )
    return image.expand(-1, 3, -1, -1)


def require_same_scale(image: torch.Tensor, reference: torch.Tensor, name: str) -> None:
    """Refuse an image (B, 3, H, W) scaled to [-1, 1] beside a reference (B or 1, 3, h, w) in [0, 1].

    A decoder without a clamp overshoots on both sides of [0, 1] alike. Where an image does so below alone it is scaled to [-1, 1], unless less than a
    quarter of it is below and it is much more like the reference as it is than like the reference in that scale: then it is the decoder's, too.
    """
    if image.amin() >= -0.1 or overshoots(image):
        return
    if not mostly_negative(image):
        if image.amin() >= -MOST_OVERSHOOT:
            return
        small, colors = (F.adaptive_avg_pool2d(each, COMPARED) for each in (image, reference))
        if 2 * (small - colors).abs().mean() <= (small - (2 * colors - 1)).abs().mean():
            return
    raise scaled_to_minus_one(image, name)


COMPARED = 32
"""Sides of the averages by which an image and its reference are compared."""


def mostly_negative(image: torch.Tensor) -> bool:
    """Whether more than a quarter of the values are clearly below 0."""
    return bool(image.amin() < -0.1 and (image < -0.1).count_nonzero() > image.numel() / 4)


def overshoots(image: torch.Tensor) -> bool:
    """Whether values reach beyond [0, 1] above, too, and not only by what enlargement adds to an image in [-1, 1]."""
    return bool(8 * (image - 1).relu().sum() > (-image).relu().sum())


def scaled_to_minus_one(image: torch.Tensor, name: str) -> ValueError:
    return ValueError(f"{_found(image, name)}: this image is scaled to [-1, 1]. Add 1 and halve it.")


def _found(image: torch.Tensor, name: str) -> str:
    return f"{name}: found values from {image.amin():.4g} to {image.amax():.4g}, expected [0, 1]"


def require_finite(tensor: torch.Tensor, what: str, flag: str) -> torch.Tensor:
    """Refuse NaN and infinity, which half precision makes and which would be saved as a black picture."""
    if not (torch.isfinite(tensor.amin()) and torch.isfinite(tensor.amax())):  # without a copy of a large picture
        raise RuntimeError(
            f"{what} gave values that are not numbers (NaN or infinity): half precision overflowed. Restart ComfyUI with {flag}, "
            "or look for a damaged weight file."
        )
    return tensor
