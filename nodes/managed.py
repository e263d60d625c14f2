"""A network of ours under ComfyUI's memory management."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch


@dataclass(frozen=True)
class ManagedNetwork:
    """A network that ComfyUI loads, offloads and casts, and the dtype that it computes in."""

    patcher: comfy.model_patcher.ModelPatcher
    compute_dtype: torch.dtype

    @property
    def network(self) -> torch.nn.Module:
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self, memory: int) -> None:
        """Bring the network onto its device and free ``memory`` bytes for activations."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input on the network's device and in its dtype."""
        return tensor.to(self.device, self.compute_dtype)

    def activation_size(self, elements: int) -> int:
        """Bytes of an activation of that many elements."""
        return elements * comfy.model_management.dtype_size(self.compute_dtype)


def manage(build: Callable[..., torch.nn.Module], state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> ManagedNetwork:
    """Build a network in ``dtype``, or in the one that ComfyUI chooses, and load its weights.

    ``build(dtype=, device=, operations=)`` makes it from ``comfy.ops`` layers, which cast and offload themselves.
    """
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    manual_cast = None
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(device, sum(w.numel() for w in state_dict.values()))
        manual_cast = comfy.model_management.unet_manual_cast(dtype, device)
    network = build(dtype=dtype, device=offload_device, operations=comfy.ops.pick_operations(dtype, manual_cast)).eval().requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(network, load_device=device, offload_device=offload_device)
    network.load_state_dict({k: w.to(dtype) for k, w in state_dict.items()}, assign=patcher.is_dynamic())
    return ManagedNetwork(patcher, manual_cast or dtype)
