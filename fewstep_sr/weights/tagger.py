"""The tagger's files: RAM's published weights, DAPE's LoRA weights for them, and the compact file that holds all of it."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..methods import identify
from ..networks.ram import Tagger, TaggerConfig
from ..networks.vocabulary import TagVocabulary
from .forked import safe_after_fork
from .kinds import without_wrappers
from .read import read_weights
from .save import save_safetensors
from .strict import own_copies, printable, require_weights

DAPE_FILE, TAGGER_FILE = "DAPE.pth", "ram_swin_large_14m.pth"
TAGGER_SOURCE = f"{TAGGER_FILE} is at huggingface.co/spaces/xinyu1205/recognize-anything."
_TAGS, _THRESHOLDS, _DAPE = "tagger_tags", "tagger_thresholds", "tagger_dape"


@dataclass(frozen=True)
class TaggerWeights:
    """A tagger's weights under the keys of :class:`fewstep_sr.networks.ram.Tagger`, the meaning of its logits, and the DAPE file merged into it, if any."""

    config: TaggerConfig
    state_dict: dict[str, torch.Tensor]
    vocabulary: TagVocabulary
    dape: str | None


@safe_after_fork()
def load_tagger_weights(path: str | Path, dape_path: str | Path | None = None, dape_among: Iterable[str | Path] = ()) -> TaggerWeights:
    """Read a tagger: ``ram_swin_large_14m.pth`` with the two text files beside it, or one file made by :func:`convert_tagger`.

    Of the published file, five sixths of which tagging never uses, only what the network needs is read into memory.

    Args:
        path: the tagger.
        dape_path: DAPE's LoRA weights, to be merged into it; None for plain RAM, or where the tagger already holds them.
        dape_among: without a ``dape_path``, files of which one that is there and has DAPE's published name is merged, where the tagger has none yet.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, refused or something else; the message says what it is.
    """
    name = printable(Path(path).name)
    state, metadata = read_weights(path)
    nested = state.get("model")
    inner = nested if isinstance(nested, Mapping) else state
    tensors = {k: w for k, w in without_wrappers(inner, name).items() if isinstance(w, torch.Tensor)}
    weights = {k.replace("vision_multi.", "tagging_head."): w for k, w in tensors.items()}
    if not {"visual_encoder.patch_embed.proj.weight", "label_embed"} <= weights.keys() or "reweight_scale" in weights:
        raise ValueError(
            f"{name}: found {identify(state).phrase}; expected RAM's tagger, or a file converted from it. Choose another file: {TAGGER_SOURCE}"
        )
    if _TAGS in metadata:
        vocabulary = TagVocabulary.from_json(metadata[_TAGS], metadata.get(_THRESHOLDS, ""), f"{name}: its metadata")
    else:
        vocabulary = TagVocabulary.read(Path(path).parent)
    rows = weights["label_embed"].shape[0] if weights["label_embed"].ndim else 0
    if rows != len(vocabulary.names):
        raise ValueError(
            f"{name}: found {rows} label embeddings, but {len(vocabulary.names)} tag names; expected as many. "
            "ram_swin_large_14m.pth and ram_tag_list.txt have 4585."
        )
    try:
        config = TaggerConfig.from_state_dict(weights)
        expected = {key: weight.shape for key, weight in Tagger(config, device="meta").state_dict().items()}
        _require_shapes(weights, expected)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except RuntimeError:  # a product of its dimensions is beyond 64 bits
        raise ValueError(f"{name}: no tagger has its dimensions; the file is damaged.") from None
    state_dict = own_copies({key: weights[key] for key in expected}, name)

    tagger = TaggerWeights(config, state_dict, vocabulary, printable(metadata.get(_DAPE, "")) or None)
    if dape_path is None and tagger.dape is None:
        dape_path = next((file for file in map(Path, dape_among) if file.name == DAPE_FILE and file.is_file()), None)
    return tagger if dape_path is None else add_dape(tagger, dape_path)


