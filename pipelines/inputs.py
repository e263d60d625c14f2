"""What users hand to a pipeline, as one batch: PIL images of every mode, arrays and tensors; what cannot be one is named."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from .checks import require_picture
from .pictures import from_pil

Pictures = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def to_batch(image: Pictures) -> torch.Tensor:
    """Images as (B, 3, H, W), float32 on the CPU.

    PIL images are read as the command line reads files: turned upright by their EXIF, of 8 or 16 bits, with what lies under alpha 0 filled from the
    visible pixels; CMYK is brought to sRGB.

    Raises:
        ValueError: no image, several frames, several sizes, or values outside [0, 1].
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("image: found an empty list, expected at least one image.")
    batches = [_one(each, f"image[{i}]" if len(images) > 1 else "image") for i, each in enumerate(images)]
    sizes = [tuple(batch.shape[-2:]) for batch in batches]
    if len(set(sizes)) > 1:
        other = next(i for i, size in enumerate(sizes) if size != sizes[0])
        raise ValueError(
            f"image: found images of several sizes, {sizes[0][1]} x {sizes[0][0]} and (number {other}) {sizes[other][1]} x {sizes[other][0]}; "
            "a batch has one size. Call the pipeline once for each size."
        )
    return torch.cat(batches)


def _one(image: Any, name: str) -> torch.Tensor:
    if isinstance(image, PIL.Image.Image):
        try:
            return from_pil(image).tensor().contiguous()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype.kind != "f":
            raise ValueError(f"{name}: found {image.dtype} values, expected floating-point ones in [0, 1]. Divide 8-bit values by 255.")
        tensor = torch.from_numpy(np.require(image, np.float32, ["C", "W"]))
        tensor = tensor.movedim(-1, -3) if tensor.ndim in (3, 4) else tensor
    elif isinstance(image, torch.Tensor):
        tensor = image
    else:
        raise ValueError(f"{name}: found {type(image).__name__}, expected a PIL image, a tensor or a NumPy array. Open files with PIL.Image.open.")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: found {tensor.dtype} values, expected floating-point ones in [0, 1]. Divide 8-bit values by 255.")
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{name}: found a tensor that is sparse, nested or without values, expected a dense one.")
    tensor = tensor.detach().float().cpu()
    return require_picture(tensor[None] if tensor.ndim == 3 else tensor, name)


def to_texts(texts: str | Sequence[str], name: str, batch: int) -> list[str]:
    """Prompts as a list of one or ``batch``.

    Raises:
        ValueError: there are more or fewer, or they are no text.
    """
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, (list, tuple)) else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(f"{name}: found {type(text).__name__}, expected text or a list of texts.")
    return require_one_or_each(listed, name, batch)


def to_generators(generator: Generators, batch: int) -> list[torch.Generator] | None:
    """Generators as a list of one or ``batch``, or None.

    Raises:
        ValueError: there are more or fewer, or they are something else.
    """
    if generator is None:
        return None
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    for each in generators:
        if not isinstance(each, torch.Generator):
            raise ValueError(
                f"generator: found {type(each).__name__}, expected torch.Generator or a list of them, such as torch.Generator().manual_seed(1)."
            )
    return require_one_or_each(generators, "generator", batch)


def require_one_or_each(items: Any, name: str, batch: int) -> Any:
    if len(items) not in (1, batch):
        expected = "1" if batch == 1 else f"1 or {batch}"
        raise ValueError(f"{name}: found {len(items)}, expected {expected}, as many as images.")
    return items
