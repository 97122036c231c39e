"""The integer form of an attention: the grids of its four operands, for any engine.

    scores = base_q base_k sum_c q_c k_c
    out_c = base_p base_v 2^{e_c} sum_m p_m v_mc

p are the codes of the softmax's output, which is unsigned with zero point 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from questlib.config import OFF
from questlib.errors import EngineError
from questlib.integer.form import Grid, act_grids
from questlib.quantization.attention import QuantAttnProcessor

Operands = tuple[Grid, Grid, Grid, Grid]  # of q, k, v and the softmax's output


class AttentionForm(NamedTuple):
    """Grids of q, k, v and the softmax's output, and the shift of v's channels."""

    name: str
    grids: tuple[Operands, ...]  # [step group]
    v_shift: torch.Tensor  # int64 [C]: e, applied to the output's channels
    format: str  # for reports


def attention_form(processor: QuantAttnProcessor, name: str) -> AttentionForm:
    """The integer form of an attention.

    Raises:
        EngineError: it has none; the message names it.
    """
    acts = (processor.q, processor.k, processor.v, processor.probs)
    if off := [act.name for act in acts if not act.enabled or act.bits == OFF]:
        raise EngineError(
            f"{name}: expected quantized q, k, v and softmax output; "
            f"not quantized: {', '.join(off)}"
        )
    tables = [
        act_grids(act, torch.zeros(len(act.index), dtype=torch.int64), act.name) for act in acts
    ]
    q, k, v, probs = ([group[0] for group in grids] for grids, _ in tables)
    q_shift, k_shift, v_shift, _ = (shift for _, shift in tables)
    if bool(q_shift.any() or k_shift.any()):
        raise EngineError(f"{name}: shifts 2^e of q and k have no room in their product")
    bits = [act.bits for act in acts]
    words = f"A{bits[0]} q k^T, A{bits[3]} x A{bits[2]} probs v"
    return AttentionForm(name, tuple(zip(q, k, v, probs, strict=True)), v_shift, words)
