"""Non-finite losses: the first operation, its operands, the module and the line, and a script that repeats it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nonfinite_steps import Step, found, line_with, unchanged
from torch import Tensor, nn

from sickbay.exams.nonfinite import Finding
from sickbay.exams.operand import fully_masked_rows


def reproduces(folder: Path) -> str:
    """What repro.py prints in a fresh process; it must have reproduced the value."""
    done = subprocess.run([sys.executable, str(folder / "first-bad-step" / "repro.py")], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class NaiveSoftmax(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        powers = torch.exp(scores)  # mark: naive exp
        return powers / powers.sum(-1, keepdim=True)


class Classifier(nn.Module):
    def __init__(self, middle: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle, self.leave, self.scale = nn.Linear(4, 8), middle, nn.Linear(8, 3), scale

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.leave(self.middle(self.enter(x) * self.scale))


def test_softmax_without_max_subtraction(tmp_path: Path) -> None:
    model, step = Classifier(NaiveSoftmax(), scale=500.0), Step(tmp_path)
    logits = step.forward(model, torch.randn(5, 4))
    with unchanged(model):
        finding = found(step.backward(step.cross_entropy(logits, torch.zeros(5, dtype=torch.long))))
    assert (finding.note["op"], finding.note["phase"], finding.where) == ("exp", "forward", "middle")
    assert finding.source == line_with("mark: naive exp", __file__)
    (scores,) = finding.note["operands"]
    assert scores["shape"] == [5, 8] and scores["nonfinite"] == 0 and scores["max"] > 88.7  # exp overflows float32 above 88.7
    assert finding.value == finding.note["result"]["nonfinite"] > 0
    assert "mul" in finding.note["chain"]
    assert "aten::exp" in reproduces(tmp_path)


def test_nan_in_the_batch(tmp_path: Path) -> None:
    model, step, batch = Classifier(nn.GELU()), Step(tmp_path), torch.randn(6, 4)
    batch[3, 1] = float("nan")
    logits = step.forward(model, batch)  # mark: bad batch
    finding = found(step.backward(step.cross_entropy(logits, torch.zeros(6, dtype=torch.long))))
    assert (finding.note["phase"], finding.note["sample"], finding.value) == ("input", 3, 1)
    assert finding.note["operands"][0]["name"] == "x"
    assert finding.source == line_with("mark: bad batch", __file__)
    assert "reproduced: x gives 1 non-finite of 24" in reproduces(tmp_path)


def test_nan_weight(tmp_path: Path) -> None:
    model, step = Classifier(nn.GELU()), Step(tmp_path)
    with torch.no_grad():
        model.leave.weight[1, 2] = float("nan")
    finding = found(step.backward(step.cross_entropy(step.forward(model, torch.randn(2, 4)), torch.zeros(2, dtype=torch.long))))
    assert (finding.note["phase"], finding.where, finding.value) == ("weight", "leave.weight", 1)
    reproduces(tmp_path)


class Attention(nn.Module):
    """Scores masked with `fill` where `blocked`; row 2 of `blocked` may be blocked altogether."""

    def __init__(self, blocked: Tensor, fill: float = float("-inf")) -> None:
        super().__init__()
        self.fill = fill
        self.register_buffer("blocked", blocked)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        scores = scores.masked_fill(self.blocked, self.fill)
        return scores.softmax(-1) @ x  # mark: attention softmax


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def test_fully_masked_row(tmp_path: Path) -> None:
    blocked = causal(4)
    blocked[2] = True
    step, model = Step(tmp_path), nn.Sequential(nn.Linear(3, 3), Attention(blocked))
    finding = found(step.backward(step.forward(model, torch.randn(2, 4, 3)).sum()))
    assert (finding.note["op"], finding.where, finding.note["fully_masked_rows"]) == ("softmax", "1", 2)
    assert finding.source == line_with("mark: attention softmax", __file__)
    reproduces(tmp_path)


def test_rows_are_those_of_the_softmax() -> None:
    scores = torch.zeros(2, 4, 4).masked_fill(causal(4), float("-inf"))
    assert [fully_masked_rows(scores, dim) for dim in (-1, -2, 0, 7)] == [0, 0, 6, 0]


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_healthy_masks_beside_a_fault(fill: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Attention(causal(4), fill), Attention(causal(4), fill), NaiveSoftmax())
    step = Step()
    finding = found(step.backward(step.forward(model, torch.randn(2, 4, 3) * 1e4).sum()))
    assert (finding.note["op"], finding.where) == ("exp", "3")


class HalfMasks(nn.Module):
    """Two smallest-number masks add up to -inf in half precision by design; the fault is the logarithm after them."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((4, 4), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1)
        weights = ((x @ x.transpose(-1, -2)).half() + mask + mask).softmax(-1)
        return (weights.float() - 2).log()  # mark: log of negatives


def test_two_smallest_number_masks_are_meant() -> None:
    step = Step()
    finding = found(step.backward(step.forward(nn.Sequential(nn.Linear(3, 3), HalfMasks()), torch.randn(2, 4, 3)).sum()))
    assert (finding.note["op"], finding.source) == ("log", line_with("mark: log of negatives", __file__))


class UnusedBranch(nn.Module):
    """The logarithm's NaN never arrives; the division's does."""

    def forward(self, x: Tensor) -> Tensor:
        safe = torch.where(x > 0, x.log(), x)
        return safe / (x - x)  # mark: division by zero


