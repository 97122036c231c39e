"""Adam over the weights and activation scales of one finetuning stage."""

from __future__ import annotations

import torch
from torch import nn


class StageAdam(torch.optim.Adam):
    """Adam in which every step group's scales, a row of `scale` [G, P], have moments and a count of their own.

    A batch that does not visit a group leaves its scales alone. One Adam over the whole table would let them coast on the
    momentum of their last visit, far enough to ruin the small scales of 8 bits where one step is trained after another.
    A row whose gradient is exactly zero counts as not visited, also where it is its table's only one.
    All tables are stepped at once, as one vector: thousands of rows one by one were a tenth of a finetuning step.
    """

    def __init__(self, groups: list[dict]) -> None:
        """groups: as `trainable` gives them; those that are "positive" hold one table of scales [G, P] each."""
        scales = [group for group in groups if group["positive"]]
        self.tables: list[nn.Parameter] = [group["params"][0] for group in scales]
        others = [group for group in groups if not group["positive"]]
        if scales:
            lengths = torch.tensor(
                [t.shape[1] for t in self.tables for _ in range(len(t))]
            )  # of every row of every table
            self.row = (
                torch.arange(len(lengths)).repeat_interleave(lengths).to(self.tables[0].device)
            )  # [N]: each scale's row
            # The base class skips this vector, having no gradient, but keeps its state and schedules its lr, a factor of `rates`.
            self.vector = nn.Parameter(torch.zeros_like(self.row, dtype=torch.float32))
            others.append(
                {"params": [self.vector], "lr": 1.0, "rates": [group["lr"] for group in scales]}
            )
        super().__init__(others)
        if scales:
            zeros = torch.zeros_like(self.vector)
            self.state[self.vector] = {
                "step": torch.zeros_like(self.row),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        if any(table.grad is not None for table in self.tables):
            self._step_scales()

    def _step_scales(self) -> None:
        """One step of Adam (Kingma and Ba 2015, Algorithm 1) for the rows whose gradient is not all zero."""
        group, state = self.param_groups[-1], self.state[self.vector]
        (beta1, beta2), count = (
            group["betas"],
            state["step"].to(self.row.device),
        )  # a loaded count is on the CPU
        sizes = [t.numel() for t in self.tables]
        lr = (
            torch.tensor(group["rates"], dtype=torch.float64)
            .repeat_interleave(torch.tensor(sizes))
            .to(count.device)
        )  # [N]
        scale = torch.cat([t.flatten() for t in self.tables])  # [N]
        grad = torch.cat(
            [
                torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten()
                for t in self.tables
            ]
        )
        hit = torch.zeros_like(self.row).index_add_(0, self.row, (grad != 0).long())[self.row] > 0
        state["step"] = count = count + hit
        mean = state["exp_avg"].lerp(grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        rate = (group["lr"] * lr / (1 - beta1 ** count.double())).float()
        new = scale - rate * mean / (
            square.sqrt() / (1 - beta2 ** count.double()).sqrt().float() + group["eps"]
        )
        for kept, value in (("exp_avg", mean), ("exp_avg_sq", square)):
            state[kept] = torch.where(hit, value, state[kept])
        parts = torch.where(hit, new, scale).split(sizes)
        for table, part in zip(self.tables, parts, strict=True):
            table.data.copy_(part.view_as(table))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.grad = None
