"""Model calls on overlapping latent tiles, blended inside the step: any sampler, guider and step count works on top."""

import copy
import logging
from dataclasses import dataclass

import comfy.conds
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..sr.streaming import run_in_groups
from ..sr.tiles import Tile, TileLayout
from .streaming import ComfyUI

KEY = "FewStepSRTiledModel"
Item = tuple[int, Tile]
"""A picture of the batch and a tile of it."""


class FewStepSRTiledModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=KEY,
            display_name="Tiled Model (Few-Step SR)",
            category="FewStepSR",
            description="Runs each model call on overlapping tiles of the latent, a few at a time, and blends them inside the step: memory no longer grows "
            "with the picture or the batch. Prompts, ControlNet hints, masks and areas are cut along. Pictures that fit one tile are left alone.",
            search_aliases=["tile", "tiled sampling", "tiled diffusion", "multidiffusion", "large picture", "4k", "8k", "memory", "video", "batch"],
            inputs=[
                io.Model.Input("model", tooltip="Any image model; put it last, after Load OSEDiff and LoRAs."),
                io.Int.Input(
                    "tile_size", default=96, min=16, max=1024, step=8, tooltip="Side of a tile in latent cells of 8 pixels: 96 is 768 pixels."
                ),
                io.Int.Input(
                    "overlap",
                    default=24,
                    min=0,
                    max=512,
                    step=8,
                    tooltip="Cells that neighbouring tiles share at least. More costs time, less shows seams.",
                ),
                io.Int.Input("batch", default=4, min=1, max=64, tooltip="Tiles and pictures in one model call, fewer where memory is short."),
            ],
            outputs=[io.Model.Output(tooltip="The model for any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, tile_size=96, overlap=24, batch=4) -> io.NodeOutput:
        if overlap * 2 > tile_size:
            raise ValueError(f"overlap: found {overlap} with tiles of {tile_size}, expected at most half a tile, {tile_size // 2}.")
        dimensions = model.get_model_object("latent_format").latent_dimensions
        if dimensions != 2:
            raise ValueError(f"model: found latents of {dimensions} dimensions (video, audio or 3D), expected a model of pictures.")
        tiled = model.clone()
        prediction = TiledPrediction(tile_size, overlap, batch)
        for kind, wrapper in ((WrappersMP.CALC_COND_BATCH, prediction), (WrappersMP.PREPARE_SAMPLING, prediction.prepare_sampling)):
            tiled.remove_wrappers_with_key(kind, KEY)  # the last of these nodes counts
            tiled.add_wrapper_with_key(kind, KEY, wrapper)
        return io.NodeOutput(tiled)


@dataclass(frozen=True)
class TiledPrediction:
    """ComfyUI's model call on tiles; see :class:`sr.tiles.TileLayout` for ``tile`` and ``overlap``."""

    tile: int
    overlap: int
    batch: int

    def prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Reserve memory for one call's tiles instead of the canvas."""
        pictures, channels, height, width = noise_shape
        layout = TileLayout(height, width, self.tile, self.overlap)
        first = layout.tiles[0]
        group = min(self.batch, pictures * len(layout.tiles))
        return executor(model, [group, channels, first.height, first.width], *args, **kwargs)

    def __call__(self, executor, model, conds, x: torch.Tensor, timestep: torch.Tensor, model_options: dict):
        """Predictions for each of ``conds`` at ``x`` (B, C, h, w), as ``comfy.samplers.calc_cond_batch`` gives them."""
        layout = TileLayout(*x.shape[-2:], self.tile, self.overlap)
        items = [(picture, tile) for picture in range(x.shape[0]) for tile in layout.tiles]
        if len(layout.tiles) == 1 and len(items) <= self.batch:
            return executor(model, conds, x, timestep, model_options)
        conds = [None if cond is None else [placed for c in cond if (placed := PlacedCond.place(c, x, timestep))] for cond in conds]
        blended = [torch.zeros_like(x) for _ in conds]

        def predict(group: list[Item]) -> None:
            controls = {}
            parts = executor(
                model,
                [None if cond is None else [c.cut(group, controls) for c in cond if c.acts_on(group)] for cond in conds],
                torch.cat([tile.cut(x[picture : picture + 1]) for picture, tile in group]),
                timestep[[picture for picture, _ in group]],
                model_options,
            )
            for canvas, predictions in zip(blended, parts, strict=True):
                for (picture, tile), prediction in zip(group, predictions, strict=True):
                    tile.cut(canvas[picture]).add_(prediction * layout.window(tile).to(prediction))

        group = self._fitting(model, items, x)
        logging.debug("Tiled model: %d tiles of %d pictures, %d at a time", len(items), x.shape[0], group)
        host = ComfyUI()
        run_in_groups(items, group, predict, host, host.progress(len(items)))
        return blended

    def _fitting(self, model, items: list[Item], x: torch.Tensor) -> int:
        """How many tiles go into one call, by ComfyUI's own estimate of memory."""
        tile, free = items[0][1], model.current_patcher.get_free_memory(x.device)
        group = min(self.batch, len(items))
        while group > 1 and model.memory_required([group, x.shape[1], tile.height, tile.width]) * 1.5 > free:
            group //= 2
        return group


@dataclass(frozen=True)
class PlacedCond:
    """One entry of a conditioning, with all that belongs to a place on the canvas ready to be cut."""

    cond: dict
    pictures: int
    mask: torch.Tensor | None  # (B, h, w): mask, area and strength in one, as ComfyUI weighs them
    hints: dict[int, tuple[torch.Tensor, int]]  # by ControlNet: hint in pixels of the canvas, pixels for each cell

    @classmethod
    def place(cls, cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> "PlacedCond | None":
        """None where ``cond`` does not act at this timestep."""
        mask = None
        if "area" in cond or "mask" in cond:
            weighed = comfy.samplers.get_area_and_mult({**cond, "model_conds": {}}, x, timestep)
            if weighed is None:
                return None
            mask = torch.zeros_like(x[:, 0])
            height, width, top, left = weighed.area or (*x.shape[-2:], 0, 0)
            mask[:, top : top + height, left : left + width] = weighed.mult[:, 0]
        hints = {}
        control = cond.get("control")
        while control is not None:
            if control.cond_hint_original is not None:
                hints[id(control)] = _hint(control, x)
            control = control.previous_controlnet
        return cls(cond, x.shape[0], mask, hints)

    def acts_on(self, group: list[Item]) -> bool:
        # A default conditioning fills what the others leave.
        return self.mask is None or "default" in self.cond or any(tile.cut(self.mask[picture]).any() for picture, tile in group)

    def cut(self, group: list[Item], controls: dict) -> dict:
        """The entry for a batch of tiles. ``controls`` keeps ControlNets that entries share shared: ComfyUI runs those entries together."""
        pictures = [picture for picture, _ in group]
        cut = {key: value for key, value in self.cond.items() if key not in ("area", "mask", "mask_strength")}
        if self.mask is not None:
            cut |= {"mask": torch.stack([tile.cut(self.mask[picture]) for picture, tile in group]), "strength": 1.0}
        cut["model_conds"] = {name: self._cut_model_cond(cond, group, pictures) for name, cond in self.cond["model_conds"].items()}
        if "control" in cut:
            cut["control"] = self._cut_control(cut["control"], group, controls)
        return cut

    def _cut_model_cond(self, cond, group: list[Item], pictures: list[int]):
        cond = cond.process_cond(batch_size=self.pictures, area=None)
        if isinstance(cond, comfy.conds.CONDNoiseShape):
            return cond._copy_with(torch.cat([tile.cut(cond.cond[picture : picture + 1]) for picture, tile in group]))
        if isinstance(cond, comfy.conds.CONDList):
            return cond._copy_with([part[pictures] for part in cond.cond])
        return cond if isinstance(cond, comfy.conds.CONDConstant) else cond._copy_with(cond.cond[pictures])

    def _cut_control(self, control, group: list[Item], controls: dict):
        """A shallow copy of a ControlNet, and of those before it, with the hint of the tiles; its network is shared."""
        if control is None or id(control) in controls:
            return controls.get(id(control))
        cut = controls[id(control)] = copy.copy(control)
        cut.previous_controlnet = self._cut_control(control.previous_controlnet, group, controls)
        cut.cond_hint = None
        if id(control) in self.hints:
            hint, scale = self.hints[id(control)]
            cut.cond_hint_original = torch.cat([tile.cut(hint[picture % len(hint)][None], scale) for picture, tile in group])
            cut.extra_concat_orig = [
                torch.cat([tile.cut(extra[picture % len(extra)][None], scale) for picture, tile in group])
                for extra in (_resize(control, extra, hint.shape) for extra in control.extra_concat_orig)
            ]
        return cut


def _hint(control, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The hint as ComfyUI would resize it for the whole canvas, and its pixels for each cell."""
    scale = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae is not None else 1)
    return _resize(control, control.cond_hint_original, (x.shape[-2] * scale, x.shape[-1] * scale)), scale


def _resize(control, picture: torch.Tensor, shape) -> torch.Tensor:
    return comfy.utils.common_upscale(picture, shape[-1], shape[-2], control.upscale_algorithm, "center")
