"""What the tagger's logits mean: the names of the tags, the threshold of each, and the prompt that they make."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

TAG_LIST = "ram_tag_list.txt"
THRESHOLD_LIST = "ram_tag_list_threshold.txt"


@dataclass(frozen=True)
class TagVocabulary:
    """Names and thresholds (probabilities, one for each tag) in the order of the logits."""

    names: tuple[str, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def read(cls, folder: str | Path) -> "TagVocabulary":
        """Read the two published text files, one tag and one number a line.

        Raises:
            FileNotFoundError: one of them is not in ``folder``.
            ValueError: a line holds no threshold, or the two files have different lengths.
        """
        names, numbers = (_lines(Path(folder) / name) for name in (TAG_LIST, THRESHOLD_LIST))
        thresholds = []
        for row, text in enumerate(numbers, start=1):
            try:
                threshold = float(text)
            except ValueError:
                threshold = math.nan
            if not math.isfinite(threshold):
                raise ValueError(f"{THRESHOLD_LIST}: line {row} is {text[:40]!r}, expected a number between 0 and 1. Download it again.")
            thresholds.append(threshold)
        if len(names) != len(thresholds):
            raise ValueError(f"{TAG_LIST} has {len(names)} lines and {THRESHOLD_LIST} {len(thresholds)}, expected as many. Download both again.")
        return cls(tuple(names), tuple(thresholds))

    @classmethod
    def from_json(cls, names: str, thresholds: str, what: str) -> "TagVocabulary":
        """Parse two JSON lists, of text and of numbers, as they stand in a converted file's metadata.

        Raises:
            ValueError: they are no such lists, or not of one length. ``what`` names them in the message.
        """
        try:
            parsed_names, parsed = json.loads(names), json.loads(thresholds)
        except (ValueError, RecursionError):
            raise ValueError(f"{what}: the tags or their thresholds are no JSON lists. Convert the tagger again.") from None
        texts = isinstance(parsed_names, list) and all(isinstance(name, str) for name in parsed_names)
        numbers = isinstance(parsed, list) and all(type(number) in (int, float) and 0 <= number <= 1 for number in parsed)
        if not texts or not numbers or len(parsed_names) != len(parsed):
            raise ValueError(
                f"{what}: found {_counted(parsed_names)} for the tags and {_counted(parsed)} for their thresholds, "
                "expected texts and as many numbers between 0 and 1. Convert the tagger again."
            )
        return cls(tuple(parsed_names), tuple(map(float, parsed)))

    def tags(self, logits: torch.Tensor, offset: float = 0.0, max_tags: int = 0, exclude: Iterable[str] = ()) -> list[list[str]]:
        """The tags of each picture, in the vocabulary's order, as the reference gives them.

        Args:
            logits: (B, n) in any dtype, finite.
            offset: added to each tag's own threshold: more gives fewer, surer tags.
            max_tags: keep the most probable ones; 0 keeps all.
            exclude: names to leave out, upper and lower case alike.
        """
        unwanted = {name.strip().casefold() for name in exclude}
        wanted = torch.tensor([name.casefold() not in unwanted for name in self.names])
        probability = logits.float().cpu().sigmoid()
        found = (probability > torch.tensor(self.thresholds) + offset) & wanted
        pictures = []
        for row, hits in zip(probability, found, strict=True):
            indices = hits.nonzero().flatten()
            if max_tags and len(indices) > max_tags:
                indices = indices[row[indices].topk(max_tags).indices].sort().values
            pictures.append([self.names[i] for i in indices])
        return pictures


def _counted(value) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else f"no list ({type(value).__name__})"


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing: put it next to the weights, in {path.parent}. "
            "It is published with RAM, in the folder ram/data of github.com/xinyu1205/recognize-anything and of OSEDiff's own repository."
        )
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: it is no text in UTF-8. Download it again.") from None
