"""What a table's notebook shows: its plan, its rows, their numbers and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from tqdm import tqdm

from questlib.config import QuantConfig
from questlib.denoisers import unet_of
from questlib.distributed import chosen_device
from questlib.quantization.roles import layer_kind, layer_roles
from reproduce.agreement import compare_with_published
from reproduce.choices import Choices
from reproduce.figures import figure2, plots, strips
from reproduce.pipeline import run_row
from reproduce.plan import PUBLISHED, Plan, make_plan
from reproduce.reporting import report, run_times, what_we_see
from reproduce.seed_run import load
from reproduce.table_results import TableResults
from reproduce.verdicts import LEGEND
from reproduce.workers import make_seeds


class TableRun:
    """A table as its notebook chose it. `reproduce.notebook` makes one.

    Example:
        >>> run = reproduce.notebook("table3", globals())
        >>> run.execute()
        >>> run.rows()
        >>> run.verdicts()
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._results: TableResults | None = None

    @classmethod
    def from_notebook(cls, table: str, names: Mapping[str, Any]) -> TableRun:
        """Make the plan that a notebook's upper-case variables choose.

        Raises:
            ConfigError: a choice that is not known, or that contradicts another.
        """
        # whole sentences, and all columns of a table with three metrics
        pd.set_option("display.max_colwidth", None)
        pd.set_option("display.max_columns", None)
        return cls(make_plan(table, Choices.from_notebook(names)))

    @property
    def words(self) -> str:
        """What will be run or shown, and how long a new run of all rows takes."""
        took = run_times.table_time(self.plan.table.name, PUBLISHED)
        return f"{self.plan.words}\nA new run at mini scale: {took.words}, on {took.machine}."

    def __repr__(self) -> str:
        return self.words

    # ---- before the run ----

    def config(self, row_id: str) -> QuantConfig:
        """What the row's preset means at this scale, for the first seed."""
        return self.plan.config(self.plan.table.row(row_id), self.plan.seeds[0])

    def overrides(self) -> dict[str, dict[str, Any]]:
        """What each quantized row changes in its preset, by row id."""
        rows = [row for row in self.plan.table.rows if not row.full_precision]
        return {row.id: dict(row.overrides) for row in rows}

    def iterations(self) -> pd.DataFrame:
        """Iterations and learning rates of each quantized row at this scale."""
        lines = []
        for row in self.plan.table.rows:
            if row.full_precision:
                continue
            config = self.config(row.id)
            adaround, acts, tuning = config.adaround, config.act_recon, config.finetuning
            lines.append(
                {
                    "method": row.label,
                    "AdaRound, a block": adaround.iters if adaround.enabled else 0,
                    "its learning rate": f"{adaround.lr:g}" if adaround.enabled else "-",
                    "activation scales, a block": acts.iters if acts.enabled else 0,
                    "TLA": tuning.tla_iters if config.te == "finetune" else 0,
                    "CMA": tuning.cma_iters if tuning.cma_layers != "none" else 0,
                }
            )
        return pd.DataFrame(lines)

    def sampling(self) -> str:
        """The first row's model, and how it is sampled."""
        setting = self.plan.setting(self.plan.rows[0])
        return f"{setting.model} {setting.sampling}"

    def layer_kinds(self) -> dict[str, int]:
        """Number of layers of each kind in the first row's denoiser."""
        unet = unet_of(load(self.plan.setting(self.plan.rows[0]).model)[0])
        kinds = (layer_kind(unet.get_submodule(n), role) for n, role in layer_roles(unet).items())
        return dict(Counter(kinds))

    # ---- the run ----

    def execute(self) -> None:
        """Make all rows, with a progress bar, and write the table's files.

        With `STORED = True` nothing is made and nothing is written.
        """
        if self.plan.choices.stored:
            self._results = TableResults.stored(self.plan)
        else:
            chosen_device(self.plan.choices.device)
            if self.plan.choices.jobs > 1:
                make_seeds(self.plan)
            for row in tqdm(self.plan.rows, desc=self.plan.table.name):
                run_row(row, self.plan)
            self._results = report.finish(self.plan)
        counts = (f"{count} {status}" for status, count in self.statuses().items())
        print(f"{len(self.plan.rows)} rows: {', '.join(counts)}")

    @property
    def results(self) -> TableResults:
        """Results of the whole table; before `execute`, as the files have them."""
        return self._results or TableResults.stored(self.plan)

    def statuses(self) -> dict[str, int]:
        """Number of the asked rows by what became of them."""
        return dict(Counter(str(self.results[row.id].status) for row in self.plan.rows))

    # ---- what it gave ----

    def rows(self) -> pd.DataFrame:
        """Our numbers: mean ± standard deviation over the seeds."""
        return report.frame(self.results)

    def verdicts(self) -> pd.DataFrame:
        """Paper and ours side by side, with the verdict on each row."""
        return report.side_by_side(self.results)

    def agreement(self) -> Markdown:
        """How the numbers of your own run compare with the published ones."""
        found = compare_with_published(self.results)
        return Markdown("These are the published numbers." if found is None else found.markdown())

    def findings(self) -> Markdown:
        """What the numbers say, in words that the numbers choose."""
        return Markdown(what_we_see.of_table(self.results))

    def conditions(self) -> None:
        """Print how the numbers were made, why rows have none, at which commits; and the signs."""
        results = self.results
        lines = [report.conditions(results), *report.reasons(results), report.made_by(results)]
        print("\n".join([*lines, f"{LEGEND}."]))

    def metric_figure(self, metric: str = "fid", dataset: str | None = None) -> Figure:
        """The paper's numbers and those from here, each row a dot with its spread.

        Args:
            dataset: only rows of this data set; None: all.
        """
        return plots.metric_figure(self.results, metric, report.HEADS[metric], dataset)

    def cost_figure(self) -> Figure:
        """Minutes of the quantizing stages."""
        return plots.cost_figure(self.results)

    def rows_figure(self, base: str) -> Figure:
        """FID (CLIP score of prompts) and distance of the base's data; a line marks the base."""
        return plots.rows_figure(self.results, base)

    def difference_figure(self, base: str) -> Figure:
        """What each change of the row `base` does: differences from it, sorted."""
        return plots.difference_figure(self.results, base)

    def sensitivity_figure(self) -> Figure:
        """FID and distance to full precision over activation bits, a line a kind of layer."""
        return plots.sensitivity_figure(self.results)

    def budget_figure(self) -> Figure:
        """Distance to full precision over iterations and over minutes, a line a preset."""
        return plots.budget_figure(self.results)

    def picture(self) -> Figure:
        """Samples of the table's chosen rows, all from the same noise."""
        return strips.picture(self.results)

    def input_ranges(self) -> figure2.InputRanges:
        """Figure 2: what layers receive. The rows must have been run, by `execute` for example."""
        return figure2.InputRanges(self.plan)
