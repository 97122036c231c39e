"""Figure 2: what layers receive in full precision, and before and after finetuning."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

import questlib
from questlib.errors import ConfigError
from questlib.finetuning.stages import select_stages
from questlib.quantization.roles import layer_roles
from reproduce.figures.activations import histogram_figure, input_table, layer_inputs
from reproduce.plan import Plan
from reproduce.seed_run import SeedRun
from reproduce.store import Artifact, write_json

ROWS = {"before": "w4a4-before", "after": "w4a4-after"}
SAMPLES = 4  # trajectories, at all their steps
BITS = 4  # of the grids above the histograms


class InputRanges:
    """Ranges of every layer's input in the models of Figure 2, from the first seed's checkpoints.

    Attributes:
        unets: models by name: "full precision", "before" and "after".
        calib: the calibration set that they run on.
        config: the configuration of "after".
        table: one line a layer input, the widest before finetuning first: its role, whether the
            layer is finetuned, and min, max and std in each model. Layers that receive the same
            (queries, keys and values) are one line, under the first one's name.
    """

    def __init__(self, plan: Plan) -> None:
        """Measure the ranges and write them to ranges.json beside the rows.

        Args:
            plan: of Figure 2; its rows must have been run, their checkpoints are in `plan.work`.
        """
        before, after = (SeedRun(plan.table.row(row), plan, plan.seeds[0]) for row in ROWS.values())
        self.unets = {
            "full precision": after.pipe.unet,
            "before": _load_unet(before),
            "after": _load_unet(after),
        }
        self.calib = questlib.Calibration.load(
            _folder(after.calibration) / "calibration.safetensors"
        )
        self.config = plan.config(plan.table.row(ROWS["after"]), plan.seeds[0])
        self.table = self._measure()
        lines = {str(name): line.to_dict() for name, line in self.table.iterrows()}
        write_json(plan.folder / "ranges.json", lines)

    def _measure(self) -> pd.DataFrame:
        roles = layer_roles(self.unets["full precision"])
        stages = select_stages(self.unets["after"], self.config)
        tuned = {name for stage in stages for name in stage.layers}
        table = pd.DataFrame(index=list(roles))
        table["role"] = list(roles.values())
        table["finetuned"] = [name in tuned for name in roles]
        for model, unet in self.unets.items():
            found = input_table(unet, self.calib, SAMPLES)
            for key in ("min", "max", "std"):
                table[f"{key}, {model}"] = found[key]
        same_input = [column for column in table if "full precision" in str(column)]
        table = table.drop_duplicates(same_input)
        width = table["max, before"] - table["min, before"]
        return table.loc[width.sort_values(ascending=False).index]

    def widest(self, count: int) -> pd.DataFrame:
        """The first lines of the table, rounded."""
        return self.table.head(count).round(3)

    def summary(self) -> pd.DataFrame:
        """Mean ratios after / before of widths and deviations, by whether layers are finetuned."""
        table = self.table
        before, after = (table[f"max, {model}"] - table[f"min, {model}"] for model in ROWS)
        ratios = pd.DataFrame(
            {
                "range, after / before": after / before,
                "std, after / before": table["std, after"] / table["std, before"],
            }
        )
        names = table["finetuned"].map({True: "finetuned layers", False: "other layers"})
        return ratios.groupby(names).mean().assign(layers=names.value_counts())

    def histogram(self, place: int) -> Figure:
        """Histograms of one finetuned layer's input in each model, in the style of the paper.

        Args:
            place: of the layer among the finetuned ones, 0 for the one with the widest input.
        """
        name = str(self.table.index[self.table["finetuned"]][place])
        seen = {
            model: layer_inputs(unet, self.calib, [name], SAMPLES)[name]
            for model, unet in self.unets.items()
        }
        return histogram_figure(seen, BITS, name)


def _folder(artifact: Artifact | None) -> Path:
    if artifact is None:
        raise ConfigError("figure2: expected quantized rows, found one in full precision")
    return artifact.folder


def _load_unet(run: SeedRun) -> nn.Module:
    """The row's checkpoint, where the pipeline is; simulated, whatever engine the rows ran on."""
    return questlib.from_pretrained(_folder(run.checkpoint) / "unet").to(run.pipe.device)
