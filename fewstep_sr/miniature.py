"""The miniature: a small Stable-Diffusion-shaped model with a method's weights each, trained on a CPU, that comes with the pack (see miniature/README.md)."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = next((folder for folder in (_HERE / "data", _HERE.parent / "miniature") if folder.is_dir()), _HERE.parent / "miniature")
"""In an installation below this package, in a checkout beside it."""

PHOTO = "photo.png"
PROMPT_FILE = "prompt_embeds.safetensors"
COLOR_FIX = "wavelet"
"""The best of all by the luma of held-out photos, see the card; without any, tone and hues drift."""

UNET_HEAD_DIM = 32
VAE_NORM_GROUPS = 8
"""Groups of normalisation. Stable Diffusion has 32, which would be single channels here and take the tone out of the picture."""


def find(name: str) -> Path:
    """A file of the miniature. Raises FileNotFoundError where this copy of the pack lacks it."""
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"miniature: {name} is not in {FOLDER}. This copy of the pack is incomplete: install it again.")
    return path
