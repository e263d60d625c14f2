"""A small tagger in the published layout: RAM's file with procedural weights, and text files with invented tags."""

import json
from pathlib import Path

import procedural
import torch
from toys import GOLDEN, golden, picture

DAPE = GOLDEN / "tagger_dape.pth"
NAMES = [f"thing {i}" for i in range(golden("tagger")[0]["num_tags"])]
THRESHOLDS = [0.5 + 0.1 * (i % 4) for i in range(len(NAMES))]


def tagger_state_dict(shapes: dict | None = None) -> dict[str, torch.Tensor]:
    """The golden case's weights, or procedural ones of other shapes."""
    shapes = shapes or json.loads((GOLDEN / "tagger_ram_shapes.json").read_text())

    def value(key, shape):
        if key == "label_embed":
            return procedural.gaussian(0, key, shape)
        make = procedural.gaussian if key.endswith("relative_position_bias_table") else procedural.weight
        return make(0, f"tagger.{key}", shape)

    return {key: torch.from_numpy(value(key, tuple(shape))) for key, shape in shapes.items()}


def write_ram(folder: Path, state_dict: dict | None = None, name: str = "ram_swin_large_14m.pth", names=NAMES, thresholds=THRESHOLDS) -> Path:
    """RAM's file with some of what tagging does not use, and its two text files."""
    unused = {
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
        "tag_encoder.encoder.layer.0.attention.self.query.weight": torch.ones(8, 8),
        "text_decoder.cls.predictions.bias": torch.ones(8),
    }
    torch.save({"model": {**(state_dict or tagger_state_dict()), **unused}, "epoch": 4}, folder / name)
    write_vocabulary(folder, names, thresholds)
    return folder / name


def write_vocabulary(folder: Path, names=NAMES, thresholds=THRESHOLDS) -> None:
    (folder / "ram_tag_list.txt").write_text("\n".join(names), encoding="utf-8")
    (folder / "ram_tag_list_threshold.txt").write_text("\n".join(map(str, thresholds)) + "\n", encoding="utf-8")


def golden_picture() -> torch.Tensor:
    """IMAGE (1, 96, 96, 3)"""
    return picture(golden("tagger")[0]["seed"], 96, 96)


def golden_tags(case: str) -> list[str]:
    """The invented tags that the golden logits give."""
    probability = golden("tagger")[1][f"{case}_logits"][0].sigmoid()
    return [name for name, p, threshold in zip(NAMES, probability.tolist(), THRESHOLDS, strict=True) if p > threshold]
