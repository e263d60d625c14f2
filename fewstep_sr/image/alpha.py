"""Transparency: what lies under alpha 0 is unknown, not a colour, and must not bleed into what is seen."""

import torch
import torch.nn.functional as F


def fill_transparent(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Fill the pixels under alpha 0 from the visible ones, smoothly; visible pixels stay exactly as they are.

    Encoder, UNet and resampling look at a neighbourhood, so whatever a file happens to hold under alpha 0 (black, white, an old background)
    would otherwise tint the edge and the opaque pixels beside it. Push-pull interpolation (Gortler et al., The Lumigraph, SIGGRAPH 1996)
    with alpha as the weight: colours are averaged over ever coarser levels, then each level fills the gaps of the next finer one.

    Args:
        rgb: (B, 3, H, W), not multiplied by alpha.
        alpha: (B, 1, H, W) or (1, 1, H, W) in [0, 1].

    Returns:
        (B, 3, H, W) of rgb's dtype. A picture without a visible pixel is given back as it is.

    Raises:
        ValueError: the sizes differ.
    """
    if alpha.ndim != 4 or alpha.shape[1] != 1 or alpha.shape[-2:] != rgb.shape[-2:] or alpha.shape[0] not in (1, rgb.shape[0]):
        raise ValueError(f"alpha: found shape {tuple(alpha.shape)}, expected ({rgb.shape[0]}, 1, {rgb.shape[-2]}, {rgb.shape[-1]}) for this image.")
    if (alpha > 0).all():
        return rgb
    filled = rgb.clone()
    for i in range(len(rgb)):  # one at a time: the pyramid takes a few copies of a picture
        own = alpha[i % len(alpha)].unsqueeze(0).float()
        hidden = own <= 0
        if hidden.any() and not hidden.all():
            own = own.clamp(0, 1)
            filled[i : i + 1] = torch.where(hidden, _push_pull(rgb[i : i + 1].float() * own, own).to(rgb), rgb[i : i + 1])
    return filled


def _push_pull(premultiplied: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Colours everywhere, from premultiplied ones and their weights."""
    height, width = weight.shape[-2:]
    if height == width == 1:
        return premultiplied / weight.clamp(min=1e-8)
    total = 4 * F.avg_pool2d(F.pad(weight, (0, width % 2, 0, height % 2)), 2)
    coarse_weight = total.clamp(max=1)  # what is known well is not mixed with what lies further off
    colour = 4 * F.avg_pool2d(F.pad(premultiplied, (0, width % 2, 0, height % 2)), 2)
    coarse = _push_pull(colour * (coarse_weight / total.clamp(min=1e-8)), coarse_weight)
    behind = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return premultiplied + (1 - weight) * behind
