"""How far a run is, and its figures: kept on the device until somebody looks, since reading one would wait for the device."""

import torch
from accelerate import Accelerator

_ALL_FINITE = -1


class Progress:
    """The number of steps made, sums of the figures since the last log, and for each phase the step and value of its first loss that was not finite."""

    def __init__(self):
        self.step = 0
        self._sums: dict[str, torch.Tensor | float] = {}
        self._bad: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, name: str, value: torch.Tensor | float, share: float) -> None:
        """Count ``value``, a scalar, with the weight ``share`` in what is logged under ``name``."""
        self._sums[name] = self._sums.get(name, 0.0) + value * share

    def watch(self, phase: str, loss: torch.Tensor) -> None:
        """Note the step at which ``loss``, a scalar, was first not finite; :meth:`require_finite` tells."""
        step, value = self._bad.get(phase) or (torch.full((), _ALL_FINITE, device=loss.device), torch.zeros_like(loss))
        new = ~torch.isfinite(loss) & (step == _ALL_FINITE)
        self._bad[phase] = torch.where(new, self.step, step), torch.where(new, loss, value)

    def require_finite(self, accelerator: Accelerator) -> None:
        """Raises RuntimeError, in all processes, where a loss of any was not finite. Waits for the device."""
        for phase, (step, value) in self._bad.items():
            steps, values = (accelerator.gather(tensor.reshape(1)).tolist() for tensor in (step, value.float()))
            found = [pair for pair in zip(steps, values, strict=True) if pair[0] != _ALL_FINITE]
            if found:
                first, loss = min(found, key=lambda pair: pair[0])
                raise RuntimeError(f"{phase}: the loss is {loss} at step {first}. Lower lr or train in float32; the last checkpoint is whole.")

    def take(self) -> dict[str, float]:
        """The figures as numbers; new sums begin. Waits for the device."""
        figures = self._figures()
        self._sums.clear()
        return figures

    def _figures(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()}

    def state_dict(self) -> dict:
        return {"step": self.step, "sums": self._figures()}

    def load_state_dict(self, state: dict) -> None:
        self.step, self._sums = state["step"], dict(state.get("sums", {}))
