"""Reading the parts of a checkpoint that torch.save wrote, without running them."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

ADVICE = "Take another checkpoint, or begin anew with another --output."

# Random states hold NumPy's state: an array of uint32, which is numbers alone.
_ARRAYS: list[Any] = [np.empty(0, np.uint32).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def read_state(path: Path) -> dict:
    """A state dict of tensors, numbers, text, and NumPy arrays, on the CPU.

    Raises:
        ValueError: the file is missing, damaged, no state dict, or holds other objects, which could run code; it is refused unread then.
    """
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} is missing. {ADVICE}") from None
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"a Python object ({culprit.group(1)}) that could run code" if culprit else f"what can't be read ({reason(error)})"
        raise ValueError(f"checkpoint: found {found} in {path}, expected tensors and numbers. {ADVICE}") from None
    except Exception as error:  # damage can surface as any of them, deep in the unpickler or the archive
        raise ValueError(f"checkpoint: {path} can't be read ({reason(error)}). {ADVICE}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint: found a {type(state).__name__} in {path}, expected a dictionary of states. {ADVICE}")
    return state


def reason(error: Exception) -> str:
    """The first line of what an exception says, of bounded length, or its kind."""
    return next((line.strip()[:160] for line in str(error).splitlines() if line.strip()), type(error).__name__)