def test_operation_whose_nan_is_never_used_is_not_blamed(tmp_path: Path) -> None:
    model, step = nn.Sequential(nn.Linear(3, 3), UnusedBranch()), Step(tmp_path)
    finding = found(step.backward(step.forward(model, torch.randn(8, 3)).sum()))
    assert (finding.note["op"], finding.where) == ("div", "1")
    assert finding.source == line_with("mark: division by zero", __file__)
    assert next(fact for fact in finding.note["operands"] if fact["name"] == "other")["zeros"] == 24
    reproduces(tmp_path)


def test_half_precision_overflow_under_autocast(tmp_path: Path) -> None:
    model, step = Classifier(nn.Linear(8, 8), scale=3e5), Step(tmp_path)
    logits = step.forward(model, torch.randn(5, 4), autocast=torch.float16)
    finding = found(step.backward(step.cross_entropy(logits.float(), torch.zeros(5, dtype=torch.long))))
    assert (finding.note["dtype"], finding.note["phase"]) == ("float16", "forward")
    assert finding.note["op"] == "mul"  # float16 ends at 65,504
    reproduces(tmp_path)


def test_model_that_returns_its_loss() -> None:
    class WithLoss(Classifier):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
            logits = super().forward(x)
            return {"loss": -(logits * 0).log().mean(), "logits": logits}  # mark: loss inside

    step = Step()
    finding = found(step.backward(step.forward(WithLoss(nn.GELU()), torch.randn(2, 4))["loss"]))
    assert (finding.note["op"], finding.source) == ("log", line_with("mark: loss inside", __file__))


def test_every_target_ignored(tmp_path: Path) -> None:
    model, step = Classifier(nn.GELU()), Step(tmp_path)
    logits = step.forward(model, torch.randn(5, 4))
    finding = found(step.backward(step.cross_entropy(logits, torch.full((5,), -100))))  # mark: ignored
    assert (finding.note["op"], finding.note["counted_targets"]) == ("nll_loss", 0)
    assert finding.source == line_with("mark: ignored", __file__)
    reproduces(tmp_path)


def hand_written_steps(step: Step, model: nn.Module, last: float) -> Finding:
    """Three steps of a loss written by hand; in the last the logits are multiplied by `last`."""
    for scale in (1.0, 1.0, last):
        step.patient.forget_step()
        logits = step.forward(model, torch.randn(5, 4))
        step.lines.begin()
        probabilities = (logits * scale).softmax(-1)
        picked = probabilities[torch.arange(5), torch.zeros(5, dtype=torch.long)]
        logarithms = torch.log(picked)  # mark: hand-written log
        loss = -logarithms.mean()
        answer = step.backward(loss)
        step.lines.end_step()
    return found(answer)


def test_log_of_zero_in_a_hand_written_loss(tmp_path: Path) -> None:
    model, step = Classifier(nn.GELU()), Step(tmp_path)
    finding = hand_written_steps(step, model, 1e5)
    assert (finding.note["op"], finding.note["phase"], finding.where) == ("log", "forward", "")
    assert finding.source == line_with("mark: hand-written log", __file__)
    assert finding.note["operands"][0]["zeros"] > 0 and finding.note["operands"][0]["shape"] == [5]
    assert finding.note["chain"][:2] == ["index", "softmax"]
    assert "aten::log" in reproduces(tmp_path)


def test_functional_script_without_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    step = Step(tmp_path)
    for scale in (1.0, 200.0):
        step.lines.begin()
        hidden = torch.tanh(torch.randn(6, 4) @ first)
        scores = hidden @ second * scale
        powers = scores.exp()  # mark: functional exp
        loss = (powers / powers.sum(-1, keepdim=True)).log().mean()
        answer = step.backward(loss)
        step.lines.end_step()
    finding = found(answer)
    assert (finding.note["op"], finding.source) == ("exp", line_with("mark: functional exp", __file__))
    reproduces(tmp_path)


def test_nan_target_names_its_row() -> None:
    model, step = Classifier(nn.GELU()), Step()
    targets = torch.zeros(5, 3)
    targets[4, 0] = float("nan")
    finding = found(step.backward(nn.functional.mse_loss(step.forward(model, torch.randn(5, 4)), targets)))
    assert (finding.note["phase"], finding.note["operands"][0]["name"], finding.note["sample"]) == ("input", "target", 4)


def test_division_by_an_empty_mask() -> None:
    model, step, mask = Classifier(nn.GELU()), Step(), torch.zeros(5)
    losses = nn.functional.cross_entropy(step.forward(model, torch.randn(5, 4)), torch.zeros(5, dtype=torch.long), reduction="none")
    finding = found(step.backward((losses * mask).sum() / mask.sum()))
    assert finding.note["op"] == "div"
    assert next(fact for fact in finding.note["operands"] if fact["name"] == "other")["zeros"] == 1


class KeepsNone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        keep = 1.0 - 1.0
        return x / keep * (torch.rand(x.shape[0], 1) < keep)  # mark: zero number


def test_division_by_a_number(tmp_path: Path) -> None:
    step = Step(tmp_path)
    logits = step.forward(Classifier(KeepsNone()), torch.randn(5, 4))
    finding = found(step.backward(step.cross_entropy(logits, torch.zeros(5, dtype=torch.long))))
    assert (finding.note["op"], finding.source) == ("div", line_with("mark: zero number", __file__))
    assert [operand["zeros"] for operand in finding.note["operands"]] == [0, 1]
