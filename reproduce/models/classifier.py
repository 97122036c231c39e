"""The metric network of the mini scale: a small classifier of the nine emoji groups."""

from __future__ import annotations

import torch
from torch import nn


class GroupClassifier(nn.Module):
    """Four strided stages of 3x3 convolutions.

    `features` gives what FID, KID and sFID are computed on.

    Input: float [N, 3, 64, 64] in (-1, 1).
    """

    POOLED = 128  # width of the pooled features (FID, KID)
    SPATIAL = 8 * 16  # width of the spatial features (sFID): 8 channels on a 4x4 grid

    def __init__(self, num_classes: int = 9, width: int = 24) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, self.POOLED)
        stages = []
        c = 3
        for w in widths:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(c, w, 3, stride=2, padding=1),
                    nn.GroupNorm(8, w),
                    nn.SiLU(),
                    nn.Conv2d(w, w, 3, padding=1),
                    nn.GroupNorm(8, w),
                    nn.SiLU(),
                )
            )
            c = w
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(c, num_classes)

    def features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """pooled [N, 128], spatial [N, 128], logits [N, classes].

        The spatial features are the first 8 channels of the 8x8 stage, averaged to 4x4.
        """
        mid = self.stages[:3](x)  # [N, 4 * width, 8, 8]
        pooled = self.stages[3](mid).mean((2, 3))  # [N, 128, 4, 4] -> [N, 128]
        spatial = nn.functional.avg_pool2d(mid[:, :8], 2).flatten(1)  # [N, 8, 4, 4] -> [N, 128]
        return {"pooled": pooled, "spatial": spatial, "logits": self.head(pooled)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)["logits"]
