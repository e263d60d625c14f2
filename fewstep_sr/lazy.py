"""torch, imported at its first use: to read the methods' records, as ``--help`` does, takes a fraction of the second that torch takes.

For modules that need torch in their functions alone. Their annotations are not evaluated (``from __future__ import annotations``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
else:

    class _Module:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(self._name), attribute)

    torch, F = _Module("torch"), _Module("torch.nn.functional")

__all__ = ["F", "torch"]
