"""Adam over the weights and activation scales of one finetuning stage, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from questlib.finetuning.stages import ParameterGroup

# ---- learning rate ----


def constant(i: int) -> float:
    """The factor of the learning rate at iteration i: 1 (paper)."""
    return 1.0


def cosine_decay(iters: int) -> Callable[[int], float]:
    """The factor of the learning rate at each iteration: 1 at the first, along a cosine to 0."""
    return lambda i: 0.5 * (1 + math.cos(math.pi * i / iters))


# ---- Adam ----


class StageAdam(torch.optim.Adam):
    """Adam that treats every row of a table of activation scales as a parameter of its own.

    The scales of one step group are a row of a quantizer's `scale` [G, P]. Each row has moments and
    a count of steps of its own, and a batch that does not visit its group leaves the row alone. One
    Adam over the whole table would move rows on by the momentum of their last visit. Where one step
    is trained after another, that ruins the small scales of 8 bits.

    A row counts as visited when any value of its gradient is not zero.

    All rows of all tables are updated at once, as one vector of length N: thousands of rows one by
    one took a tenth of a finetuning step.
    """

    def __init__(self, groups: list[ParameterGroup]) -> None:
        """groups: as `select_parameters` returns them; a positive one holds a single table."""
        scales = [group for group in groups if group["positive"]]
        own: list[dict] = [dict(group) for group in groups if not group["positive"]]
        self.tables: list[nn.Parameter] = [group["params"][0] for group in scales]
        if scales:
            # The row of each scale, [N]: rows are numbered through all tables.
            lengths = torch.tensor([t.shape[1] for t in self.tables for _ in range(len(t))])
            rows = torch.arange(len(lengths)).repeat_interleave(lengths)
            self.row = rows.to(self.tables[0].device)
            # A parameter that stands for all tables. It never has a gradient, so that the base
            # class does not update it, but saves its state and schedules its learning rate. The
            # rate is a factor of `rates`, the learning rates of the single tables.
            self.vector = nn.Parameter(torch.zeros_like(self.row, dtype=torch.float32))
            rates = [group["lr"] for group in scales]
            own.append({"params": [self.vector], "lr": 1.0, "rates": rates})
        super().__init__(own)
        if scales:
            zeros = torch.zeros_like(self.vector)
            self.state[self.vector] = {
                "step": torch.zeros_like(self.row),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }

    def forget_scales(self) -> None:
        """Start the moments and counts of all scales anew, as a new Adam would."""
        if self.tables:
            for value in self.state[self.vector].values():
                value.zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        if any(table.grad is not None for table in self.tables):
            self._step_scales()

    def _step_scales(self) -> None:
        """One step of Adam (Kingma and Ba 2015, Algorithm 1) for the visited rows."""
        group = self.param_groups[-1]
        state = self.state[self.vector]
        beta1, beta2 = group["betas"]
        sizes = [table.numel() for table in self.tables]

        # All of these have length N.
        scale = torch.cat([table.flatten() for table in self.tables])
        grad = torch.cat(
            [
                torch.zeros_like(table).flatten() if table.grad is None else table.grad.flatten()
                for table in self.tables
            ]
        )
        nonzero = torch.zeros_like(self.row).index_add_(0, self.row, (grad != 0).long())
        visited = nonzero[self.row] > 0
        # A state that was loaded has its counts on the CPU.
        count = state["step"].to(self.row.device) + visited
        rates = torch.tensor(group["rates"], dtype=torch.float64)
        lr = rates.repeat_interleave(torch.tensor(sizes)).to(count.device)

        m = state["exp_avg"].lerp(grad, 1 - beta1)
        v = (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = (group["lr"] * lr / (1 - beta1 ** count.double())).float()
        root = v.sqrt() / (1 - beta2 ** count.double()).sqrt().float()
        new = scale - step_size * m / (root + group["eps"])

        state["step"] = count
        state["exp_avg"] = torch.where(visited, m, state["exp_avg"])
        state["exp_avg_sq"] = torch.where(visited, v, state["exp_avg_sq"])
        parts = torch.where(visited, new, scale).split(sizes)
        for table, part in zip(self.tables, parts, strict=True):
            table.data.copy_(part.view_as(table))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.grad = None
