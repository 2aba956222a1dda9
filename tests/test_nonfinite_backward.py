"""Finite losses with gradients that are not: the forward operation whose derivative it is, inside the model and in a hand-written loss."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nonfinite_steps import Step, found, line_with, unchanged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sickbay.exams.fork import NoAnswer
from sickbay.exams.nonfinite import locate, locate_update
from sickbay.patient import Patient


def reproduces(folder: Path) -> str:
    done = subprocess.run([sys.executable, str(folder / "first-bad-step" / "repro.py")], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Distance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        squares = (x - x).pow(2).sum(-1, keepdim=True)
        return x + torch.sqrt(squares)  # mark: sqrt of zero


class Trap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        positive = x * (x > 0)
        return torch.where(positive > 0, torch.log(positive), torch.zeros_like(x))  # mark: where trap


class Power(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * (x > 0)) ** 0.5  # mark: half power


def model_with(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), part, nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


CASES = [(Distance(), "sqrt", "sqrt of zero"), (Trap(), "log", "where trap"), (Power(), "pow", "half power")]


@pytest.mark.parametrize(("part", "op", "mark"), CASES)
def test_derivative_inside_the_model(part: nn.Module, op: str, mark: str, tmp_path: Path) -> None:
    model, step = model_with(part), Step(tmp_path)
    logits = step.forward(model, torch.randn(8, 4))
    assert step.backward(step.cross_entropy(logits, torch.zeros(8, dtype=torch.long))) is None
    with unchanged(model):
        finding = found(step.examine())
    assert (finding.note["op"], finding.note["phase"], finding.where) == (op, "backward", "1")
    assert finding.source == line_with(f"mark: {mark}", __file__)
    assert finding.note["operands"][0]["zeros"] > 0
    assert "cross_entropy" in finding.note["traced"]
    assert f"the gradient of aten::{op}" in reproduces(tmp_path)


@pytest.mark.parametrize(("part", "op", "mark"), CASES)
def test_without_knowing_the_loss(part: nn.Module, op: str, mark: str) -> None:
    model, step = model_with(part), Step()
    step.backward((step.forward(model, torch.randn(8, 4)) ** 2).mean())
    finding = found(step.examine())
    assert (finding.note["op"], finding.source) == (op, line_with(f"mark: {mark}", __file__))


def test_derivative_in_a_hand_written_loss(tmp_path: Path) -> None:
    model, step = nn.Linear(4, 6), Step(tmp_path)
    for same in (False, True):
        step.patient.forget_step()
        step.stretch.forget()
        output = step.forward(model, torch.randn(8, 4))
        step.lines.begin()
        target = output.detach() if same else torch.zeros(8, 6)
        distance = (output - target).pow(2).sum(-1)
        loss = distance.sqrt().mean() * 3  # mark: distance
        assert step.backward(loss) is None
        step.lines.end_step()
    with unchanged(model):
        finding = found(step.examine())
    assert (finding.note["op"], finding.note["phase"]) == ("sqrt", "backward")
    assert finding.source == line_with("mark: distance", __file__)
    assert finding.note["operands"][0]["zeros"] == 8
    assert "the gradient of aten::sqrt" in reproduces(tmp_path)


def test_functional_gradient_without_modules() -> None:
    weight, step = torch.zeros(4, requires_grad=True), Step()
    step.backward(torch.linalg.vector_norm(weight, 2) + (weight * weight).pow(0.25).sum())
    assert not torch.isfinite(weight.grad if weight.grad is not None else torch.ones(1)).all()
    finding = found(step.examine())
    assert finding.note["op"] == "pow"  # the norm's derivative at zero is defined as zero


class Wrong(torch.autograd.Function):
    """The identity with a derivative that divides by zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (x - x)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Wrong.apply(x)


