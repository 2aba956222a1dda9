"""The closing card of a training run: how good the model is, beside what tables of counts reach, how fast it went, and what to do next."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.text import Text

from sickbay.reference.evaluation.evaluation import Baselines, Evaluation, Manner
from sickbay.reference.evaluation.outlook import Outlook

MAX_LINES = 30
PLAIN_WIDTH = 100
LEAST_WIDTH = 40
BAR = 26  # columns of the longest bar
SAMPLE_LINES = 7
ADVICE = {
    "helps": "yes",
    "little": "hardly; a larger model (--dim, --layers) or more text may",
    "overfits": "no, it only learns its text by heart; more text, --dropout or fewer steps help",
    "schedule over": "not at this learning rate",
    "not known": "not known",
}
STYLE = {"helps": "bold green", "little": "bold yellow", "overfits": "bold red", "schedule over": "bold yellow", "not known": "bold"}


@dataclass(frozen=True)
class Sample:
    """`text` written after `prompt`, and the manner of it."""

    prompt: str
    text: str
    manner: Manner


@dataclass(frozen=True)
class Closing:
    """All that the card tells. `parameters`: trained numbers; `tokens_per_step`, `seconds` and `tokens_per_second` of the training alone.

    `flops_per_second`: achieved by the training; `peak_flops`: of this machine's matrix product, NaN where it was not measured.
    `ways_on`: (command, what it does).
    """

    title: str
    parameters: int
    steps: int
    tokens_per_step: int
    seconds: float
    tokens_per_second: float
    flops_per_second: float
    peak_flops: float
    validation: Evaluation
    bytes_per_token: float
    baselines: Baselines
    sample: Sample | None
    outlook: Outlook
    ways_on: Sequence[tuple[str, str]]


def show(closing: Closing, file: TextIO | None = None) -> None:
    """The card is on `file` (default stdout): coloured on a terminal, plain text in the file's own characters anywhere else."""
    file = file if file is not None else sys.stdout
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if console.is_terminal and console.encoding.startswith("utf"):
        for line in lines(closing, max(LEAST_WIDTH, console.width - 1)):  # a full last column makes some terminals wrap
            console.print(line, soft_wrap=True)
        return
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(plain(closing).encode(encoding, "backslashreplace").decode(encoding))


def plain(closing: Closing, width: int = PLAIN_WIDTH) -> str:
    """The card without colours and drawn blocks."""
    return "".join(line.plain.rstrip().replace("█", "#") + "\n" for line in lines(closing, width))


def lines(closing: Closing, width: int = PLAIN_WIDTH) -> list[Text]:
    """The card's lines, at most 30; only commands may be wider than `width`, so that they can be copied."""
    width = max(LEAST_WIDTH, width)
    head = [
        Text.assemble(("sickbay train  ", "bold"), cut(closing.title, width - 15)),
        Text(cut(_size(closing), width), style="dim"),
        Text(),
        Text.assemble(("validation loss ", ""), (f"{closing.validation.loss:.4f}", "bold"), cut(_loss(closing), width - 22)),
        *_standing(closing, width),
        Text(),
        *_wrapped("speed          ", _speed(closing), width),
        *_wrapped("train longer?  ", f"{ADVICE[closing.outlook.verdict]}: {closing.outlook.reason}", width, STYLE[closing.outlook.verdict]),
    ]
    foot = [Text(), *(Text.assemble((command, "bold cyan"), (f"   # {meaning}", "dim")) for command, meaning in closing.ways_on)]
    middle = [] if closing.sample is None else [Text(), *_sample(closing.sample, width)]
    return [*head, *middle[: max(0, MAX_LINES - len(head) - len(foot))], *foot][:MAX_LINES]


def _size(closing: Closing) -> str:
    done = f"{closing.steps:,} steps of {closing.tokens_per_step:,} tokens"
    return f"{quantity(closing.parameters)} parameters, {done}, {closing.seconds:,.0f} s"


