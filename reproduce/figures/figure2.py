"""Figure 2: what layers receive in full precision, before and after finetuning, from the checkpoints of its rows."""

from __future__ import annotations

import pandas as pd
import torch

import questlib
from questlib.config import QuantConfig
from questlib.finetuning.stages import stages
from questlib.quantization.roles import layer_roles
from reproduce.figures.pictures import input_table
from reproduce.pipeline import SeedRun
from reproduce.plan import Plan
from reproduce.store import write_json

ROWS = {"before": "w4a4-before", "after": "w4a4-after"}
SAMPLES = 4  # trajectories, at all their steps


def models(plan: Plan) -> tuple[dict[str, torch.nn.Module], questlib.Calibration, QuantConfig]:
    """UNets by name ("full precision", "before", "after"; of the first seed), their calibration set and the config of "after".

    The rows must have been run: their checkpoints are read from `plan.work`.
    """
    runs = {
        name: SeedRun(plan.table.cell(cell), plan, plan.seeds[0]) for name, cell in ROWS.items()
    }
    unets = {"full precision": runs["after"].pipe.unet}
    device = unets["full precision"].device
    unets |= {
        name: questlib.from_pretrained(run.checkpoint.folder / "unet").to(device)
        for name, run in runs.items()
    }
    calib = questlib.Calibration.load(runs["after"].calibration.folder / "calibration.safetensors")
    return unets, calib, runs["after"].config


def input_ranges(plan: Plan) -> pd.DataFrame:
    """One line a layer input: role, whether the layer is finetuned; min, max, std in each model. Also kept as ranges.json.

    Layers that receive the same (queries, keys and values) are one line, under the first one's name; widest before
    finetuning first.
    """
    unets, calib, config = models(plan)
    roles = layer_roles(unets["full precision"])
    tuned = {name for stage in stages(unets["after"], config) for name in stage.layers}
    table = pd.DataFrame(index=list(roles))
    table["role"], table["finetuned"] = list(roles.values()), [name in tuned for name in roles]
    for model, unet in unets.items():
        found = input_table(unet, calib, SAMPLES)
        for key in ("min", "max", "std"):
            table[f"{key}, {model}"] = found[key]
    table = table.drop_duplicates([c for c in table if "full precision" in c])
    table = table.loc[
        (table["max, before"] - table["min, before"]).sort_values(ascending=False).index
    ]
    write_json(plan.folder / "ranges.json", {name: row.to_dict() for name, row in table.iterrows()})
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By whether the layers are finetuned: how many, and the mean ratio after / before of their widths and deviations."""
    width = {m: table[f"max, {m}"] - table[f"min, {m}"] for m in ROWS}
    deviation = table["std, after"] / table["std, before"]
    ratios = pd.DataFrame(
        {
            "range, after / before": width["after"] / width["before"],
            "std, after / before": deviation,
        }
    )
    names = table["finetuned"].map({True: "finetuned layers", False: "other layers"})
    return ratios.groupby(names).mean().assign(layers=names.value_counts())