def test_the_line_of_a_custom_backward_is_named(tmp_path: Path) -> None:
    model, step = model_with(Custom()), Step(tmp_path)
    step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    finding = found(step.examine())
    assert (finding.note["op"], finding.where) == ("div", "1")
    lines, first = inspect.getsourcelines(Wrong.backward)
    assert finding.source == f"{__file__}:{first + len(lines) - 1}"
    assert "aten::div" in reproduces(tmp_path)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Power()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_inside_activation_checkpointing() -> None:
    model, step = model_with(Checkpointed()), Step()
    step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    finding = found(step.examine())
    assert (finding.note["op"], finding.where, finding.source) == ("pow", "1.inner", line_with("mark: half power", __file__))


class Tokens(nn.Module):
    """Next-token logits `(B, T, V)` whose states go through a square root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + (hidden - hidden.detach()).abs().sqrt())


@pytest.mark.parametrize("shape", ["shifted", "transposed", "last"])
def test_logits_are_recognised_in_the_form_the_loss_took(shape: str) -> None:
    torch.manual_seed(0)
    ids, model, step = torch.randint(0, 7, (2, 5)), Tokens(), Step()
    logits = step.forward(model, ids)
    forms = {
        "shifted": (logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1)),
        "transposed": (logits.transpose(1, 2), ids),
        "last": (logits[:, -1], ids[:, 0]),
    }
    step.backward(step.cross_entropy(*forms[shape]))
    finding = found(step.examine())
    assert finding.note["op"] == "sqrt" and "cross_entropy" in finding.note["traced"]


def test_half_precision_gradient_overflows_with_the_loss_scale() -> None:
    torch.manual_seed(0)
    model, step = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Step()
    with torch.no_grad():
        model[1].weight.mul_(1e4)
    step.patient.scale = 65536.0
    logits = step.forward(model, torch.randn(8, 4), autocast=torch.float16)
    step.backward(step.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.long)) * 65536.0)
    finding = found(step.examine())
    assert (finding.note["op"], finding.note["result"]["dtype"], finding.where) == ("addmm", "float16", "1")


def test_finite_step_has_nothing_to_find() -> None:
    model, step = model_with(nn.GELU()), Step()
    step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    answer = step.examine()
    assert isinstance(answer, NoAnswer) and "finite" in answer.reason


def test_in_process_when_the_process_cannot_be_forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sickbay.exams.nonfinite.can_fork", lambda: "CUDA is in use")
    model, step = model_with(Distance()), Step(tmp_path)
    step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    with unchanged(model):
        finding = found(step.examine())
    assert (finding.note["op"], finding.where, step.patient.muted) == ("sqrt", "1", False)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "first-bad-step").write_text("in the way")
    model, step = model_with(Distance()), Step(tmp_path)
    step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    finding = found(step.examine())
    assert "could not be written" in finding.note["saved"] and finding.note["op"] == "sqrt"


def test_the_first_bad_step_is_kept(tmp_path: Path) -> None:
    for part in (Distance(), Power()):
        model, step = model_with(part), Step(tmp_path)
        step.backward(step.cross_entropy(step.forward(model, torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
        saved = found(step.examine()).note["saved"]
    assert "earlier" in saved
    assert "sqrt" in reproduces(tmp_path)


def test_loss_without_a_graph() -> None:
    answer = locate(Patient(), "loss", torch.tensor(float("nan")), Step().stretch, None)
    assert isinstance(answer, NoAnswer)


def test_update_that_overflows() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, 1e30, 1.0])  # its square overflows float32
    optimizer.step()
    with torch.no_grad():
        weight[1] = torch.nan
    finding = locate_update(optimizer, {id(weight): "head.weight"})
    finding = found(finding)
    assert (finding.where, finding.value, finding.note["phase"], finding.note["op"]) == ("head.weight", 1, "update", "AdamW")
    assert finding.note["state"] == ["exp_avg_sq"] and finding.note["lr"] == 0.1


def test_finite_update_is_no_finding() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert isinstance(locate_update(torch.optim.SGD([weight], lr=0.1), {}), NoAnswer)
