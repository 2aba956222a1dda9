"""Non-finite values that pass through complex numbers, that a CTC loss makes, or that were computed without gradient."""

from __future__ import annotations

import torch
from nonfinite_steps import Step, found
from torch import Tensor, nn
from verdicts import ask, read

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Diagnosis
from sickbay.exams.nonfinite import Finding, locate
from sickbay.exams.operand import bad_row, count_nonfinite, finite, kinds
from sickbay.exams.ungraded import Ungraded
from sickbay.probes.loss_lines import LossLines


class Spectrum(nn.Module):
    """The magnitudes of a signal's frequencies, mixed by one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(torch.fft.rfft(wave).abs())


def judged(condition: str, finding: Finding) -> Diagnosis:
    verdict = ask(condition, Chart([read("first_nonfinite", finding.value, **finding.note)]))
    assert isinstance(verdict, Diagnosis)
    return verdict


def test_complex_numbers_are_looked_into() -> None:
    wave = torch.randn(4, 8)
    spectrum = torch.fft.rfft(wave)
    assert finite(spectrum) and not kinds(spectrum)
    wave[2, 3] = float("nan")
    spectrum = torch.fft.rfft(wave)
    assert kinds(spectrum) == {"nan"} and kinds(spectrum.conj()) == {"nan"}
    assert (count_nonfinite(spectrum), bad_row(spectrum)) == (5, 2)


def test_a_bad_sample_is_named_behind_a_spectrum() -> None:
    step, wave = Step(), torch.randn(4, 8)
    wave[2, 3] = float("nan")
    finding = found(step.backward(step.cross_entropy(step.forward(Spectrum(), wave), torch.zeros(4, dtype=torch.long))))
    assert (finding.note["phase"], finding.note["sample"]) == ("input", 2)


def test_more_labels_than_frames() -> None:
    step = Step()
    logits = step.forward(nn.Linear(4, 6), torch.randn(3, 2, 4))
    lengths, many = torch.tensor([3, 3]), torch.tensor([2, 5])
    loss = nn.functional.ctc_loss(logits.log_softmax(-1), torch.ones(2, 5, dtype=torch.long), lengths, many)
    verdict = judged("log-of-zero", found(step.backward(loss)))
    assert "ctc_loss" in verdict.summary and "zero_infinity" in verdict.summary


def advantages(rewards: Tensor, held: Ungraded) -> Finding:
    """One policy step whose advantages are normalised between the output and backward, recorded as in a run's first steps."""
    step = Step()
    step.lines = LossLines(told=lambda function, args, result, start: held.note(function, args, result))
    scores = step.forward(nn.Linear(4, 2), torch.randn(6, 4))
    step.lines.begin()
    centred = rewards - rewards.mean()
    scaled = centred / rewards.std()
    loss = -(scores.log_softmax(-1)[:, 0] * scaled.unsqueeze(0)[0]).mean()
    step.lines.end()
    return found(locate(step.patient, "loss", loss, step.stretch, None, ungraded=held))


def test_advantages_that_are_all_equal() -> None:
    held = Ungraded()
    finding = advantages(torch.ones(6), held)
    assert (finding.note["op"], finding.note["phase"]) == ("div", "loss")
    assert "zero in its denominator" in judged("division-by-zero", finding).summary


def test_a_nan_reward_is_the_datas() -> None:
    rewards = torch.randn(6)
    rewards[4] = float("nan")
    finding = advantages(rewards, Ungraded())
    assert finding.note["phase"] == "input"


def test_division_in_place() -> None:
    held, advantages, spread = Ungraded(), torch.zeros(6), torch.zeros(())
    held.note(torch.Tensor.div_, (advantages, spread), advantages.div_(spread))
    born = held.birth(advantages)
    assert born is not None and born.op == "div"
    rewards = torch.full((6,), float("nan"))
    held.note(torch.Tensor.mul_, (rewards, torch.ones(())), rewards.mul_(2))
    assert held.birth(rewards) is None


def test_nothing_is_held_after_the_step() -> None:
    held = Ungraded()
    held.note(torch.div, (torch.zeros(3), torch.zeros(())), torch.full((3,), float("nan")))
    held.forget()
    assert held.birth(torch.full((3,), float("nan"))) is None


def teaching(held: Ungraded) -> Finding:
    """A student beside a teacher whose sharpened probabilities have a zero, in a divergence written out."""
    step = Step()
    step.lines = LossLines(told=lambda function, args, result, start: held.note(function, args, result))
    scores = step.forward(nn.Linear(4, 3), torch.randn(6, 4))
    step.lines.begin()
    taught = (torch.randn(6, 3) / 0.001).softmax(-1)
    loss = (taught * (taught.log() - scores.log_softmax(-1))).sum(-1).mean() + scores.pow(2).mean()
    step.lines.end()
    return found(locate(step.patient, "loss", loss, step.stretch, None, ungraded=held))


def test_a_logarithm_beside_the_graph() -> None:
    finding = teaching(Ungraded())
    assert (finding.note["op"], finding.note["phase"]) == ("log", "loss")
    assert isinstance(judged("log-of-zero", finding), Diagnosis)


def test_a_nan_that_nobody_saw_being_made_is_from_outside() -> None:
    deaf = Ungraded()
    deaf.note = lambda function, args, result: None  # type: ignore[method-assign]
    finding = teaching(deaf)
    assert finding.note["ungraded"]
    assert "without gradient" in judged("non-finite-input", finding).summary
    assert not isinstance(ask("log-of-zero", Chart([read("first_nonfinite", finding.value, **finding.note)])), Diagnosis)
