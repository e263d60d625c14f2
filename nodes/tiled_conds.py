"""Conditioning cut along with the tiles of a canvas: masks and areas, ControlNet hints, boxes."""

import copy
from dataclasses import dataclass

import comfy.conds
import comfy.samplers
import comfy.utils
import torch

from ..fewstep_sr.tiling.tiles import Tile
from ..fewstep_sr.tiling.unet import Item


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
            unplaced = {key: value for key, value in cond.items() if key != "gligen"}
            weighed = comfy.samplers.get_area_and_mult({**unplaced, "model_conds": {}}, x, timestep)
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
        if "gligen" in cut:
            kind, model, boxes = cut["gligen"]
            ((_, tile),) = group
            cut["gligen"] = kind, model, _cut_boxes(boxes, tile)
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


def _cut_boxes(boxes: list[tuple], tile: Tile) -> list[tuple]:
    """GLIGEN's boxes (text, height, width, y, x) in cells as the tile sees them."""
    cut = []
    for text, height, width, y, x in boxes:
        top, left = max(y - tile.top, 0), max(x - tile.left, 0)
        bottom, right = min(y + height - tile.top, tile.height), min(x + width - tile.left, tile.width)
        if top < bottom and left < right:
            cut.append((text, bottom - top, right - left, top, left))
    return cut


def _hint(control, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The hint as ComfyUI would resize it for the whole canvas, and its pixels for each cell."""
    scale = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae is not None else 1)
    return _resize(control, control.cond_hint_original, (x.shape[-2] * scale, x.shape[-1] * scale)), scale


def _resize(control, picture: torch.Tensor, shape) -> torch.Tensor:
    return comfy.utils.common_upscale(picture, shape[-1], shape[-2], control.upscale_algorithm, "center")
