"""Colour correction."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..fewstep_sr.image.color import COLOR_FIXES, PIXEL_BY_PIXEL, fix_color
from ..fewstep_sr.image.sizes import same_proportions
from ..fewstep_sr.methods import METHODS
from .checks import require_finite, require_image, require_same_scale
from .page import listing, require_number

WHAT = {
    "adain": "matches mean and contrast of each channel",
    "wavelet": "takes all low frequencies from the reference",
    "ycbcr": "keeps the result's luma and takes the reference's chroma pixel by pixel",
    "lab": "matches mean and contrast in CIELAB",
    "luma": "keeps the result's luma and takes only the smooth part of the reference's chroma",
    "none": "changes nothing",
}


def _default_of(name: str) -> str:
    titles = [f"{method.title}'s" for method in METHODS.values() if (method.color_fix or "none") == name]
    return f" ({listing(titles)} default)" if titles else ""


class FewStepSRColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRColorFix",
            display_name="Color Fix (Few-Step SR)",
            category="FewStepSR",
            description="Restores the colours of the low-quality picture, which diffusion shifts slightly.",
            search_aliases=["color correction", "color match", "color transfer", "adain", "wavelet", "ycbcr", "lab", "luma", "colour fix"],
            inputs=[
                io.Image.Input("image", tooltip="The restored picture."),
                io.Image.Input("reference", tooltip="The low-quality picture, upscaled or not: it is resized to the image's size."),
                io.Combo.Input(
                    "method",
                    options=[*COLOR_FIXES, "none"],
                    default="adain",
                    tooltip=" ".join(f"{name} {what}{_default_of(name)}." for name, what in WHAT.items()),
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="0 leaves the picture unchanged, 1 is the full correction."
                ),
            ],
            outputs=[io.Image.Output(tooltip="The corrected picture, in [0, 1].")],
        )

    @classmethod
    def execute(cls, image, reference, method="adain", strength=1.0) -> io.NodeOutput:
        require_number(strength, "strength", 0.0, 1.0)
        pictures, references = require_image(image, "image", decoded=True), require_image(reference, "reference")
        if references.shape[0] not in (1, pictures.shape[0]):
            raise ValueError(f"reference: found {references.shape[0]} pictures, expected 1 or {pictures.shape[0]}, as many as in image.")
        require_same_scale(pictures, references, "image")
        (height, width), (found_height, found_width) = pictures.shape[-2:], references.shape[-2:]
        if method in PIXEL_BY_PIXEL and not same_proportions((height, width), (found_height, found_width)):
            raise ValueError(
                f"reference: found {found_width} x {found_height} pixels, expected the aspect ratio of image, {width} x {height}: {method} "
                "needs both images to have the same one. Connect the low-quality picture, or choose adain or lab, which take the colours of any picture."
            )
        if method == "none":
            method, strength = "adain", 0.0
        fixed = torch.empty_like(pictures, memory_format=torch.contiguous_format)
        for i, picture in enumerate(pictures):  # one at a time: video batches are long
            comfy.model_management.throw_exception_if_processing_interrupted()
            fixed[i] = fix_color(picture[None], references[min(i, references.shape[0] - 1)][None], method, strength)[0]
        require_finite(fixed, "Color Fix (Few-Step SR)", "--fp32-vae")
        return io.NodeOutput(fixed.movedim(1, -1))  # BCHW -> BHWC
