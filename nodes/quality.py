"""How near an image is to a reference, as numbers on the node."""

import comfy.model_management
from comfy_api.latest import io, ui
from server import PromptServer

from ..fewstep_sr.image.quality import compare, require_alike
from .checks import require_image

_LISTED = 16
"""Images of a batch whose figures the node shows one by one."""


class FewStepSRQuality(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FewStepSRQuality",
            display_name="Image Quality (Few-Step SR)",
            category="FewStepSR",
            description="Compares an image with its original and shows PSNR, SSIM and GMSD on the node. PSNR and SSIM are computed as in the papers on these "
            "methods: on the Y channel of BT.601, without cropping a border, after rounding to 8 bits. No weights are needed.",
            search_aliases=["psnr", "ssim", "gmsd", "metric", "quality", "compare", "benchmark", "iqa", "fidelity"],
            inputs=[
                io.Image.Input("image", tooltip="The restored image."),
                io.Image.Input("reference", tooltip="The original, with the same size: one image, or one for each image of the batch."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="psnr", tooltip="Peak signal-to-noise ratio in dB, mean of the batch. Higher is better; identical images have 80."
                ),
                io.Float.Output(display_name="ssim", tooltip="Structural similarity, mean of the batch. Higher is better; identical images have 1."),
                io.Float.Output(
                    display_name="gmsd",
                    tooltip="Gradient magnitude similarity deviation, mean of the batch. Lower is better; identical images have 0.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, reference) -> io.NodeOutput:
        images, originals = require_image(image, "image"), require_image(reference, "reference")
        require_alike(images, originals, ("image", "reference"))
        figures: dict[str, list[float]] = {}
        for i, one in enumerate(images):  # one at a time: video batches are long
            comfy.model_management.throw_exception_if_processing_interrupted()
            for name, value in compare(one[None], originals[min(i, len(originals) - 1)][None]).items():
                figures.setdefault(name, []).append(value.item())
        means = {name: sum(values) / len(values) for name, values in figures.items()}
        shown = _text(figures, means)
        if cls.hidden:  # run by the server: the page shows this text on the node; the ui entry is for history and the API
            PromptServer.instance.send_progress_text(shown, cls.hidden.unique_id)
        return io.NodeOutput(means["psnr"], means["ssim"], means["gmsd"], ui=ui.PreviewText(shown))


def _text(figures: dict[str, list[float]], means: dict[str, float]) -> str:
    """The means in a line each and, for a batch, a line for each of the first images."""
    lines = [f"PSNR {means['psnr']:.4f} dB", f"SSIM {means['ssim']:.4f}", f"GMSD {means['gmsd']:.4f}"]
    rows = list(zip(*figures.values(), strict=True))
    if len(rows) > 1:
        lines += [f"mean of {len(rows)} images:", *(f"{i}: {p:.4f} dB, {s:.4f}, {g:.4f}" for i, (p, s, g) in enumerate(rows[:_LISTED]))]
    if len(rows) > _LISTED:
        lines.append(f"and {len(rows) - _LISTED} more")
    return "\n".join(lines)
