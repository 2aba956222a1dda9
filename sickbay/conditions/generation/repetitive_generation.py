"""Generated text says the same thing again and again, far more than the text the model learned from.

Looks like
    "The cat cat cat cat": a word, a phrase or a paragraph comes back without end, while the loss is as low as it should be.

Why
    The likeliest next token is taken every time (greedy decoding, a very low temperature): after a repetition the model, which has learned
    that text goes on as it did, finds the next one likelier still. A model trained too little, or on repeated documents, does it sooner.

Tell apart
    A text that repeats itself by nature (tables, verses, a copying task) is its own measure: the training batches are compared with.
    incoherent-generation is the opposite: too much chance, not too little. A model whose loss has hardly fallen is undertrained-model.

Cure
    Draw the next token at a temperature of 0.7 to 1, from the likeliest ones (top-k, top-p); penalise tokens already said, on
    log-probabilities and once for each distinct token (on raw logits the penalty raises those below zero). Train longer; learn an end
    token and stop there.

Sources
    guide, "Generation Issues: Greedy Decoding, No Repetition Penalty"; Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration", arXiv 1904.09751; Welleck et al. 2020, arXiv 1908.04319; transformers issue 2302 (a penalty that divides logits).
"""

from __future__ import annotations

import statistics
from typing import Any

from sickbay.core.chart import Chart, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SHARE = Threshold(0.5, "share of stretches", source="calibration: text drawn at temperature 0.7 to 1 stays below 0.15, loops exceed 0.6")
LATE = Threshold(0.5, "share of steps", source="a sample drawn in the first half of training shows a model that is not finished")
LEARNED = Threshold(0.9, "share of chance loss", source="above it the model has learned little more than which tokens are frequent")
END = Threshold(0.98, "share of steps", source="text that training goes on after shows how far the model has come, not its product")
GREEDY = Threshold(0.9, "share of tokens", source="at temperature 0.3 a trained model takes its first choice about so often")
LAST_STEPS = 2  # the evaluation before the last step is the last one


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Most stretches of the text generated late in training repeat more than 99 of 100 stretches of the training text."""
    late = chart["generated_repetition"].finite().between(int(LATE * chart.last_step), chart.last_step)
    if not late:
        return NotExamined("text was generated only in the first half of training")
    if reason := _hardly_learned(chart):
        return NotExamined(reason)
    if statistics.median(late.values) < SHARE:
        return None
    worst = max(late, key=lambda reading: (reading.value, reading.step))
    greedy = float(worst.note.get("greedy") or 0) >= GREEDY
    loop, period = float(worst.note["loop"]), float(worst.note["period"])
    how = f", its longest loop {loop:.0f} tokens with a period of {period:.0f}" if loop else ""
    why = "; every token is the model's first choice (greedy decoding)" if greedy else ""
    glimpse = late[-1].step < min(END * chart.last_step, chart.last_step - LAST_STEPS)
    return Diagnosis(
        summary=f"{worst.value:.0%} of the generated text repeats itself more than 99 of 100 stretches of the training text do{how}{why}.",
        evidence=(Evidence(worst, SHARE),),
        severity="note" if glimpse else "warning",
        step=worst.step,
        source=worst.source,
        seconds=worst.seconds,
        prescribes="sample-with-temperature" if greedy or worst.note.get("greedy") is None else "penalise-repetition",
    )


def _hardly_learned(chart: Chart) -> str:
    """Why the model is not one to judge decoding by; "" if it is."""
    losses, chance = chart["loss"], chart["chance_loss"].finite()
    newest: Series = losses.between(int((1 - LATE / 2) * chart.last_step), chart.last_step)
    if newest and not newest.finite():
        return "the loss is not finite"
    if newest and chance and newest.median() > LEARNED * chance[0].value:
        return f"the loss is still {newest.median():.3g} where a uniform guess has {chance[0].value:.3g}: the model has hardly learned"
    return ""


def inject(case: Any) -> Any:
    """Text is generated after training, the likeliest token each time."""

    def generate_greedily(case: Any, model: Any) -> float:
        import torch

        model.eval()
        ids = case.corpus[:8][None]
        with torch.no_grad():
            for _ in range(120):
                ids = torch.cat((ids, model(ids[:, -case.config.context :])[:, -1:].argmax(-1)), dim=1)
        model.train()
        return 0.0

    return case.but(evaluate=generate_greedily, steps=200, eval_every=100, learning_rate=3e-3)


condition = Condition(
    id="repetitive-generation",
    symptom="generated text repeats itself far more than the training text does",
    needs=("generated_repetition",),
    uses=("loss", "chance_loss"),
    diagnose=diagnose,
    prescribes=("sample-with-temperature", "penalise-repetition"),
    inject=inject,
)
