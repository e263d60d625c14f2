"""What fits what: every check raises an error that says what was found, what is needed and what to do."""

import math
from numbers import Real

import torch

from fewstep_sr.bases import BASES, require_text_width
from fewstep_sr.diffusion import alphas_cumprod
from fewstep_sr.image.pixels import require_pixel_values


def require_stable_diffusion(unet, vae, scheduler) -> None:
    """Refuse components that are not those of a noise-predicting Stable Diffusion 2.x."""
    config = unet.config
    if config.in_channels != 4:
        raise ValueError(f"unet: found {config.in_channels} input channels (inpainting or upscaling), expected 4. Load {BASES}.")
    require_text_width(config.cross_attention_dim, config.block_out_channels[0], "unet")
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"scheduler: found a base of prediction type {scheduler.config.prediction_type} (Stable Diffusion 2.1 at 768 pixels is one), "
            f"expected epsilon, a base that predicts noise. Load {BASES}."
        )
    schedule = getattr(scheduler, "alphas_cumprod", None)
    if (
        schedule is None
        or schedule.shape != alphas_cumprod().shape
        or not torch.allclose(schedule.float().cpu(), alphas_cumprod(), rtol=1e-3, atol=0)
    ):
        raise ValueError(
            f"scheduler: found {type(scheduler).__name__} with another noise schedule than Stable Diffusion's (betas from 0.00085 to 0.012, scaled linear, "
            f"without rescaling to zero terminal SNR). Load the scheduler of {BASES}."
        )
    if vae.config.latent_channels != 4:
        raise ValueError(f"vae: found {vae.config.latent_channels} latent channels, expected 4. Load the VAE of {BASES}.")


def require_picture(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """Refuse what is no picture (B, 3, H, W) in [0, 1]; values a little outside, which resizing makes, may be."""
    if image.ndim != 4 or 0 in image.shape or image.shape[1] != 3:
        raise ValueError(
            f"{name}: found shape {tuple(image.shape)}, expected (batch, 3, height, width) as a tensor or (batch, height, width, 3) as NumPy."
        )
    require_pixel_values(image, name)
    # Resizing undershoots by 0.45 at most, beside edges alone.
    low = image.amin().item()
    if low < -0.5 or (low < -0.05 and (image < -0.05).float().mean() > 0.25):
        raise ValueError(f"{name}: found values from {low:.4g} to {image.amax():.4g}, expected [0, 1]. Turn [-1, 1] into it by image / 2 + 0.5.")
    return image


def require_number(value: float, name: str) -> None:
    """Refuse NaN, infinity and what is no number: they would come out as an image that is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: found {value!r}, expected a finite number.")


def require_finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Refuse NaN and infinity, which half precision makes and which would be saved as a black picture."""
    if not (torch.isfinite(tensor.amin()) and torch.isfinite(tensor.amax())):  # without a copy of a large picture
        raise RuntimeError(
            f"{what} gave values that are not numbers (NaN or infinity): half precision overflowed. "
            "Use bfloat16 or float32 (--dtype), or look for a damaged weight file."
        )
    return tensor
