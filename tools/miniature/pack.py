"""Base, adapter and noise predictor into one folder in half precision, as the package carries its miniature."""

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from fewstep_sr.methods import INVSR, OSEDIFF, load_weights
from fewstep_sr.weights.read import read_weights
from fewstep_sr.weights.save import save_safetensors
from fewstep_sr.weights.strict import own_copies
from pipelines.training.bases import PROMPT_FILE


def pack(base: Path, osediff: Path | None, noise_predictor: Path | None, folder: Path) -> int:
    """Write ``folder`` and return the weights' size in bytes.

    Raises:
        OSError, ValueError: a part is missing or is something else; nothing has been written then.
    """
    weights = {"osediff.safetensors": osediff, "noise_predictor.safetensors": noise_predictor}
    for method, source in ((OSEDIFF, osediff), (INVSR, noise_predictor)):
        if source:
            load_weights(method, source)
    sources = {PROMPT_FILE: base / PROMPT_FILE, **{name: source for name, source in weights.items() if source}}
    files = {name: read_weights(source) for name, source in sources.items()}
    tensors = {name: own_copies(state, sources[name].name) for name, (state, _) in files.items()}
    networks = {"unet": UNet2DConditionModel.from_pretrained(base / "unet"), "vae": AutoencoderKL.from_pretrained(base / "vae")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        network.half().save_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a path of this machine
        (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copytree(base / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    for name, (_, metadata) in files.items():
        halved = {key: tensor.half() for key, tensor in tensors[name].items()}
        save_safetensors(halved, folder / name, {k: v for k, v in metadata.items() if k != "format"})
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
