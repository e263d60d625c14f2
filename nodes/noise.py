"""A NOISE that is not random: the methods' start states in the form that ComfyUI's samplers take, each picture's own."""

import hashlib
from collections.abc import Callable

import torch

from .picture_size import ALIKE, correlation, thumbnail


class Numbered(int):
    """A picture's number in a LATENT's ``batch_index``.

    Repeat Latent Batch adds to the numbers, so that random noise differs between the copies; ``picture`` stays that of the original.
    """

    def __new__(cls, number: int, picture: int):
        self = super().__new__(cls, number)
        self.picture = picture
        return self

    def __add__(self, other: int) -> "Numbered":
        return Numbered(int(self) + other, self.picture)

    def __reduce__(self):
        return Numbered, (int(self), self.picture)


def number_pictures(latent: dict) -> list[Numbered]:
    """A ``batch_index`` for a LATENT made of this one, by which its pictures are known after core's batch nodes."""
    numbers = latent.get("batch_index")
    numbers = range(len(latent["samples"])) if numbers is None else numbers
    return [Numbered(int(number), picture) for picture, number in enumerate(numbers)]


class PredictedNoise:
    """A fixed NOISE tensor (B, 4, h, w) on the CPU, in the sampler's scaled space.

    Args:
        noise: one for each picture of ``latent``, or a single one for all of them.
        latent: the LATENT that it was made for.
        require: raises ValueError where the sampler's latent is not of the kind that this noise goes with.
    """

    def __init__(self, noise: torch.Tensor, latent: dict, require: Callable[[torch.Tensor], None], seed: int = 0):
        self.noise = noise
        self.require = require
        self.seed = seed
        self._numbers = [int(number) for number in number_pictures(latent)]
        self._pictures = by_content(latent["samples"])
        self._thumbnails = thumbnail(latent["samples"])

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """The noise (n, 4, h, w) for the n pictures of ``input_latent``, in their order.

        A picture is known by its content where the sampler is given the pictures themselves, else by its number in ``batch_index``, which
        core's batch nodes keep. Raises ValueError where the latent has another size, or a picture that is not known, or is not like the one that
        the noise was made for.
        """
        samples = input_latent["samples"]
        if samples.shape[-2:] != self.noise.shape[-2:]:
            (h, w), (found_h, found_w) = self.noise.shape[-2:], samples.shape[-2:]
            raise ValueError(
                f"noise: it was made for a {w} x {h} latent, but the sampler's latent is {found_w} x {found_h}. "
                "Wire the same LATENT into the start state and the sampler."
            )
        self.require(samples)
        numbers = input_latent.get("batch_index")
        pictures = self._find_pictures(samples, None if numbers is None else list(numbers))
        return self.noise.expand(len(self._numbers), -1, -1, -1)[pictures].contiguous()

    def _find_pictures(self, samples: torch.Tensor, numbers: list[int] | None) -> list[int]:
        """Position in this noise's batch of each of the samples."""
        found = []
        for i, sample in enumerate(samples):
            position = i % len(self._numbers)  # as Repeat Latent Batch lays them out
            if candidates := self._pictures.get(digest(sample)):
                position = position if position in candidates else candidates[0]
            elif numbers is not None:
                position = self._by_number(numbers, i)
            elif len(samples) % len(self._numbers):
                raise ValueError(
                    f"noise: it was made for {len(self._numbers)} pictures and met a latent of {len(samples)} without their numbers, so that it "
                    "cannot be told which they are. Take pictures out of the batch before the start state, not after it."
                )
            if not candidates and sample.any():
                self._require_alike(sample[None], position)
            found.append(position)
        return found

    def _require_alike(self, sample: torch.Tensor, position: int) -> None:
        if correlation(thumbnail(sample), self._thumbnails[position : position + 1]) <= ALIKE:
            raise ValueError(
                "noise: it was made for a picture that the sampler's latent is not like: another one, or this one before it was flipped or rotated. "
                "Wire the same LATENT into the start state and the sampler, and turn it after it is sampled."
            )

    def _by_number(self, numbers: list[int], i: int) -> int:
        number = numbers[i] if i < len(numbers) else None
        if len(self._numbers) > 1 and numbers.count(number) > 1:
            raise ValueError(
                f"noise: {numbers.count(number)} pictures of the latent have the number {number} in batch_index, so that it cannot be told which "
                "they are. This noise is not drawn with a seed: take 'Latent Batch Seed Behavior' out."
            )
        if isinstance(number, Numbered):
            if number.picture < len(self._numbers):
                return number.picture
        elif number in self._numbers:
            return self._numbers.index(number)
        raise ValueError(
            f"noise: it was made for the pictures numbered {_listed(self._numbers)} and met number {number} of another batch. "
            "Wire the same LATENT into the start state and the sampler."
        )


def by_content(samples: torch.Tensor) -> dict[bytes, list[int]]:
    """Positions of the pictures with a content; empty latents are nobody's."""
    found = {}
    for position, sample in enumerate(samples):
        found.setdefault(digest(sample), []).append(position)
    found.pop(digest(torch.zeros_like(samples[0])), None)
    return found


def digest(sample: torch.Tensor) -> bytes:
    """By which a latent (4, h, w) is known again."""
    return hashlib.blake2b(sample.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
