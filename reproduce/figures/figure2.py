"""Figure 2: what layers receive in full precision, and before and after finetuning."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import questlib
from questlib.config import QuantConfig
from questlib.denoisers import unet_of
from questlib.errors import ConfigError
from questlib.finetuning.stages import select_stages
from questlib.quantization.roles import layer_roles
from reproduce.figures import style
from reproduce.figures.activations import histogram_figure, input_table, layer_inputs
from reproduce.plan import Plan
from reproduce.seed_run import SeedRun
from reproduce.store import Artifact, write_json

RANGES = "ranges.json"
RANGE_RATIO, FINETUNED, OTHERS = "range, after / before", "finetuned layers", "other layers"
RUN = "make reproduce-figure2"
ROWS = {"before": "w4a4-before", "after": "w4a4-after"}
SAMPLES = 4  # trajectories, at all their steps
BITS = 4  # of the grids above the histograms


class InputRanges:
    """Ranges of every layer's input in the models of Figure 2, from the first seed's checkpoints.

    What is measured and drawn is kept beside the rows, and shown from there where the plan shows
    stored rows.

    Attributes:
        table: one line a layer input, the widest before finetuning first: its role, whether the
            layer is finetuned, and min, max and std in each model. Layers that receive the same
            (queries, keys and values) are one line, under the first one's name.
    """

    def __init__(self, plan: Plan) -> None:
        """Measure the ranges, or read them.

        Args:
            plan: of Figure 2. Where its rows are not stored ones they must have been run: their
                checkpoints are in `plan.work`.

        Raises:
            ConfigError: the stored rows have no ranges beside them.
        """
        self.plan = plan
        if plan.choices.stored:
            self.table = read_table(plan)
        else:
            self.table = self._measure()
            lines = {str(name): line.to_dict() for name, line in self.table.iterrows()}
            write_json(plan.folder / RANGES, lines)

    @cached_property
    def unets(self) -> dict[str, nn.Module]:
        """Models by name: "full precision", "before" and "after"."""
        before, after = self._runs
        return {
            "full precision": unet_of(after.pipe),
            "before": _load_unet(before),
            "after": _load_unet(after),
        }

    @cached_property
    def calib(self) -> questlib.Calibration:
        """The calibration set that they run on."""
        folder = _folder(self._runs[1].calibration)
        return questlib.Calibration.load(folder / "calibration.safetensors")

    @cached_property
    def config(self) -> QuantConfig:
        """The configuration of "after"."""
        return self.plan.config(self.plan.table.row(ROWS["after"]), self.plan.seeds[0])

    @cached_property
    def _runs(self) -> tuple[SeedRun, SeedRun]:
        plan = self.plan
        before, after = (SeedRun(plan.table.row(row), plan, plan.seeds[0]) for row in ROWS.values())
        return before, after

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
        return mean_ratios(self.table)

    def histogram(self, place: int) -> Figure:
        """Histograms of one finetuned layer's input in each model, in the style of the paper.

        Args:
            place: of the layer among the finetuned ones, 0 for the one with the widest input.
        """
        name = str(self.table.index[self.table["finetuned"]][place])
        path = self.plan.source / f"histogram-{place}.png"
        if self.plan.choices.stored:
            return _shown(path)
        seen = {
            model: layer_inputs(unet, self.calib, [name], SAMPLES)[name]
            for model, unet in self.unets.items()
        }
        figure = histogram_figure(seen, BITS, name)
        style.save(figure, path)
        return figure


def read_table(plan: Plan) -> pd.DataFrame:
    """The table of `InputRanges` that lies beside the rows. ConfigError: there is none."""
    path = plan.source / RANGES
    if not path.is_file():
        raise ConfigError(f"figure2: expected {RANGES} beside the rows, found none: {RUN}")
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))).T.infer_objects()


def mean_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Mean ratios after / before of widths and deviations, by whether layers are finetuned."""
    before, after = (table[f"max, {model}"] - table[f"min, {model}"] for model in ROWS)
    ratios = pd.DataFrame(
        {
            RANGE_RATIO: after / before,
            "std, after / before": table["std, after"] / table["std, before"],
        }
    )
    names = table["finetuned"].map({True: FINETUNED, False: OTHERS})
    return ratios.groupby(names).mean().assign(layers=names.value_counts())


def _shown(path: Path) -> Figure:
    """A picture that an earlier run saved."""
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.axis("off")
    if path.is_file():
        figure.set_size_inches(9, 9 * np.divide(*np.asarray(Image.open(path)).shape[:2]))
        axes.imshow(np.asarray(Image.open(path)))
    else:
        axes.text(0, 0.5, f"{path.name} is not beside the rows: {RUN}")
    plt.close(figure)
    return figure


def _folder(artifact: Artifact | None) -> Path:
    if artifact is None:
        raise ConfigError("figure2: expected quantized rows, found one in full precision")
    return artifact.folder


def _load_unet(run: SeedRun) -> nn.Module:
    """The row's checkpoint, where the pipeline is; simulated, whatever engine the rows ran on."""
    return questlib.from_pretrained(_folder(run.checkpoint) / "unet").to(run.pipe.device)
