"""Conditioning cut along with the tiles of a canvas: masks and areas, boxes."""

from dataclasses import dataclass
from functools import cached_property

import comfy.conds
import comfy.samplers
import torch

from ..fewstep_sr.tiling.tiles import Tile
from ..fewstep_sr.tiling.unet import Item, take


@dataclass(frozen=True)
class PlacedCond:
    """One entry of a conditioning, with all that belongs to a place on the canvas ready to be cut."""

    cond: dict
    pictures: int
    mask: torch.Tensor | None  # (B, h, w): mask, area and strength in one, as ComfyUI weighs them

    @classmethod
    def place(cls, cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> "PlacedCond | None":
        """None where ``cond`` does not act at this timestep."""
        if timestep[0] > cond.get("timestep_start", timestep[0]) or timestep[0] < cond.get("timestep_end", timestep[0]):
            return None
        mask = None
        if "area" in cond or "mask" in cond:
            unplaced = {key: value for key, value in cond.items() if key != "gligen"}
            weighed = comfy.samplers.get_area_and_mult({**unplaced, "model_conds": {}}, x, timestep)
            if weighed is None:
                return None
            mask = torch.zeros_like(x[:, 0])
            height, width, top, left = weighed.area or (*x.shape[-2:], 0, 0)
            mask[:, top : top + height, left : left + width] = weighed.mult[:, 0]
        return cls(cond, x.shape[0], mask)

    def acts_on(self, group: list[Item]) -> bool:
        # A default conditioning fills what the others leave.
        return self.mask is None or "default" in self.cond or any(tile.cut(self._mask_on_cpu[picture]).any() for picture, tile in group)

    @cached_property
    def _mask_on_cpu(self) -> torch.Tensor:
        """To be looked at without waiting for the device at each tile."""
        return self.mask.cpu()

    def cut(self, group: list[Item]) -> dict:
        """The entry for a batch of tiles. Its ControlNets are cut in place: see :class:`nodes.tiled_controls.PlacedControls`."""
        pictures = [picture for picture, _ in group]
        cut = {key: value for key, value in self.cond.items() if key not in ("area", "mask", "mask_strength")}
        if self.mask is not None:
            cut |= {"mask": torch.stack([tile.cut(self.mask[picture]) for picture, tile in group]), "strength": 1.0}
        cut["model_conds"] = {name: self._cut_model_cond(cond, group, pictures) for name, cond in self.cond["model_conds"].items()}
        if "gligen" in cut:
            kind, model, boxes = cut["gligen"]
            ((_, tile),) = group
            cut["gligen"] = kind, model, _cut_boxes(boxes, tile)
        return cut

    def _cut_model_cond(self, cond, group: list[Item], pictures: list[int]):
        cond = cond.process_cond(batch_size=self.pictures, area=None)
        if isinstance(cond, comfy.conds.CONDNoiseShape):
            return cond._copy_with(torch.cat([tile.cut(cond.cond[picture : picture + 1]) for picture, tile in group]))
        if isinstance(cond, comfy.conds.CONDList):
            return cond._copy_with([take(part, pictures) for part in cond.cond])
        return cond if isinstance(cond, comfy.conds.CONDConstant) else cond._copy_with(take(cond.cond, pictures))


def _cut_boxes(boxes: list[tuple], tile: Tile) -> list[tuple]:
    """GLIGEN's boxes (text, height, width, y, x) in cells as the tile sees them."""
    cut = []
    for text, height, width, y, x in boxes:
        top, left = max(y - tile.top, 0), max(x - tile.left, 0)
        bottom, right = min(y + height - tile.top, tile.height), min(x + width - tile.left, tile.width)
        if top < bottom and left < right:
            cut.append((text, bottom - top, right - left, top, left))
    return cut
