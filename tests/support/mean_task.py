"""The smallest training there is, for tests of what surrounds one."""

import torch

from pipelines.training.task import Task


class Mean(Task):
    """One number learns the pictures' mean. ``losses`` are multiplied into the loss, batch after batch, where they are given."""

    def __init__(self, losses=(), waits=None):
        self.number = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.number.weight)
        self.phases = {"mean": self.number}
        self.losses, self.waits, self.counts, self.steps, self.saved, self.draws = list(losses), waits, [], [], [], []

    def optimizer(self, phase, parameters, options):
        return torch.optim.SGD(parameters, options.lr)  # AdamW reads its own count of steps, which torch keeps on the CPU

    def begin_step(self, step):
        super().begin_step(step)
        self.steps.append(step)
        self.counts.append(self.waits.count if self.waits else 0)

    def loss(self, phase, batch, generator):
        self.draws.append(torch.rand((), generator=generator))
        loss = (self.phases[phase](batch["hq"].mean().reshape(1, 1)) - 0.5).square().mean()
        if self.losses:
            loss = loss * self.losses.pop(0)
        return loss, {"half": loss.detach() / 2}

    def sample(self, batch):
        return torch.zeros(3, 8, 8)

    def save(self, folder):
        self.saved.append(self.step)
        (folder / "result.txt").write_text(str(self.number.weight.item()))
