"""Adapters that are another one for each image: what a MODEL and a VAE carry of one, and the images of a batch with the adapter of each.

Nothing is patched before the images' scores are known, and then on clones of their own: the MODEL and the VAE carry the adapter as an attachment.
Core's samplers take one adapter for a whole batch, which is refused where the images' adapters differ; core's VAE encoding goes image by image.
"""

import copy
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..fewstep_sr.methods.method import Method
from .adapter import adapt_model, adapt_vae, layer_names, mark_of
from .marks import ATTACHMENT, PER_IMAGE, Mark

Images = tuple[int, ...] | None
"""Places in a batch, None for the whole of it."""


@dataclass(frozen=True, eq=False)
class PerImage:
    """An adapter before it is an image's.

    Args:
        strength: that the loader was given.
        scores: of the images (B, n), None before they are known.
        any_batch: whether the one row of scores is for whatever images come.
        token: tells adapters apart that are on the same base.
    """

    method: Method
    adapter: Any
    strength: float
    scores: torch.Tensor | None = None
    any_batch: bool = False
    token: uuid.UUID = field(default_factory=uuid.uuid4)

    @property
    def mark(self) -> Mark:
        return mark_of(self.method, self.adapter)

    def share(self, patcher) -> float:
        """How much of the adapter a MODEL's own patches leave, which come after it; of a VAE's patcher, whose merges keep the first one's, its strength."""
        if not hasattr(patcher.model, "model_config"):
            return self.strength
        names = layer_names(patcher)
        kept = [prod(keep for _, _, keep, *_ in patcher.patches.get(names[f"{layer}.weight"], [])) for layer in self.adapter.unet]
        return self.strength * sum(kept) / len(kept)

    def groups(self, batch: int, what: str) -> list[tuple[torch.Tensor, Images]]:
        """The different scores of a batch, and the places of the images that have them.

        Raises:
            ValueError: the scores are not known, or not as many as images.
        """
        title, step = self.method.title, self.method.one_step
        assert step
        if self.scores is None:
            raise ValueError(
                f"{what}: found {title}'s adapter without the images' scores, expected it adapted to them. Put '{step.between}' between "
                "'Load Few-Step SR Adapter' and this node."
            )
        if self.any_batch:
            return [(self.scores[0], None)]
        if len(self.scores) != batch:
            raise ValueError(
                f"{what}: found {title}'s adapter for {len(self.scores)} images, but a batch of {batch}; each image has an adapter of its own. Give "
                f"'{step.between}' the scores of the same images."
            )
        rows = self.scores.tolist()
        different = [row for i, row in enumerate(rows) if row not in rows[:i]]
        return [(torch.tensor(row), tuple(i for i, other in enumerate(rows) if other == row)) for row in different]


def carry_model(model, method: Method, adapter, strength: float):
    """A clone of MODEL that carries an adapter for its images' scores. Raises ValueError where a layer is missing or of another shape."""
    adapt_model(model, method, adapter.for_image("unet", torch.zeros(2)), strength)
    carrying = model.clone()
    carrying.__class__ = _carrying(type(model))
    carrying.set_attachments(ATTACHMENT, mark_of(method, adapter))
    carrying.set_attachments(PER_IMAGE, PerImage(method, adapter, strength))
    carrying.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, PER_IMAGE)
    carrying.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, PER_IMAGE, _sample)
    return carrying


def carry_vae(vae, method: Method, adapter, strength: float):
    """A copy of VAE that carries an adapter of its encoder for its images' scores; its decoder is the base's."""
    adapt_vae(vae, method, adapter.for_image("vae", torch.zeros(2)), strength)
    return _with_patcher(vae, PerImage(method, adapter, strength))


def with_scores(model, vae, method: Method, scores: torch.Tensor, any_batch: bool = False) -> tuple:
    """Clones of MODEL and VAE that carry the images' scores, in place of those before.

    Raises:
        ValueError: they carry no adapter of ``method``.
    """
    for what, patcher in (("model", model), ("vae", vae.patcher)):
        carried = patcher.get_attachment(PER_IMAGE)
        if carried is None or carried.method is not method:
            found = "no adapter on it that follows the images' scores" if carried is None else f"{carried.method.title}'s adapter on it"
            raise ValueError(
                f"{what}: found {found}, expected {method.title}'s. Take {what.upper()} from 'Load Few-Step SR Adapter' with {method.kind.phrase}."
            )
    scored = model.clone()
    scored.set_attachments(PER_IMAGE, replace(model.get_attachment(PER_IMAGE), scores=scores, any_batch=any_batch))
    return scored, _with_patcher(vae, replace(vae.patcher.get_attachment(PER_IMAGE), scores=scores, any_batch=any_batch))


def _with_patcher(vae, carried: PerImage):
    carrying = copy.copy(vae)
    carrying.__class__ = _encoding_each(type(vae))
    carrying.patcher = vae.patcher.clone()
    carrying.patcher.set_attachments(PER_IMAGE, carried)
    return carrying


