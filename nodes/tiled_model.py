"""Model calls on overlapping latent tiles, blended inside the step: any sampler, guider and step count works on top."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..fewstep_sr.tiling.tiles import TileLayout
from ..fewstep_sr.tiling.unet import Item, cut_items, list_items, predict_in_tiles, take
from .memory import unet_memory
from .page import require_number
from .runtime import ComfyUI
from .tiled_conds import PlacedCond
from .tiled_controls import PlacedControls

KEY = "FewStepSRTiledModel"

COMPILED = "torch.compile"
"""The key of the wrapper that core's TorchCompileModel puts on a MODEL."""


class FewStepSRTiledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=KEY,
            display_name="Tiled Model (Few-Step SR)",
            category="FewStepSR",
            description="Runs each model call on overlapping tiles of the latent, a few at a time, and blends them within the step, so memory no "
            "longer grows with the picture or the batch. Prompts, ControlNet hints, masks and areas are cropped to each tile. "
            "Pictures that fit into one tile are not tiled.",
            search_aliases=["tile", "tiled sampling", "tiled diffusion", "multidiffusion", "large picture", "4k", "8k", "memory", "video", "batch"],
            inputs=[
                io.Model.Input("model", tooltip="Any image model; place this node last, after Load OSEDiff and LoRAs."),
                io.Int.Input(
                    "tile_size",
                    default=96,
                    min=16,
                    max=1024,
                    step=8,
                    tooltip="Side of a tile in latent pixels, of 8 image pixels each: 96 is 768 pixels.",
                ),
                io.Int.Input(
                    "overlap",
                    default=24,
                    min=0,
                    max=512,
                    step=8,
                    tooltip="Minimum tile overlap in latent pixels. Larger is slower; smaller may show seams.",
                ),
                io.Int.Input("batch", default=4, min=1, max=64, tooltip="Tiles and pictures per model call; fewer if memory is short."),
            ],
            outputs=[io.Model.Output(tooltip="The model for any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, tile_size=96, overlap=24, batch=4) -> io.NodeOutput:
        for value, name, low, high in ((tile_size, "tile_size", 16, 1024), (overlap, "overlap", 0, 512), (batch, "batch", 1, 64)):
            require_number(value, name, low, high)
        if overlap * 2 > tile_size:
            raise ValueError(f"overlap: found {overlap} with tiles of {tile_size}, expected at most half a tile, {tile_size // 2}.")
        dimensions = model.get_model_object("latent_format").latent_dimensions
        if dimensions != 2:
            raise ValueError(f"model: found latents of {dimensions} dimensions (video, audio or 3D), expected a model of pictures.")
        return io.NodeOutput(_wrap(model, TiledPrediction(tile_size, overlap, batch)))


def is_tiled(model) -> bool:
    """Whether Tiled Model is on this MODEL."""
    return bool(model.get_wrappers(WrappersMP.CALC_COND_BATCH, KEY))


def stream_pictures(model, batch: int = 4):
    """A clone of MODEL that is given the pictures of a batch whole, ``batch`` at a time; MODEL itself where Tiled Model does so already."""
    if is_tiled(model):
        return model
    return _wrap(model, TiledPrediction(None, 0, batch))


def predict_only(model, images: tuple[int, ...]):
    """A clone of a MODEL that :func:`stream_pictures` gave, on which only these of a batch's images are predicted."""
    (prediction,) = model.get_wrappers(WrappersMP.CALC_COND_BATCH, KEY)
    return _wrap(model, replace(prediction, images=images))


def _wrap(model, prediction: "TiledPrediction"):
    wrapped = model.clone()
    for kind, wrapper in ((WrappersMP.CALC_COND_BATCH, prediction), (WrappersMP.PREPARE_SAMPLING, prediction.prepare_sampling)):
        wrapped.remove_wrappers_with_key(kind, KEY)  # the last of these nodes counts
        wrapped.add_wrapper_with_key(kind, KEY, wrapper)
    return wrapped


@dataclass(frozen=True)
class TiledPrediction:
    """ComfyUI's model call on tiles, ``batch`` at a time; see :class:`fewstep_sr.tiling.tiles.TileLayout` for ``tile`` (None: whole pictures) and ``overlap``."""

    tile: int | None
    overlap: int
    batch: int
    images: tuple[int, ...] | None = None
    """Those of a batch that are predicted, None for all; the others come out as zeros."""

    def _layout(self, height: int, width: int) -> TileLayout:
        return TileLayout(height, width, self.tile or max(height, width), self.overlap)

    def prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Reserve memory for one call's tiles instead of the canvas."""
        pictures, channels, height, width = noise_shape
        layout = self._layout(height, width)
        if len(layout.tiles) > 1 and (placed := _placed_patches(model)):
            logging.warning(
                "Tiled Model: this model has attention patches of other nodes (%s). To them each tile is a picture of its own: "
                "masks and boxes that they hold for the whole canvas are not cropped to the tiles.",
                ", ".join(placed),
            )
        first = layout.tiles[0]
        group = min(self.batch, (pictures if self.images is None else len(self.images)) * len(layout.tiles))
        return executor(model, [group, channels, first.height, first.width], *args, **kwargs)

    def __call__(self, executor, model, conds, x: torch.Tensor, timestep: torch.Tensor, model_options: dict):
        """Predictions for each of ``conds`` at ``x`` (B, C, h, w), as ``comfy.samplers.calc_cond_batch`` gives them."""
        layout = self._layout(*x.shape[-2:])
        images = range(len(x)) if self.images is None else self.images
        items = list_items(images, layout)
        group = self._fitting(model, items, x)
        host = ComfyUI()
        if len(layout.tiles) == 1 and len(x) == len(items) <= group:
            try:
                return executor(model, conds, x, timestep, model_options)
            except Exception as error:
                if len(items) == 1 or not host.is_out_of_memory(error):
                    raise
            host.free_memory()
            group = len(items) // 2
        if any("gligen" in c for cond in conds if cond is not None for c in cond):
            group = 1  # boxes are for all pictures of a call
        conds = [None if cond is None else [placed for c in cond if (placed := PlacedCond.place(c, x, timestep))] for cond in conds]
        acting = [placed.cond for cond in conds if cond is not None for placed in cond]
        controls = PlacedControls(acting, x, timestep, model_options.get("transformer_options", {}))
        blended = [torch.zeros_like(x) for _ in conds]

        def predict(group: Sequence[Item]) -> list[torch.Tensor]:
            with controls.cut(group):
                return executor(
                    model,
                    [None if cond is None else [c.cut(group) for c in cond if c.acts_on(group)] for cond in conds],
                    cut_items(x, group),
                    take(timestep, [picture for picture, _ in group]),
                    model_options,
                )

        logging.debug("Tiled model: %d tiles of %d pictures, %d at a time", len(items), x.shape[0], group)
        predict_in_tiles(predict, blended, layout, group, host, images)
        return blended

    def _fitting(self, model, items: list[Item], x: torch.Tensor) -> int:
        """How many tiles go into one call: of a compiled model one, since each other number of them would be compiled anew."""
        if model.current_patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED):
            return 1
        tile, free = items[0][1], model.current_patcher.get_free_memory(x.device)
        group = min(self.batch, len(items))
        while group > 1 and unet_memory(model, [group, x.shape[1], tile.height, tile.width]) > free:
            group //= 2
        return group


def _placed_patches(model) -> list[str]:
    """Kinds of attention patches that may hold something for a place on the canvas, such as IPAdapter's masks."""
    options = model.model_options.get("transformer_options", {})
    return sorted({*options.get("patches", {}), *options.get("patches_replace", {})} & {"attn1_patch", "attn2_patch", "attn1", "attn2"})
