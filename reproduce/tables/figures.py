"""Figures 2 and 3 as tables.

Figure 2: what finetuning does to activations. Figure 3: which kind of layer suffers from few
activation bits.
"""

from __future__ import annotations

from reproduce.tables.base import Row, Table
from reproduce.tables.methods import full_precision

FIGURE2 = Table(
    name="figure2",
    title="Figure 2: activations before and after finetuning, W4A4",
    notebook="figure02_activations.ipynb",
    opens_checkpoints=True,
    rows=(
        full_precision("bedrooms", None),
        *(
            Row(
                id=f"w4a4-{row}",
                label=label,
                preset="quest",
                weight_bits=4,
                act_bits=4,
                overrides=overrides,
                against=against,
            )
            for row, label, overrides, against in (
                ("before", "before finetuning", dict(tla_iters=0, cma_iters=0), "bedrooms-fp"),
                ("after", "after finetuning", {}, "w4a4-before"),
            )
        ),
    ),
    picture=("bedrooms-fp", "w4a4-before", "w4a4-after"),
    note="The paper shows two layers without naming them: their ranges go from [-10, 34] to [-4, "
    "14] and from [-11, 20] to [-4, 4], their standard deviations from 0.171 to 0.157 and "
    "from 0.073 to 0.071. It reports no metric here.",
)

# Kinds of layers (`QuantConfig.act_layers`), and their names in the paper.
KINDS = {
    "feed_forward": "feed-forward layers",
    "linear": "all other linear layers",
    "conv": "convolutions",
}
BITS = (8, 6, 4)
FIGURE3 = Table(
    name="figure3",
    title="Figure 3: sensitivity of layer types to activation bits",
    notebook="figure03_sensitivity.ipynb",
    rows=(
        full_precision("imagenet", None),
        *(
            Row(
                id=f"a{bits}-{kind}",
                label=label,
                preset="quest-paper",
                weight_bits=16,
                act_bits=bits,
                dataset="imagenet",
                overrides=dict(act_layers=kind, tla_iters=0, cma_iters=0),
                against="imagenet-fp",
            )
            for kind, label in KINDS.items()
            for bits in BITS
        ),
    ),
    picture=("imagenet-fp", *(f"a{bits}-{kind}" for kind in KINDS for bits in (6, 4))),
    note="The paper gives a picture and no numbers: feed-forward activations fail at 6 bits, all "
    "other linear layers (5 times as many) hardly fail at 4, convolutions (3 times as many) "
    "fail only at 4. Here the inputs of one kind of layer are quantized (one range a "
    "tensor, by squared error), all else stays in full precision; class-conditional model, "
    "the only one of the LDMs with feed-forward layers.",
)