def each_model(model, batch: int) -> Iterator[tuple[Any, Images]]:
    """MODELs with the adapters that a batch's images have, and the images of each; MODEL itself where all have the same."""
    carried = model.get_attachment(PER_IMAGE)
    if carried is None or not carried.strength:
        yield model, None
        return
    for scores, images in carried.groups(batch, "model"):
        yield _adapted(model, carried, scores), images


def _adapted(model, carried: PerImage, scores: torch.Tensor):
    """A clone with one image's adapter below the other nodes' patches."""
    bare = model.clone()
    bare.patches = {}
    own = adapt_model(bare, carried.method, carried.adapter.for_image("unet", scores), carried.strength)
    own.patches = {key: own.patches.get(key, []) + model.patches.get(key, []) for key in {**own.patches, **model.patches}}
    own.patches_uuid = uuid.uuid5(carried.token, f"{model.patches_uuid} {scores.tolist()}")  # the same weights are not patched again
    own.__class__ = getattr(model, "plain", type(own))
    own.remove_attachments(PER_IMAGE)
    own.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, PER_IMAGE)
    return own


def _sample(executor, noise, latent_image, *args, **kwargs):
    """A sampler's run with the one adapter that all images share. Refused where they have several: they would get the first one's."""
    guider = executor.class_obj
    carrying = guider.model_patcher
    carried = carrying.get_attachment(PER_IMAGE)
    adapted = list(each_model(carrying, len(latent_image)))
    if len(adapted) > 1:
        title = carried.method.title
        raise ValueError(
            f"model: found {title}'s adapters of {len(adapted)} different images, expected one: a sampler has the same weights for its whole batch. "
            "Use 'Few-Step SR One Step', which gives each image its own, or sample one image at a time."
        )
    try:
        guider.model_patcher = adapted[0][0]
        return executor(noise, latent_image, *args, **kwargs)
    finally:
        guider.model_patcher = carrying


def each_vae(vae, batch: int) -> Iterator[tuple[Any, list[int] | None]]:
    """VAEs with the adapters that a batch's images have, and the images of each; VAE itself where all have the same."""
    carried = vae.patcher.get_attachment(PER_IMAGE)
    if carried is None:
        yield vae, None
        return
    plain = copy.copy(vae)
    plain.__class__ = vae.plain
    plain.patcher = vae.patcher.clone()
    plain.patcher.remove_attachments(PER_IMAGE)
    for scores, images in carried.groups(batch, "vae"):
        own = adapt_vae(plain, carried.method, carried.adapter.for_image("vae", scores), carried.strength)
        own.patcher.patches_uuid = uuid.uuid5(carried.token, f"{vae.patcher.patches_uuid} {scores.tolist()}")
        yield own, None if images is None else list(images)


@cache
def _carrying(kind: type) -> type:
    """A kind of MODEL whose weights core's nodes neither save nor merge into another's, since the adapter is not among them."""
    return kind if issubclass(kind, _Carries) else type(kind.__name__, (_Carries, kind), {"plain": kind})


class _Carries:
    plain: type

    def get_key_patches(self, *args, **kwargs):
        raise self._refusal(
            "merged into another, as the second model of a merge. Take it as the first one, or merge before 'Load Few-Step SR Adapter'"
        )

    def state_dict_for_saving(self, *args, **kwargs):
        raise self._refusal("saved. Save the checkpoint's own")

    def _refusal(self, use: str) -> ValueError:
        title = self.get_attachment(PER_IMAGE).method.title  # type: ignore[attr-defined]
        return ValueError(f"model: found {title}'s, whose weights are others for each image, expected one that can be {use}.")


@cache
def _encoding_each(kind: type) -> type:
    """A kind of VAE that core's nodes, too, encode each image with its own adapter by."""
    return kind if issubclass(kind, _EncodesEach) else type(kind.__name__, (_EncodesEach, kind), {"plain": kind})


class _EncodesEach:
    plain: type

    def encode(self, pixel_samples: torch.Tensor):
        return self._each(pixel_samples, lambda vae, own: vae.encode(own))

    def encode_tiled(self, pixel_samples: torch.Tensor, *args, **kwargs):
        return self._each(pixel_samples, lambda vae, own: vae.encode_tiled(own, *args, **kwargs))

    def _each(self, pixels: torch.Tensor, encode):
        encoded: dict[int, torch.Tensor] = {}
        for vae, images in each_vae(self, len(pixels)):
            if images is None:
                return encode(vae, pixels)
            encoded |= zip(images, encode(vae, pixels[images]).split(1), strict=True)
        return torch.cat([encoded[i] for i in range(len(pixels))])

    def get_sd(self) -> dict[str, torch.Tensor]:
        title = self.patcher.get_attachment(PER_IMAGE).method.title  # type: ignore[attr-defined]
        raise ValueError(
            f"vae: found {title}'s, whose encoder is another one for each image, expected one that can be saved. Save the checkpoint's own."
        )