def _loss(closing: Closing) -> str:
    validation = closing.validation
    bits = validation.bits_per_byte(closing.bytes_per_token)
    noise = "" if math.isnan(validation.error) else f" +- {validation.error:.4f}"
    return f"{noise} nats per token over {validation.tokens:,}, perplexity {validation.perplexity:,.2f}, {bits:.3f} bits per byte"


def _standing(closing: Closing, width: int) -> list[Text]:
    """Where the loss stands among the baselines, the worst first."""
    own, tables = closing.validation.loss, closing.baselines
    rows = [
        ("uniform", tables.uniform, "dim"),
        ("unigram", tables.unigram, "dim"),
        ("bigram", tables.bigram, "dim"),
        ("trigram", tables.trigram, "dim"),
        ("this model", own, "bold green" if own < tables.trigram else "bold red"),
    ]
    rows.sort(key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf)
    longest = max((value for _, value, _ in rows if math.isfinite(value)), default=1.0)
    found = []
    for name, value, style in rows:
        filled = round(BAR * value / longest) if math.isfinite(value) and longest > 0 else 0
        bits = value / math.log(2) / closing.bytes_per_token
        note = f"  {bits:.3f} bits per byte" + (f", {_beaten(own, tables)}" if name == "this model" else "")
        found.append(Text.assemble(f"  {name:<11}", f"{value:7.4f} ", ("█" * filled, style), (cut(note, width - 21 - filled), "dim")))
    return found


def _beaten(own: float, tables: Baselines) -> str:
    for name, value in (("trigram", tables.trigram), ("bigram", tables.bigram), ("unigram", tables.unigram), ("uniform", tables.uniform)):
        if own < value:
            return f"{value - own:.3f} below the {name} table" if name != "uniform" else f"{value - own:.3f} below an even guess"
    return "no better than an even guess"


def _speed(closing: Closing) -> str:
    said = f"{closing.tokens_per_second:,.0f} tokens/s, {quantity(closing.flops_per_second)}FLOP/s"
    if not closing.peak_flops > 0:
        return said
    share = closing.flops_per_second / closing.peak_flops
    return f"{said}: {share:.0%} of this machine's matrix product ({quantity(closing.peak_flops)}FLOP/s), its MFU"


def _sample(sample: Sample, width: int) -> list[Text]:
    manner = sample.manner
    distinct = " ".join(f"{own:.2f}" for own in manner.distinct)
    usual = " ".join(f"{own:.2f}" for own in manner.usual)
    repeats = "" if manner.repeats is None else f"; {manner.repeats:.0%} of it repeats itself more than almost all of the text does"
    loop = f"; {manner.loop[0]} tokens loop with period {manner.loop[1]}" if manner.loop[0] >= 3 * manner.loop[1] > 0 else ""
    written = [printable(part) for part in (sample.prompt + sample.text).strip("\n").split("\n")]
    wrapped = [piece for part in written if part.strip() for piece in textwrap.wrap(part, width - 4) or [""]]
    return [
        Text("sample"),
        *(Text.assemble(("  | ", "dim"), piece) for piece in wrapped[:SAMPLE_LINES]),
        *(
            Text(line, style="dim")
            for line in textwrap.wrap(f"distinct 1-, 2-, 3-grams {distinct}, in the text {usual}{repeats}{loop}", width)
        ),
    ]


def _wrapped(label: str, text: str, width: int, style: str = "") -> list[Text]:
    first, *rest = textwrap.wrap(text, width - len(label))
    return [Text.assemble(label, (first, style)), *(Text(" " * len(label) + line, style=style) for line in rest)]


def quantity(number: float) -> str:
    """1,234,567 as "1.23 M"; a space and no letter below a thousand."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g} "


def cut(text: str, width: int) -> str:
    """`text` within `width` columns."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def printable(text: str) -> str:
    """`text` without what a terminal would obey instead of show."""
    return "".join(each if each.isprintable() else " " if each == "\t" else ascii(each)[1:-1] for each in text)
