"""What the embedded models show: questions, each answered by comparisons of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reproduce.reporting import report
from reproduce.reporting.claims import BEDROOMS, CLAIMS, SD, Claim, Data, Holds, judge
from reproduce.reporting.overview import SIGNS
from reproduce.table_results import TableResults
from reproduce.tables.after_paper import LATER, with_quest
from reproduce.tables.budget import row_id
from reproduce.tables.methods import QUEST, W4A4, name


@dataclass(frozen=True)
class Question:
    """A question to the results."""

    asked: str
    about: str
    """What is compared, and why. It must be true whatever the numbers say."""

    claims: tuple[Claim, ...]
    yes_or_no: bool = True
    """Whether the claims answer it together. Otherwise each is an answer of its own."""


def _ablation(better: str, other: str, text: str) -> Claim:
    """One row of the ablation against another."""
    return Claim(text, "Ablation", "ablation", ((f"w4a4-{better}", f"w4a4-{other}"),))


def _budget(better: tuple[str, str], other: tuple[str, str], text: str) -> Claim:
    """One row of the budget's table against another; each a method and its budget."""
    return Claim(text, "Budget", "budget", ((row_id(*better), row_id(*other)),))


def _later(better: str, other: str, text: str, data: Data) -> Claim:
    """One preset of the table of later methods against another."""
    pair = (name(data.prefix, W4A4, better), name(data.prefix, W4A4, other))
    return Claim(f"{text}, {data.words}", "After the paper", "after-paper", (pair,), data.metrics)


def _papers(*prefixes: str) -> tuple[Claim, ...]:
    """The paper's claims that begin so."""
    return tuple(claim for claim in CLAIMS if claim.text.startswith(prefixes))


