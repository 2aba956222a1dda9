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
from sickbay.reference.evaluation.guesses import Guesses, Shown
from sickbay.reference.evaluation.outlook import Outlook

MAX_LINES = 30
PLAIN_WIDTH = 100
LEAST_WIDTH = 40
BAR = 26  # columns of the longest bar
SAMPLE_LINES = 7
SHOWN_LINES = 3  # of each of its parts
BEATEN = {
    "uniform": "an even guess",
    "unigram": "the unigram table",
    "bigram": "the bigram table",
    "trigram": "the trigram table",
    "other source": "its loss with another row's source",
}
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

    `flops_per_second`: achieved by the training; `peak_flops`: of this machine's matrix product; NaN where it was not measured.
    `bytes_per_token`: None where the targets are not the text. `asked`: what they are, in a word. `ways_on`: (command, what it does).
    """

    title: str
    parameters: int
    steps: int
    tokens_per_step: float
    seconds: float
    tokens_per_second: float
    flops_per_second: float
    peak_flops: float
    validation: Evaluation
    bytes_per_token: float | None
    baselines: Baselines | Guesses
    sample: Sample | Shown | None
    outlook: Outlook
    ways_on: Sequence[tuple[str, str]]
    asked: str = "token"


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
        *_instead(closing, width),
        Text(),
        *_wrapped("speed          ", _speed(closing), width),
        *_wrapped("train longer?  ", f"{ADVICE[closing.outlook.verdict]}: {closing.outlook.reason}", width, STYLE[closing.outlook.verdict]),
    ]
    foot = [Text(), *(Text.assemble((command, "bold cyan"), (f"   # {meaning}", "dim")) for command, meaning in closing.ways_on)]
    sample = closing.sample
    middle = [] if sample is None else [Text(), *(_sample(sample, width) if isinstance(sample, Sample) else _shown(sample, width))]
    return [*head, *middle[: max(0, MAX_LINES - len(head) - len(foot))], *foot][:MAX_LINES]


def _size(closing: Closing) -> str:
    done = f"{closing.steps:,} steps of {closing.tokens_per_step:,.0f} tokens"
    return f"{quantity(closing.parameters)} parameters, {done}, {closing.seconds:,.0f} s"


def _loss(closing: Closing) -> str:
    validation = closing.validation
    per_byte = closing.bytes_per_token
    bits = "" if per_byte is None else f", {validation.bits_per_byte(per_byte):.3f} bits per byte"
    noise = "" if math.isnan(validation.error) else f" +- {validation.error:.4f}"
    return f"{noise} nats per {closing.asked} over {validation.tokens:,}, perplexity {validation.perplexity:,.2f}{bits}"


def _standing(closing: Closing, width: int) -> list[Text]:
    """Where the loss stands among the baselines, the worst first."""
    own, tables = closing.validation.loss, closing.baselines
    others = tables.rows()
    rows = [
        *((name, value, "dim") for name, value in others),
        ("this model", own, "bold green" if own < min(value for _, value in others) else "bold red"),
    ]
    width_of_names = max(len(name) for name, _, _ in rows) + 1
    rows.sort(key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf)
    longest = max((value for _, value, _ in rows if math.isfinite(value)), default=1.0)
    found = []
    for name, value, style in rows:
        filled = round(BAR * value / longest) if math.isfinite(value) and longest > 0 else 0
        notes = [] if closing.bytes_per_token is None else [f"{value / math.log(2) / closing.bytes_per_token:.3f} bits per byte"]
        notes += [_beaten(own, others)] if name == "this model" else []
        note = "  " + ", ".join(notes)
        bar = Text("█" * filled, style)
        room = width - 10 - width_of_names - filled
        found.append(Text.assemble(f"  {name:<{width_of_names}}", f"{value:7.4f} ", bar, (cut(note, room), "dim")))
    return found


def _beaten(own: float, others: Sequence[tuple[str, float]]) -> str:
    """By how much `own` is below the lowest of `others` that it is below."""
    for name, value in sorted(others, key=lambda row: row[1]):
        if own < value:
            return f"{value - own:.3f} below {BEATEN[name]}"
    return "no better than an even guess"


def _instead(closing: Closing, width: int) -> list[Text]:
    """Where tables of n-grams do not apply: that they do not, and how often the model is right."""
    guesses = closing.baselines
    if not isinstance(guesses, Guesses):
        return []
    right = f"{closing.validation.accuracy:.1%} of the {closing.asked}s, always the commonest {guesses.commonest:.1%}"
    return [
        Text.assemble("right          ", (cut(right, width - 15), "bold")),
        Text(cut(f"no n-gram tables: {guesses.why}, they know what came before alone", width), style="dim"),
    ]


def _speed(closing: Closing) -> str:
    said = f"{closing.tokens_per_second:,.0f} tokens/s"
    if math.isnan(closing.flops_per_second):
        return said
    said += f", {quantity(closing.flops_per_second)}FLOP/s"
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
    return [
        Text("sample"),
        *_quoted(sample.prompt + sample.text, width, SAMPLE_LINES),
        *(
            Text(line, style="dim")
            for line in textwrap.wrap(f"distinct 1-, 2-, 3-grams {distinct}, in the text {usual}{repeats}{loop}", width)
        ),
    ]


def _shown(shown: Shown, width: int) -> list[Text]:
    said = (("sample", shown.read), ("the model", shown.written), ("was", shown.right))
    return [line for label, text in said for line in (Text(label), *_quoted(text, width, SHOWN_LINES))]


def _quoted(text: str, width: int, most: int) -> list[Text]:
    written = [printable(part) for part in text.strip("\n").split("\n")]
    wrapped = [piece for part in written if part.strip() for piece in textwrap.wrap(part, width - 4) or [""]]
    return [Text.assemble(("  | ", "dim"), piece) for piece in wrapped[:most]]


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
