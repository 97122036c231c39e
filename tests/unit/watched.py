"""A calibration that tells of every batch that is drawn from it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from questlib import Calibration
from questlib.calls import Batch, CallTable


class Stop(Exception):
    """Raised to end a run, as a kill would."""


def watched(calib: Calibration, before_batch: Callable[[], None]) -> Calibration:
    """An equal calibration, which calls `before_batch` before it gives a batch."""

    class Watched(CallTable):
        def batch(self, step: int | torch.Tensor, which: torch.Tensor) -> Batch:
            before_batch()
            return super().batch(step, which)

    return Calibration([Watched(**vars(table)) for table in calib.tables], calib.model)


class Count:
    """Counts batches, and raises `Stop` in place of the one with number `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.batches = 0
        self.stop_at = stop_at

    def __call__(self) -> None:
        if self.batches == self.stop_at:
            raise Stop
        self.batches += 1