QUESTIONS = (
    Question(
        "Does `quest` beat Q-Diffusion at 4 bits on every model?",
        "Five embedded models stand in for the paper's: VQ and KL latents, labels with guidance, "
        "prompts, and pixels.",
        _papers("QuEST beats Q-Diffusion at W4A4"),
    ),
    Question(
        "Do the text's own settings?",
        "`quest-paper` takes the inputs of the first and last layer to 4 bits, as the text has it; "
        "every baseline keeps 8 there. The last line says what that alone does to `quest`. Its "
        "learning rates are made for many more iterations than two cores allow.",
        (
            *_papers("QuEST by the text's settings"),
            _ablation("quest", "first-last-4", "8 bits there beat 4, all else as in `quest`"),
        ),
    ),
    Question(
        "Does `quest` beat EfficientDM?",
        "EfficientDM trains low-rank updates of all layers, with scales for each step, for more "
        "iterations.",
        _papers("QuEST beats EfficientDM"),
    ),
    Question(
        "Is it finetuning that does the work?",
        "The second row leaves both stages out. Calibration, ranges and AdaRound are the same.",
        (_ablation("quest", "not-finetuned", "`quest` beats `quest` without finetuning"),),
    ),
    Question(
        "Is it enough to finetune few layers?",
        "In the ablation the iterations are the same. Full finetuning in Table 8 also has one set "
        "of scales over time and one scale a tensor.",
        (
            _ablation("quest", "all-layers", "The selected layers beat all layers"),
            *_papers("QuEST beats finetuning all weights"),
        ),
    ),
    Question(
        "Do both losses help?",
        "Both stages have a local loss, layer by layer, and the global loss on the model's output. "
        "`quest` weighs the global loss by 20, the paper by 2.",
        (
            *_papers("The global loss helps", "For TLA both losses"),
            _ablation("quest", "global", "Both losses beat the global loss alone, in both stages"),
            _ablation("quest", "global-2", "Weight 20 of the global loss beats weight 2"),
        ),
    ),
    Question(
        "What does it cost to run in integers?",
        "`quest` has carrier scales, which integer units apply exactly. Free scales per channel, "
        "as in the official release, have no integer form. A grid a token has one, too.",
        (
            _ablation("channel", "quest", "Free scales per channel beat carrier scales"),
            _ablation("quest", "tensor", "Carrier scales beat one scale a tensor"),
            _ablation("token", "quest", "A grid a token beats carrier scales"),
        ),
        yes_or_no=False,
    ),
    Question(
        "How many sets of scales over time does it need?",
        "`quest` has four groups of steps, each with scales of its own.",
        (
            _ablation("quest", "one-group", "Four groups beat one"),
            _ablation("all-steps", "quest", "A set for each step beats four groups"),
        ),
        yes_or_no=False,
    ),
    Question(
        "What else is worth its cost?",
        "One change of `quest` a line.",
        (
            _ablation("quest", "nearest", "AdaRound beats rounding to nearest"),
            _ablation("quest", "calib-16", "Ranges from 64 samples beat ranges from 16"),
            _ablation("long", "quest", "More iterations of CMA beat the budget"),
            _ablation("softmax-16", "quest", "Softmax in full precision beats 8 bits"),
            _ablation("quest", "softmax-4", "Softmax at 8 bits beats 4"),
            _ablation("norm4", "quest", "Ranges by the fourth power beat squared error"),
        ),
        yes_or_no=False,
    ),
    Question(
        "Is the small budget to blame?",
        "Each method at a tenth of the iterations of `mini` scale, at these, and at ten times as "
        "many; then the methods against each other at ten times as many.",
        (
            *(
                _budget((method, more), (method, less), f"{name}: {words}")
                for method, name in (
                    ("quest", "`quest`"),
                    ("quest-paper", "`quest-paper`"),
                    ("q-diffusion", "Q-Diffusion"),
                    ("efficientdm", "EfficientDM"),
                    ("full-finetune", "Full finetuning"),
                )
                for more, less, words in (
                    ("", "tenth", "the budget beats a tenth of it"),
                    ("tenfold", "", "ten times the budget beats it"),
                )
            ),
            *(
                _budget(
                    (ours, "tenfold"),
                    (other, "tenfold"),
                    f"`{ours}` beats {name} at ten times the budget",
                )
                for ours in ("quest-paper", "quest")
                for other, name in (("q-diffusion", "Q-Diffusion"), ("efficientdm", "EfficientDM"))
            ),
        ),
        yes_or_no=False,
    ),
    Question(
        "Do later methods make QuEST's finetuning unnecessary?",
        "SVDQuant, Hadamard rotation and MixDQ change how a layer is quantized, and train nothing "
        "but AdaRound's roundings. QuEST beside them, and its finetuning on top of each.",
        tuple(
            claim
            for data in (BEDROOMS, SD)
            for method, label in LATER.items()
            for claim in (
                _later(QUEST, method, f"`quest` beats {label}", data),
                _later(with_quest(method), method, f"Finetuning improves {label}", data),
                _later(with_quest(method), QUEST, f"{label} improves `quest`", data),
            )
        ),
        yes_or_no=False,
    ),
    Question(
        "Must the time embedding be precise?",
        "The paper's Property 1.",
        _papers("Time-embedding layers", "Finetuned time-embedding"),
    ),
    Question(
        "Which layers suffer first?",
        "The paper's Figure 3: the inputs of one kind of layer are quantized, all else is not.",
        _papers("At 6 bits", "At 4 bits"),
        yes_or_no=False,
    ),
    Question(
        "Is it cheaper?",
        "Time is that of one thread on two cores, from calibration to the end of finetuning. The "
        "paper trains few of the weights; attention is a larger share of these small models.",
        _papers("All of QuEST takes less", "QuEST takes less time"),
    ),
)


def answers(folder: Path) -> str:
    """Every question with its answer and the numbers."""
    results = report.all_committed(folder)
    return "\n\n".join(_answer(question, results) for question in QUESTIONS)


def _answer(question: Question, results: Mapping[str, TableResults]) -> str:
    judged = [(claim, judge(claim, results)) for claim in question.claims]
    holds = {judgement.holds for _, judgement in judged}
    if not question.yes_or_no:
        answer = ""
    elif holds == {Holds.HOLDS}:
        answer = "Yes."
    elif holds == {Holds.NOT_RUN}:
        answer = "Not run."
    elif holds <= {Holds.UNCLEAR, Holds.NOT_RUN}:
        answer = "No clear difference."
    elif holds <= {Holds.NOT, Holds.UNCLEAR, Holds.NOT_RUN}:
        answer = "No."
    else:
        answer = "In part."
    lines = [
        f"- {SIGNS[judgement.holds]} {claim.text} "
        f"([{claim.where}](docs/results/{claim.table}.md)): {judgement.details}"
        for claim, judgement in judged
    ]
    return "\n\n".join(
        [
            f"## {question.asked}",
            f"**{answer}** {question.about}" if answer else question.about,
            "\n".join(lines),
        ]
    )
