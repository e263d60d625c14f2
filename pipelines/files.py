"""Weight files on the command line: what they are, and their conversion to safetensors."""

from pathlib import Path

import torch

from fewstep_sr.image.formats import readable
from fewstep_sr.methods import identify, load_weights, record_of, records
from fewstep_sr.methods.omgsr import read_omgsr
from fewstep_sr.methods.osediff import save_adapter
from fewstep_sr.weights.forked import safe_after_fork
from fewstep_sr.weights.kinds import TAGGER
from fewstep_sr.weights.light_decoder import Decoder, convert_light_decoder, is_light_decoder, read_light_decoder
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.strict import printable
from fewstep_sr.weights.tagger import convert_tagger, load_tagger_weights

from .pictures.record import read_record, recorded_settings

_LONGEST = 4000
"""Characters of a setting or a note; a result's record holds no more."""


@safe_after_fork()
def convert(path: Path, output: Path | None, overwrite: bool = False, dape: Path | None = None, vae: Path | None = None) -> str:
    """Write ``path`` as safetensors and say what was done. ``dape`` is for a tagger alone, ``vae`` (of a base) for a light decoder.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is not set.
        FileNotFoundError, ValueError: there is nothing to convert.
    """
    output = output or (path.with_name(f"{path.name}.safetensors") if path.is_dir() else path.with_suffix(".safetensors"))
    if output.suffix != ".safetensors":
        raise ValueError(f"-o: found {output.name}, expected a name that ends in .safetensors.")
    if path.is_dir():
        return _convert_folder(path, output, overwrite)
    if output.resolve() == path.resolve():
        raise ValueError(f"{path}: it is a safetensors file already.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Give another name with -o, or --overwrite.")
    kind = identify(read_weights(path, pass_over=True)[0])
    record = record_of(kind)
    if (vae is None) == is_light_decoder(kind):
        what, wanted = (f"{kind.phrase} alone", "its base's VAE") if vae is None else (kind.phrase, "AdcSR's or VOSR's decoder")
        raise ValueError(
            f"--vae: found {what} in {path.name}, expected {wanted}: a VAE file, a whole checkpoint or a diffusers folder goes with them."
        )
    if dape is not None and kind.id != TAGGER.id:
        raise ValueError(f"--dape: found {kind.phrase} in {path.name}, expected RAM's tagger, which DAPE is for.")
    if record is not None:
        record.save(load_weights(record, path), output)
    elif kind.id == TAGGER.id:
        convert_tagger(path, output, dape, overwrite=overwrite)
    elif vae is not None:
        convert_light_decoder(path, kind, vae, output)
    else:
        known = ", ".join(other.kind.phrase for other in records())
        raise ValueError(f"{path.name}: found {kind.found}; expected {known}, {TAGGER.phrase} or a light decoder.")
    return f"{path} ({kind.phrase}, {_size(path)}) -> {output} ({_size(output)})"


def _convert_folder(path: Path, output: Path, overwrite: bool) -> str:
    """A folder is OMGSR-S's."""
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Give another name with -o, or --overwrite.")
    save_adapter(read_omgsr(path), output)
    return f"{path} (an OMGSR-S adapter) -> {output} ({_size(output)}), to be loaded as OSEDiff's"


def describe_file(path: Path) -> str:
    """A few lines on a weight file: kind, rank, size, and what it fits; on a picture that ``upscale`` has written: with which settings."""
    if made := read_record(path):
        settings = [f"  {_shown(name)}: {_shown(str(value))}" for name, value in recorded_settings(made).items()]
        return "\n".join(
            [f"{path}: a picture restored by this program, {_size(path)}", *(settings or ["  note: its settings were too long to keep"])]
        )
    if path.suffix.lower() in readable() and path.is_file():
        raise ValueError(f"{path.name}: this picture was not made by this program, or has lost its record; expected a result or a weight file.")
    state, metadata = read_weights(path, pass_over=True)
    kind = identify(state)
    lines = [f"{path}: {kind.phrase}", f"  size: {_size(path)}, {_tensors(state)}"]
    if record := record_of(kind):
        lines += [*record.summary(load_weights(record, path)), f"  licence of the authors' file: {record.weights.licence}"]
    elif kind.id == TAGGER.id:
        lines += _tagger(path)
    elif is_light_decoder(kind):
        lines += _light_decoder(read_light_decoder(path, kind))
    elif kind.lacking:
        lines.append(f"  note: {kind.lacking}")
    lines += [f"  {_shown(key)}: {_shown(value)}" for key, value in sorted(metadata.items()) if key != "format" and len(value) <= 200]
    return "\n".join(lines)


def _shown(text: str) -> str:
    """What a file says, without what a terminal could take for a command; of keys, what a line holds."""
    return text if text.isprintable() and len(text) <= _LONGEST else printable(text)


def _tagger(path: Path) -> list[str]:
    try:
        tagger = load_tagger_weights(path)
    except (ValueError, FileNotFoundError) as error:
        return [f"  note: {error}"]
    return [f"  tags: {len(tagger.vocabulary.names)}; DAPE: {tagger.dape or 'not merged'}", "  fits: OSEDiff's prompts (--tagger)"]


def _light_decoder(decoder: Decoder) -> list[str]:
    before = "the base's post_quant_conv" if decoder.post_quant_conv is None else "no post_quant_conv"
    return [
        f"  network: {', '.join(map(str, decoder.widths))} channels, {decoder.resnets} residual blocks a level; decodes behind {before}",
        "  fits: the VAE of Stable Diffusion 2.x; convert --vae BASE makes one VAE file of both, upscale --decoder reads it as it is",
        "  licence of the authors' files: Apache-2.0",
    ]


def _size(path: Path) -> str:
    return size_in_words(path.stat().st_size)


def size_in_words(size: float) -> str:
    """Bytes in the largest fitting unit."""
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
