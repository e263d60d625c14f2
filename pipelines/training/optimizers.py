"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): steps whose matrices are orthogonal. torch's own takes matrices alone, not convolutions."""

import torch
from torch import nn

MUON_LR = 0.02
"""For matrices; everything else learns with Adam at the training's own rate."""


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, Adam for the others.

    Convolutions count as matrices (out, in x height x width). First and last layers, those with fewer than 8 inputs or outputs, learn with Adam too.
    ``dtype`` is that of the iteration that makes a step orthogonal, the weights' own without; bfloat16 is as published.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        matrix_lr: float = MUON_LR,
        momentum: float = 0.95,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        matrices = [p for p in parameters if p.ndim >= 2 and min(p.shape[:2]) >= 8]
        known = {id(p) for p in matrices}
        groups = [{"params": matrices, "lr": matrix_lr, "matrices": True}]
        rest = [p for p in parameters if id(p) not in known]
        super().__init__(
            [*groups, {"params": rest, "matrices": False}], {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._orthogonal(parameter, group) if group["matrices"] else self._adam(parameter, group)
                    decay = group["weight_decay"] if parameter.ndim > 1 else 0.0  # biases and scales of norms stay
                    parameter.mul_(1 - group["lr"] * decay).add_(update, alpha=-group["lr"])

    def _orthogonal(self, parameter, group) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.mul_(group["momentum"]).add_(gradient)
        matrix = gradient.add(momentum, alpha=group["momentum"]).flatten(1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        return scale * orthogonalize(matrix.to(self.dtype or matrix.dtype)).to(matrix).reshape(parameter.shape)

    def _adam(self, parameter, group) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient**2, 1 - second)
        step = state["step"].item()
        return state["mean"] / (1 - first**step) / ((state["square"] / (1 - second**step)).sqrt() + 1e-8)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(rows, columns) with singular values brought near 1 by Muon's quintic Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
