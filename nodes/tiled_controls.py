"""ControlNets cut along with the tiles of a canvas, core's and other packs'.

They are cut in place for the length of a call and put back after it: methods bound to the instance, attention patches and lists in the model
that refer to it then find what belongs to the tiles. A copy would leave them with the original's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.utils
import torch

from ..fewstep_sr.tiling.unet import Item


class PlacedControls:
    """All ControlNets of a step's conditionings, ready to be cut.

    Args:
        conds: the entries that act at this step.
        x: the canvas's latents (B, C, h, w).
        timestep: sigmas (B,) of this step.
        options: the sampler's ``transformer_options``.
    """

    def __init__(self, conds: list[dict], x: torch.Tensor, timestep: torch.Tensor, options: dict):
        self._placed = [_placed(control, x, timestep, options) for control in _all_controls(conds)]

    @contextmanager
    def cut(self, group: list[Item]) -> Iterator[None]:
        """The ControlNets as a batch of tiles needs them."""
        before = [(placed.control, dict(vars(placed.control))) for placed in self._placed]
        try:
            for placed in self._placed:
                vars(placed.control).update(placed.cut(group))
            yield
        finally:
            for control, attributes in before:
                vars(control).clear()
                vars(control).update(attributes)


def _all_controls(conds: list[dict]) -> list:
    """Each ControlNet once, with those before it and its instances on other devices."""
    found, waiting = {}, [cond["control"] for cond in conds if cond.get("control") is not None]
    while waiting:
        control = waiting.pop()
        if id(control) not in found:
            found[id(control)] = control
            waiting += [c for c in (control.previous_controlnet, *getattr(control, "multigpu_clones", {}).values()) if c is not None]
    return list(found.values())


def _placed(control, x: torch.Tensor, timestep: torch.Tensor, options: dict) -> "PlacedControl":
    return (PlacedAdvancedControl if hasattr(control, "prepare_current_timestep") else PlacedControl)(control, x, timestep, options)


class PlacedControl:
    """A ControlNet and its hint in pixels of the canvas."""

    def __init__(self, control, x: torch.Tensor, timestep: torch.Tensor, options: dict):
        self.control, self.pictures, self.hint = control, len(x), None
        if control.cond_hint_original is not None:
            if not isinstance(control.cond_hint_original, torch.Tensor) or control.cond_hint_original.ndim != 4:
                raise ValueError(
                    f"control_net: found {type(control).__name__}, whose hint is no picture ({type(control.cond_hint_original).__name__}), so that "
                    "it cannot be cut into tiles. Take 'Tiled Model (Few-Step SR)' out and give it one picture at a time, or use another ControlNet."
                )
            self.scale = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae is not None else 1)
            # As ComfyUI would resize it for the whole canvas.
            self.hint = self._resize(control.cond_hint_original, x.shape[-2] * self.scale, x.shape[-1] * self.scale)

    def hint_of(self, picture: int) -> int:
        """Which of the hints a picture of the batch gets."""
        return picture % len(self.hint)

    def cut(self, group: list[Item]) -> dict:
        """The attributes that differ for a batch of tiles."""
        attributes = {"cond_hint": None, "extra_concat": None}
        if self.hint is None:
            return attributes
        hints = [(self.hint_of(picture), tile) for picture, tile in group]
        attributes["cond_hint_original"] = torch.cat([tile.cut(self.hint[i : i + 1], self.scale) for i, tile in hints])
        extras = [self._resize(extra, *self.hint.shape[-2:]) for extra in self.control.extra_concat_orig]
        attributes["extra_concat_orig"] = [torch.cat([tile.cut(extra[i % len(extra)][None], self.scale) for i, tile in hints]) for extra in extras]
        return attributes

    def _resize(self, picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return comfy.utils.common_upscale(picture, width, height, self.control.upscale_algorithm, "center")


class PlacedAdvancedControl(PlacedControl):
    """A ControlNet of Kosinkadink's Advanced-ControlNet: strength masks, and keyframes by timestep and by picture."""

    MASKS = ("mask_cond_hint", "tk_mask_cond_hint")
    PIXELS = 8  # of a mask for each cell

    def __init__(self, control, x: torch.Tensor, timestep: torch.Tensor, options: dict):
        super().__init__(control, x, timestep, options)
        control.prepare_current_timestep(timestep, options)  # once a step: it counts the steps that a keyframe is in use
        control.prepare_mask_cond_hint(x, timestep, None, 1)  # as it would for the whole canvas
        self.masks = {name: getattr(control, name) for name in self.MASKS if getattr(control, name) is not None}
        self.weight_mask = getattr(control.weights, "weight_mask", None)
        if self.weight_mask is not None:
            size = [side * self.PIXELS for side in x.shape[-2:]]
            weight_mask = self.weight_mask.reshape(-1, 1, *self.weight_mask.shape[-2:])
            self.weight_mask = torch.nn.functional.interpolate(weight_mask, size=size, mode="bilinear")[:, 0]

    def hint_of(self, picture: int) -> int:
        return min(picture, len(self.hint) - 1)  # where hints are fewer the last one stays

    def cut(self, group: list[Item]) -> dict:
        control, attributes = self.control, super().cut(group)
        masks = {name: torch.cat([tile.cut(mask[_last(mask, i)][None], self.PIXELS) for i, tile in group]) for name, mask in self.masks.items()}
        attributes |= masks | {"weight_mask_cond_hint": None}
        if "mask_cond_hint" in masks:
            attributes["mask_cond_hint_original"] = masks["mask_cond_hint"]
        if "tk_mask_cond_hint" in masks:
            keyframe = attributes["_current_timestep_keyframe"] = copy.copy(control._current_timestep_keyframe)
            keyframe.mask_hint_orig = masks["tk_mask_cond_hint"]
        if self.weight_mask is not None:
            weights = attributes["weights"] = copy.copy(control.weights)
            weights.weight_mask = torch.cat([tile.cut(self.weight_mask[_last(self.weight_mask, i)][None], self.PIXELS) for i, tile in group])
        if control.latent_keyframes is not None:
            keyframes = attributes["latent_keyframes"] = copy.copy(control.latent_keyframes)
            keyframes.keyframes = [
                self._renumbered(k, i) for i, (picture, _) in enumerate(group) for k in control.latent_keyframes.keyframes if self._is_for(k, picture)
            ]
        return attributes

    def _is_for(self, keyframe, picture: int) -> bool:
        return keyframe.batch_index in (picture, picture - self.pictures)  # negative ones count from the end

    @staticmethod
    def _renumbered(keyframe, index: int):
        keyframe = copy.copy(keyframe)
        keyframe.batch_index = index
        return keyframe


def _last(masks: torch.Tensor, picture: int) -> int:
    return min(picture, len(masks) - 1)
