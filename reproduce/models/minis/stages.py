"""One stage of training, resumable from its last checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from questlib.files import atomic_path
from reproduce.models.minis.architectures import Stage

SAVE_SECONDS = 300  # a checkpoint at least as often
SAVE_STEPS = 500
LOG_STEPS = 100
WARM_UP = 300  # steps
LAST_LR = 0.01  # of the first learning rate, at the end of the cosine

StepLoss = Callable[[int, torch.Generator], torch.Tensor]


class _State:
    """All that a stage's next step depends on."""

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        self.model = model
        self.opt = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=1e-4)

        def factor(step: int) -> float:
            warm_up = min(1.0, (step + 1) / WARM_UP)
            cosine = torch.cos(torch.tensor(step / stage.steps * torch.pi)).item()
            return warm_up * (LAST_LR + (1 - LAST_LR) * 0.5 * (1 + cosine))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.opt, factor)
        self.ema = EMAModel(model.parameters(), decay=stage.ema, use_ema_warmup=True, power=0.75)
        self.generator = torch.Generator().manual_seed(1)
        self.step = 0  # the next one
        self.seconds = 0.0  # of training so far

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["rng"])
        self.step = state["step"]
        self.seconds = state["seconds"]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
            "rng": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)


def run_stage(
    name: str,
    stage: Stage,
    model: nn.Module,
    step_loss: StepLoss,
    work: Path,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train `model` and return it with its EMA weights, in eval mode.

    Args:
        name: of the checkpoint NAME.pt and the log NAME.jsonl in `work`.
        step_loss: (step, generator) -> loss; all its randomness comes from the generator.
        on_step: is called before each step.
    """
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"{name}.pt"
    log_file = work / f"{name}.jsonl"
    model.train()
    state = _State(stage, model)
    if checkpoint.exists():
        state.load(checkpoint)
    else:
        log_file.unlink(missing_ok=True)
    began = time.time() - state.seconds
    saved = time.time()
    losses: list[float] = []
    for step in range(state.step, stage.steps):
        if on_step is not None:
            on_step(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bf16):
            loss = step_loss(step, state.generator)
        state.opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.opt.step()
        state.schedule.step()
        state.ema.step(model.parameters())
        state.step = step + 1
        state.seconds = time.time() - began
        losses.append(loss.item())
        if state.step % LOG_STEPS == 0:
            line = {
                "step": state.step,
                "loss": round(sum(losses) / len(losses), 5),
                "seconds": round(state.seconds, 1),
            }
            with log_file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(name, line, flush=True)
            losses = []
        last = state.step == stage.steps
        if state.step % SAVE_STEPS == 0 or last or time.time() - saved > SAVE_SECONDS:
            state.save(checkpoint)
            saved = time.time()
    state.ema.copy_to(model.parameters())
    return model.eval()
