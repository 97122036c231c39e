"""Samples of a table's rows, from the same noise, one row below the other."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from reproduce.figures.style import styled
from reproduce.models.embedded import class_names
from reproduce.plan import Plan
from reproduce.table_results import TableResults
from reproduce.tables.base import Row

COLUMNS = 8  # images in a row's picture, which `reproduce.seed_run` writes
WORDS = 15  # letters in a line above an image


@styled
def picture(results: TableResults) -> Figure:
    """Samples of the table's chosen rows, all from the same noise.

    Above them stands what the model was told: the prompts, or the names of the classes.
    """
    rows = [results.table.row(row_id) for row_id in results.table.picture]
    told = [textwrap.fill(text, WORDS) for text in conditions_of(rows[0], results.plan)]
    head = 0.16 * max((text.count("\n") + 1 for text in told), default=0)
    figure, places = plt.subplots(
        len(rows) + bool(told),
        1,
        figsize=(COLUMNS, head + 1.25 * len(rows)),
        squeeze=False,
        gridspec_kw={"height_ratios": [*([head] if told else []), *[1.25] * len(rows)]},
    )
    for axes in places[:, 0]:
        axes.axis("off")
    if told:
        _write_above(places[0, 0], told)
    for axes, row in zip(places[bool(told) :, 0], rows, strict=True):
        axes.set_title(row.title, fontsize=8)
        path = results.plan.source / row.picture_file
        result = results[row.id]
        if result.done and path.is_file():
            axes.imshow(np.asarray(Image.open(path)), interpolation="nearest")
        else:
            reason = f"{result.status}: {result.reason}"
            axes.text(0, 0.5, reason, fontsize=7, transform=axes.transAxes, wrap=True)
    return figure


def conditions_of(row: Row, plan: Plan) -> list[str]:
    """What the model was told for each image of a row's picture; empty where it is told nothing.

    The classes of a model that is not embedded have no names here.
    """
    setting = plan.drawing(row)
    if plan.missing(row) is not None or setting.model is None:
        return []
    if setting.captions is not None:
        from reproduce.evaluation.clip_score import (
            coco_prompts,
        )  # loads open_clip, which takes long

        prompts = coco_prompts(setting.captions, setting.samples_per_seed, plan.seeds[0])
        return prompts[:COLUMNS]
    names = class_names(setting.model)
    return [names[i % len(names)] for i in range(COLUMNS)] if names else []


def _write_above(axes: Axes, texts: list[str]) -> None:
    for i, text in enumerate(texts):
        x = (i + 0.5) / COLUMNS
        axes.text(x, 0, text, ha="center", va="bottom", fontsize=7, transform=axes.transAxes)
