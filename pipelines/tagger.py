"""OSEDiff's prompts, read off the pictures by the tagger that it was trained with (DAPE/RAM)."""

from pathlib import Path

import torch

from fewstep_sr.methods.osediff import prompt_of
from fewstep_sr.networks.ram import Tagger
from fewstep_sr.networks.vocabulary import TagVocabulary
from fewstep_sr.tiling.batching import Runtime
from fewstep_sr.tiling.tagging import tag_logits
from fewstep_sr.weights.tagger import DAPE_FILE, load_tagger_weights

from .checks import require_finite


class PromptTagger:
    """A tagger on a device of its own choice: ``tagger(pictures, text)`` gives a prompt for each picture."""

    def __init__(self, network: Tagger, vocabulary: TagVocabulary):
        self.network, self.vocabulary = network.eval().requires_grad_(False), vocabulary

    @classmethod
    def from_files(cls, path: str | Path, dape_path: str | Path | None = None) -> "PromptTagger":
        """Read a converted tagger, or ``ram_swin_large_14m.pth`` with its two text files beside it.

        Args:
            path: the tagger.
            dape_path: DAPE's LoRA weights. None takes a ``DAPE.pth`` that lies beside a tagger without DAPE, if there is one.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or something else.
        """
        weights = load_tagger_weights(path, dape_path, [Path(path).with_name(DAPE_FILE)])
        network = Tagger(weights.config)
        network.load_state_dict(weights.state_dict)
        return cls(network, weights.vocabulary)

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptTagger":
        self.network.to(device, dtype)
        return self

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor, text: str | list[str] = "") -> list[str]:
        """OSEDiff's prompt ("tag, tag, ..., text,") for each of the pictures (B, 3, H, W) in [0, 1]; ``text`` is one for all, or one for each."""
        texts = [text] * len(pictures) if isinstance(text, str) else text
        if len(texts) != len(pictures):
            raise ValueError(f"prompt: found {len(texts)} texts, expected 1 or {len(pictures)}, as many as pictures.")
        weight = self.network.fc.weight
        logits = tag_logits(lambda image: self.network(image.to(weight)), pictures, self.network.config, Runtime())
        tags = self.vocabulary.tags(require_finite(logits, "the tagger"))
        return [prompt_of(own, text) for own, text in zip(tags, texts, strict=True)]
