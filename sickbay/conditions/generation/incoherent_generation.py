"""Generated text is gibberish although the model has learned: chance has too large a part in choosing the tokens.

Looks like
    Letters or words in no order, which the model itself finds unlikely, while training and validation loss are low.

Why
    The temperature is too high (logits multiplied by it instead of divided, a probability sampled after a second softmax, no top-k or
    top-p), or the weights that generate are not those that were trained: made anew, loaded in part, an average never updated.

Tell apart
    undertrained-model has a high loss, and its text is as bad as the loss says. generation-path-mismatch has the right weights in the
    wrong function. repetitive-generation has too little chance.

Cure
    Divide the logits by a temperature of 0.7 to 1 and keep the likeliest tokens (top-k 40 to 50, or top-p 0.9); generate with the
    trained weights, in evaluation mode.

Sources
    guide, "Generation Issues: Temperature Sampling, Top-k and Top-p"; Holtzman et al. 2020, arXiv 1904.09751, section 5; Ackley, Hinton &
    Sejnowski 1985 (temperature). The surprise of a token drawn at temperature 1 is on average the entropy of its distribution.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading, Series
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

HOT = Threshold(1.5, "temperature", source="usual settings end at 1.2; the guide calls 2.0 creative, and it is gibberish for small models")
LEAD = Threshold(10.0, "nats", source="odds of 22,000 to 1 against temperature 1")
WORSE = Threshold(0.5, "nats per token", source="1.6 times the perplexity: seeds and prompts vary by 0.2")
FOREIGN = Threshold(
    1.5, "nats per token", source="4.5 times as uncertain as in training; over-fitted models on new text differ by less than 1"
)
LATE = Threshold(0.5, "share of steps", source="a sample drawn in the first half of training shows a model that is not finished")
LEARNED = Threshold(0.9, "share of chance loss", source="above it the model has learned little more than which tokens are frequent")
MEAN = Threshold(1.5, "share of chance loss", source="a first loss above it is a sum, or of a model that is sick otherwise")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The newest text is far from the training text, and either drawn hot or by a model that knows far less than the trained one."""
    chosen = chart["sampling_temperature"].finite().between(int(LATE * chart.last_step), chart.last_step)
    text = {(r.step, r.source): r for r in chart["generated_cross_entropy"].finite()}
    pairs = [(r, text[r.step, r.source]) for r in chosen if (r.step, r.source) in text]
    loss = _training_loss(chart)
    if not pairs or loss is None:
        return NotExamined("no text was generated late enough by a model whose training loss is known and has fallen")
    for newest, written in reversed(pairs):
        excess = written.value - float(written.note["usual"])
        surprise, entropy = float(newest.note["surprise"]), float(newest.note["entropy"])
        hot = newest.value >= HOT and float(newest.note["lead"]) >= LEAD and surprise - loss >= WORSE
        if hot and excess >= WORSE:
            return _found(newest, written, HOT, f"as if at temperature {newest.value:.3g}", surprise, loss)
        if entropy - loss >= FOREIGN and excess >= FOREIGN:
            return _found(written, newest, FOREIGN + float(written.note["usual"]), "by weights unlike the trained ones", surprise, loss)
    return None


def _training_loss(chart: Chart) -> float | None:
    """The larger of training and validation loss at the end, nats per token; None where it is no mean or has hardly fallen."""
    losses, chance = chart["loss"].finite(), chart["chance_loss"].finite()
    if not losses or not chance or losses[0].value > MEAN * chance[0].value:
        return None
    newest: Series = losses.between(int((1 - LATE / 2) * chart.last_step), chart.last_step)
    value = max([newest.median(), *chart["eval_loss"].finite().values[-1:]])
    return value if value < LEARNED * chance[0].value else None


def _found(first: Reading, second: Reading, limit: float, how: str, surprise: float, loss: float) -> Diagnosis:
    return Diagnosis(
        summary=f"The generated text is drawn {how}: its tokens cost {surprise:.3g} nats each by the generating model's own logits, where "
        f"training came to {loss:.3g}.",
        evidence=(Evidence(first, limit), Evidence(second)),
        severity="warning",
        step=first.step,
        source=first.source,
        certainty="confirmed" if limit == HOT else "likely",
        seconds=first.seconds,
    )


def inject(case: Any) -> Any:
    """Text is generated after training at temperature 4."""

    def generate_hot(case: Any, model: Any) -> float:
        import torch

        model.eval()
        random, ids = torch.Generator().manual_seed(case.seed), case.corpus[:8][None]
        with torch.no_grad():
            for _ in range(120):
                logits = model(ids[:, -case.config.context :])[:, -1] / 4.0
                ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=random)), dim=1)
        model.train()
        return 0.0

    return case.but(evaluate=generate_hot, steps=200, eval_every=100, learning_rate=3e-3)


condition = Condition(
    id="incoherent-generation",
    symptom="generated text is gibberish although the model's loss is low",
    needs=("sampling_temperature", "generated_cross_entropy"),
    uses=("loss", "eval_loss", "chance_loss"),
    diagnose=diagnose,
    prescribes=("lower-temperature",),
    inject=inject,
)
