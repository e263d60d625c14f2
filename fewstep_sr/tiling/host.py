"""Copies between the host and a device that neither of them waits for, where a picture does not fit on the device."""

import logging
from collections.abc import Callable

import torch


class HostCopies:
    """Parts of a picture on their way to a device, and answers on their way back.

    With page-locked memory a copy is queued behind the device's work and the host goes on: while the device works on a part, the host cuts the next one and
    receives the answer before. Without it each copy waits for all work queued so far.

    Args:
        locked: whether to use page-locked memory, as on CUDA and ROCm. Where the system has none left, the rest goes without.
    """

    def __init__(self, locked: bool):
        self.locked = locked
        self._arriving: tuple[torch.cuda.Event, torch.Tensor, Callable[[torch.Tensor], object]] | None = None

    def send(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``part`` on ``device``. It may be changed or freed at once."""
        buffer = self._buffer(part) if part.device.type == "cpu" != device.type else None
        return part.to(device) if buffer is None else buffer.copy_(part).to(device, non_blocking=True)

    def receive(self, answer: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], object]) -> None:
        """Give ``answer`` on ``device`` to ``use``: at once, or where it comes from another device once the next one is on its way, or in :meth:`finish`."""
        buffer = self._buffer(answer) if device.type == "cpu" != answer.device.type else None
        if buffer is None:
            self.finish()
            use(answer.to(device))
            return
        buffer.copy_(answer, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(answer.device))
        self.finish()
        self._arriving = event, buffer, use

    def finish(self) -> None:
        """Wait for what is on its way, and use it."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            event, answer, use = arriving
            event.synchronize()
            use(answer)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor | None:
        """Page-locked memory for ``like``, or None. PyTorch gives it to nobody else before queued copies are done."""
        if not self.locked:
            return None
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError as error:
            logging.warning("VAE: no page-locked memory (%s), going on with slower copies between host and device", str(error).splitlines()[0])
            self.locked = False
            return None
