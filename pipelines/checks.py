"""What fits what: every check raises an error that says what was found, what is needed and what to do."""

import torch

_BASES = "Stable Diffusion 2.1-base (512 pixels) for OSEDiff or SD-Turbo for InvSR"
_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1280: "the Stable Diffusion XL refiner", 2048: "Stable Diffusion XL"}


def require_stable_diffusion(unet, vae, scheduler) -> None:
    """Refuse components that are not those of a noise-predicting Stable Diffusion 2.x.

    Narrow networks (under 320 channels) whose text width is no published encoder's are let through: miniatures for trying and testing.
    """
    config = unet.config
    if config.in_channels != 4:
        raise ValueError(f"unet: found {config.in_channels} input channels (inpainting or upscaling), expected 4. Load {_BASES}.")
    width = config.cross_attention_dim
    if width != 1024 and (width in _TEXT_WIDTHS or config.block_out_channels[0] >= 320):
        raise ValueError(f"unet: found a text width of {width} ({_TEXT_WIDTHS.get(width, 'another model')}), expected 1024. Load {_BASES}.")
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"scheduler: found a base of prediction type {scheduler.config.prediction_type} (Stable Diffusion 2.1 at 768 pixels is one), "
            f"expected epsilon, a base that predicts noise. Load {_BASES}."
        )
    if vae.config.latent_channels != 4:
        raise ValueError(f"vae: found {vae.config.latent_channels} latent channels, expected 4. Load the VAE of {_BASES}.")


def require_picture(image: torch.Tensor) -> None:
    """Refuse what is no picture (B, 3, H, W) in [0, 1]; values a little outside, which resizing makes, may be."""
    if image.ndim != 4 or 0 in image.shape or image.shape[1] != 3:
        raise ValueError(
            f"image: found shape {tuple(image.shape)}, expected (batch, 3, height, width) as a tensor or (batch, height, width, 3) as NumPy."
        )
    low, high = image.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("image: found values that are not numbers (NaN or infinity).")
    if low < -1 or high > 2:
        raise ValueError(f"image: found values from {low:.4g} to {high:.4g}, expected [0, 1]. Divide 8-bit values by 255.")


def require_finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Refuse NaN and infinity, which half precision makes and which would be saved as a black picture."""
    if not torch.isfinite(tensor).all():
        raise RuntimeError(
            f"{what} gave values that are not numbers (NaN or infinity): half precision overflowed. "
            "Use bfloat16 or float32 (--dtype), or look for a damaged weight file."
        )
    return tensor
