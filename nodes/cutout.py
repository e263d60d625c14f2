"""Cut-outs: pictures whose file holds transparency, which Load Image splits off as a mask."""

import torch
from comfy_api.latest import io

from ..fewstep_sr.image.alpha import fill_transparent
from .checks import require_image


class FewStepSRFillTransparent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRFillTransparent",
            display_name="Fill Transparent (Few-Step SR)",
            category="FewStepSR",
            description="Replaces the hidden pixels of a cut-out by the colours of the visible ones beside them, so colours stored under full "
            "transparency (black, white, an old background) do not tint the edge. Place it before upscaling; Join Image with Alpha "
            "makes the result a cut-out again.",
            search_aliases=["alpha", "transparency", "cutout", "transparent", "rgba", "mask", "bleed", "matte"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, from Load Image."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The MASK of Load Image: 1 where the file is transparent. Not needed if the image itself has four channels.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture without transparency; visible pixels are unchanged.")],
        )

    @classmethod
    def execute(cls, image, mask=None) -> io.NodeOutput:
        pictures = require_image(image, "image")
        alpha = _alpha(image, mask)
        if alpha is None:
            return io.NodeOutput(pictures.movedim(1, -1).contiguous())
        return io.NodeOutput(fill_transparent(pictures.contiguous(), alpha).movedim(1, -1).contiguous())  # BCHW -> BHWC


def _alpha(image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Alpha (1 or B, 1, H, W); None where nothing is transparent, for which Load Image gives zeros of any size."""
    if mask is None:
        return image[..., 3:].movedim(-1, 1).float() if image.shape[-1] == 4 else None
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not torch.isfinite(mask).all():
        raise ValueError("mask: found values that are not numbers (NaN or infinity). Look at what made the mask.")
    if not mask.any():
        return None
    height, width = image.shape[1:3]
    if mask.shape[-2:] != (height, width) or mask.shape[0] not in (1, image.shape[0]):
        raise ValueError(
            f"mask: found {mask.shape[0]} of {mask.shape[-1]} x {mask.shape[-2]} pixels, expected 1 or {image.shape[0]} of {width} x {height}, the "
            "image's size. Wire IMAGE and MASK of one Load Image."
        )
    return 1 - mask.clamp(0, 1)