def _require_shapes(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    for key, shape in expected.items():
        if key not in weights:
            raise ValueError(f"the tensor {key!r} is missing; the file is incomplete or of another network.")
        if weights[key].shape != shape:
            raise ValueError(f"{key} has shape {tuple(weights[key].shape[:8])}, expected {tuple(shape)}; the file is of another network.")


@safe_after_fork()
def add_dape(tagger: TaggerWeights, dape_path: str | Path) -> TaggerWeights:
    """The tagger with DAPE's low-rank updates merged into its weights; the given one stays as it is.

    ``weight + (1 / rank) * B @ A`` (loralib, whose alpha is 1 unless set). On a window attention's ``qkv`` the two halves of
    lora_A and lora_B belong to q and v; k has none. The file also adapts the captioning parts, which tagging leaves out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused, something else or for another tagger, or DAPE is in the tagger already.
    """
    name = printable(Path(dape_path).name)
    if tagger.dape:
        raise ValueError(f"{name}: the tagger file already holds {tagger.dape}. Load it without DAPE, or load RAM's own file.")
    state, _ = read_weights(dape_path)
    halves = {k: w for k, w in without_wrappers(state, name).items() if isinstance(w, torch.Tensor)}
    layers = sorted({m.group(1) for k in halves if (m := re.match(r"((?:visual_encoder|tagging_head)\..+)\.lora_[AB]$", k))})
    if not layers:
        raise ValueError(f"{name}: found {identify(state).phrase}; expected DAPE's LoRA weights such as {DAPE_FILE}.")
    merged = dict(tagger.state_dict)
    for layer in layers:
        down, up, weight = halves.get(f"{layer}.lora_A"), halves.get(f"{layer}.lora_B"), merged.get(f"{layer}.weight")
        if down is None or up is None:
            raise ValueError(f"{name}: layer {layer} has but one of lora_A and lora_B; the file is incomplete.")
        parts = 2 if layer.endswith(".qkv") else 1
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != parts * up.shape[1]:
            shapes = f"lora_A of {tuple(down.shape[:8])} and lora_B of {tuple(up.shape[:8])}"
            raise ValueError(f"{name}: layer {layer} has {shapes}, expected one rank in both.")
        rows = up.shape[0] // 2 * 3 if parts == 2 else up.shape[0]
        if weight is None or tuple(weight.shape) != (rows, down.shape[1]) or up.shape[0] % parts:
            found = "no such layer" if weight is None else f"a weight of {tuple(weight.shape)}"
            raise ValueError(
                f"{name}: the update of {layer} is for a weight of {(rows, down.shape[1])}, but the tagger has {found}. DAPE belongs to RAM's Swin-L."
            )
        for half, tensor in (("lora_A", down), ("lora_B", up)):
            require_weights(tensor, f"{name}: {layer}.{half}")
        update = torch.cat([b @ a for a, b in zip(down.float().chunk(parts), up.float().chunk(parts), strict=True)]) / up.shape[1]
        if parts == 2:
            q, v = update.chunk(2)
            update = torch.cat([q, torch.zeros_like(q), v])
        merged[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
        require_weights(merged[f"{layer}.weight"], f"{name}: {layer} with the update")
    return replace(tagger, state_dict=merged, dape=name)


@safe_after_fork()
def convert_tagger(
    path: str | Path,
    output: str | Path,
    dape_path: str | Path | None = None,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> TaggerWeights:
    """Write one safetensors file of what tagging needs: DAPE merged, names and thresholds in the metadata.

    Returns:
        What was written.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is not set.
        FileNotFoundError, ValueError: as :func:`load_tagger_weights`; a weight does not fit into ``dtype``.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output: found {output.name}, expected a name that ends in .safetensors.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Give another name, or allow to overwrite it.")
    weights = load_tagger_weights(path, dape_path)
    state_dict = {key: weight.to(dtype) for key, weight in weights.state_dict.items()}
    for key, weight in state_dict.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{Path(path).name}: {key} holds values that are not finite in {str(dtype).removeprefix('torch.')}.")
    metadata = {
        "architecture": "RAM tagger (github.com/xinyu1205/recognize-anything)",
        _TAGS: json.dumps(weights.vocabulary.names),
        _THRESHOLDS: json.dumps(weights.vocabulary.thresholds),
        _DAPE: weights.dape or "",
    }
    save_safetensors(state_dict, output, metadata)
    return replace(weights, state_dict=state_dict)


def by_preference(names: Iterable[str]) -> list[str]:
    """File names of a folder of taggers, the compact ones first and DAPE's own last."""
    return sorted(names, key=lambda name: (not name.endswith(".safetensors"), Path(name).name.startswith("DAPE"), name))
