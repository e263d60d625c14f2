"""Weight files on the command line: what they are, and their conversion to safetensors."""

from pathlib import Path

import torch

from fewstep_sr.methods.bases import TEXT_WIDTHS
from fewstep_sr.networks.noise_predictor import NoisePredictorConfig
from fewstep_sr.weights.checkpoints import LORA_ALPHA, NoisePredictorWeights, OSEDiffAdapter, load_noise_predictor_weights, load_osediff_adapter
from fewstep_sr.weights.convert import save_noise_predictor, save_osediff_adapter
from fewstep_sr.weights.read import describe, read_weights
from fewstep_sr.weights.tagger import convert_tagger, load_tagger_weights


def convert(path: Path, output: Path | None, overwrite: bool = False, dape: Path | None = None) -> str:
    """Write ``path`` as safetensors and say what was done.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is not set.
        FileNotFoundError, ValueError: there is nothing to convert.
    """
    output = output or path.with_suffix(".safetensors")
    if output.suffix != ".safetensors":
        raise ValueError(f"-o: found {output.name}, expected a name that ends in .safetensors.")
    if output.resolve() == path.resolve():
        raise ValueError(f"{path}: it is a safetensors file already.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Give another name with -o, or --overwrite.")
    kind = describe(read_weights(path)[0])
    if dape is not None and "tagger" not in kind:
        raise ValueError(f"--dape: found {kind} in {path.name}, expected RAM's tagger, which DAPE is for.")
    if "OSEDiff adapter" in kind:
        save_osediff_adapter(load_osediff_adapter(path), output)
    elif "noise predictor" in kind:
        save_noise_predictor(load_noise_predictor_weights(path), output)
    elif "tagger" in kind:
        convert_tagger(path, output, dape, overwrite=overwrite)
    else:
        raise ValueError(f"{path.name}: found {kind}; expected an OSEDiff adapter, an InvSR noise predictor or a tagger.")
    return f"{path} ({kind}, {_size(path)}) -> {output} ({_size(output)})"


def describe_file(path: Path) -> str:
    """A few lines on a weight file: kind, rank, size, and what it fits."""
    state, metadata = read_weights(path)
    kind = describe(state)
    lines = [f"{path}: {kind}", f"  size: {_size(path)}, {_tensors(state)}"]
    if kind == "an OSEDiff adapter":
        lines += _adapter(load_osediff_adapter(path))
    elif kind == "an InvSR noise predictor":
        lines += _predictor(load_noise_predictor_weights(path))
    elif kind.startswith("an image tagger"):
        lines += _tagger(path)
    lines += [f"  {key}: {value}" for key, value in sorted(metadata.items()) if key != "format" and len(value) <= 200]
    return "\n".join(lines)


def _adapter(adapter: OSEDiffAdapter) -> list[str]:
    ranks = f"{adapter.rank_unet} on the UNet ({len(adapter.unet)} layers), {adapter.rank_vae} on the VAE's encoder ({len(adapter.vae)} layers)"
    width = adapter.context_dim
    return [
        f"  rank: {ranks}; scale {LORA_ALPHA / adapter.rank_unet:g}",
        "  replaces: the UNet's conv_in",
        f"  fits: {TEXT_WIDTHS.get(width, 'a base of another kind')}, text width {width}",
    ]


def _predictor(weights: NoisePredictorWeights) -> list[str]:
    published = "as published" if weights.config == NoisePredictorConfig() else "not the published dimensions"
    blocks = ", ".join(f"{n} layers of {c}" for c, n in zip(weights.config.block_out_channels, weights.config.layers_per_block, strict=True))
    return [f"  network: {blocks} ({published})", "  fits: SD-Turbo (and Stable Diffusion 2.1-base, whose latents are the same)"]


def _tagger(path: Path) -> list[str]:
    try:
        tagger = load_tagger_weights(path)
    except (ValueError, FileNotFoundError) as error:
        return [f"  note: {error}"]
    return [f"  tags: {len(tagger.vocabulary.names)}; DAPE: {tagger.dape or 'not merged'}", "  fits: OSEDiff's prompts (--tagger)"]


def _size(path: Path) -> str:
    size = path.stat().st_size
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _tensors(state: dict) -> str:
    found, stack = [], [state]
    while stack:
        for value in stack.pop().values():
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, dict):
                stack.append(value)
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in found}))
    return f"{len(found)} tensors, {sum(t.numel() for t in found):,} numbers ({dtypes})"
