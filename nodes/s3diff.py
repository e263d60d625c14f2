"""S3Diff (Zhang et al., arXiv 2024): each image's blur and noise, estimated and shown, say which adapter restores it."""

from functools import partial
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..fewstep_sr.methods import load_weights
from ..fewstep_sr.methods.s3diff import ESTIMATOR, S3DIFF
from ..fewstep_sr.networks.degradation import HALO, SCORES, STRIP, DegradationEstimator, overrule, require_scores
from .checks import require_finite, require_image
from .managed import ManagedNetwork, manage
from .memory import MARGIN
from .page import find_in_folder, fingerprint, full_path, list_files, require_number
from .per_image import with_scores
from .runtime import ComfyUI

EstimatorSocket = io.Custom("DEGRADATION_ESTIMATOR")
ScoresSocket = io.Custom("DEGRADATION_SCORES")

ESTIMATED = -1.0
"""A score's widget value that leaves the estimate."""

ESTIMATOR_ACTIVATIONS = 4
"""Input, output and two activations of a residual block, for the estimate of memory."""

FOLDER, PUBLISHED = ESTIMATOR.weights.folder, ESTIMATOR.weights.names[-1]


class S3DiffEstimatorLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = sorted(list_files(FOLDER), key=lambda name: (not Path(name).name.startswith(Path(PUBLISHED).stem), name))
        return io.Schema(
            node_id="S3DiffEstimatorLoader",
            display_name="Load S3Diff Degradation Estimator",
            category="FewStepSR/S3Diff",
            description="Loads the small network that estimates an image's blur and noise, for S3Diff Degradation.",
            search_aliases=["s3diff", "degradation", "de_net", "mm-realsr", "blur", "noise"],
            inputs=[io.Combo.Input("estimator_name", options=files, tooltip=f"File in models/{FOLDER}, such as {PUBLISHED}.")],
            outputs=[EstimatorSocket.Output(tooltip="For S3Diff Degradation.")],
        )

    @classmethod
    def validate_inputs(cls, estimator_name=None) -> bool | str:
        return find_in_folder(FOLDER, estimator_name, PUBLISHED, ESTIMATOR.source)

    @classmethod
    def fingerprint_inputs(cls, estimator_name=None) -> list[tuple]:
        return fingerprint(FOLDER, estimator_name)

    @classmethod
    def execute(cls, estimator_name) -> io.NodeOutput:
        weights = load_weights(ESTIMATOR, full_path(FOLDER, estimator_name, "estimator_name", cls.validate_inputs))
        # The adapter's weights follow the scores closely: float32, whatever ComfyUI would choose.
        return io.NodeOutput(manage(partial(DegradationEstimator, weights.config), weights.state_dict, torch.float32))


class S3DiffDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3DiffDegradation",
            display_name="S3Diff Degradation",
            category="FewStepSR/S3Diff",
            description="Estimates the blur and noise of each low-quality image, two scores from 0 to 1, and shows them. S3Diff Adapt uses the "
            "scores, or values that override them.",
            search_aliases=["s3diff", "degradation", "blur", "noise", "estimate", "mm-realsr"],
            inputs=[
                EstimatorSocket.Input("estimator", tooltip="From Load S3Diff Degradation Estimator."),
                io.Image.Input("image", tooltip="The low-quality image as loaded, before it is upscaled: upscaling changes the scores."),
            ],
            outputs=[ScoresSocket.Output(display_name="scores", tooltip="Blur and noise of each image of the batch, for S3Diff Adapt.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, estimator, image) -> io.NodeOutput:
        scores = estimate(estimator, require_image(image, "image"))
        return io.NodeOutput(scores, ui=_show(cls, scores))


class S3DiffAdapt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3DiffAdapt",
            display_name="S3Diff Adapt",
            category="FewStepSR/S3Diff",
            description="Adapts S3Diff to the images' blur and noise: MODEL and VAE then carry an adapter for each image of the batch. "
            "VAE Encode (Few-Step SR) and Few-Step SR One Step apply them one by one; ComfyUI's own samplers take only one image.",
            search_aliases=["s3diff", "degradation", "modulate", "blur", "noise", "adapter"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from Load Few-Step SR Adapter with an S3Diff file; LoRAs may come before or after this node."
                ),
                io.Vae.Input("vae", tooltip="The VAE from the same loader."),
                ScoresSocket.Input("scores", optional=True, tooltip="From S3Diff Degradation. Not needed if both scores are set below."),
                *(
                    io.Float.Input(
                        name,
                        default=ESTIMATED,
                        min=ESTIMATED,
                        max=1.0,
                        step=0.01,
                        tooltip=f"{name.capitalize()} of every image, 0 (none) to 1, instead of the estimate. -1 uses each image's estimate.",
                    )
                    for name in SCORES
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For Few-Step SR One Step."),
                io.Vae.Output(tooltip="For VAE Encode (Few-Step SR); its decoder is the base's."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, vae, scores=None, blur=ESTIMATED, noise=ESTIMATED) -> io.NodeOutput:
        given = {
            name: None if value == ESTIMATED else require_number(value, name, 0.0, 1.0) for name, value in zip(SCORES, (blur, noise), strict=True)
        }
        if scores is None and None in given.values():
            missing = " and ".join(name for name, value in given.items() if value is None)
            raise ValueError(f"{missing}: found neither a value nor scores, expected 0 to 1. Set it, or wire 'S3Diff Degradation' into scores.")
        acting = require_scores(overrule(torch.zeros(1, 2) if scores is None else scores, **given))
        adapted = with_scores(model, vae, S3DIFF, acting[:1] if None not in given.values() else acting, any_batch=None not in given.values())
        return io.NodeOutput(*adapted, ui=_show(cls, acting))


def estimate(estimator: ManagedNetwork, images: torch.Tensor) -> torch.Tensor:
    """Scores (B, 2) of images (B, 3, h, w) in [0, 1], float32 on the CPU. One image at a time."""
    host = ComfyUI()
    pixels = min(STRIP + 2 * HALO * images.shape[-1], images.shape[-2] * images.shape[-1])  # a strip's
    estimator.load(int(MARGIN * estimator.activation_size(ESTIMATOR_ACTIVATIONS * estimator.network.config.channels * pixels)))
    update, scores = host.progress(len(images)), []
    for image in images.split(1):
        host.before_call()
        with torch.autocast(estimator.device.type, enabled=False):
            scores.append(estimator.network(estimator.cast(image)).cpu())
        update(1)
    return require_finite(torch.cat(scores), "S3Diff Degradation", "--force-fp32")


def _show(node: type[io.ComfyNode], scores: torch.Tensor) -> ui.PreviewText:
    """The scores on the node, where a page shows it, and for history and the API."""
    lines = [", ".join(f"{name} {score:.3f}" for name, score in zip(SCORES, row, strict=True)) for row in scores.tolist()]
    shown = "\n".join(f"{i}: {line}" if len(lines) > 1 else line for i, line in enumerate(lines, 1))
    if node.hidden:  # run by the server
        PromptServer.instance.send_progress_text(shown, node.hidden.unique_id)
    return ui.PreviewText(shown)
