"""A NaN that a batch brought along is traced to the line that made it, if that line does so again; else the batch is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verdicts import ask

import sickbay
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Diagnosis
from sickbay.exams.preparation import Preparation

Prepared = tuple[Tensor, Tensor | float]  # a batch and the weights of its loss


def standardised(raw: Tensor) -> Prepared:
    return (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True), 1.0


def standardised_late(raw: Tensor) -> Prepared:
    x = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True)
    return x.clone().flip(0).contiguous(), 1.0


def weighted(raw: Tensor) -> Prepared:
    return raw, 1 / raw.std(1, keepdim=True)


def logarithmic(raw: Tensor) -> Prepared:
    return (raw - 2).log(), 1.0


def brought_along(raw: Tensor) -> Prepared:
    raw[0, 0] = float("nan")
    return raw, 1.0


def beside_a_mask(raw: Tensor) -> Prepared:
    torch.log((raw > 0).float() * 0)  # an additive mask: -inf where hidden
    raw[0, 0] = float("nan")
    return raw, 1.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def trained(folder: Path, prepare: Callable[[Tensor], Prepared], problems: int = 0) -> tuple[Chart, list[Tensor]]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sickbay.watch(out=folder) as doctor:
        for step in range(12):
            raw = torch.rand(6, 4)
            if step >= 4:
                raw[2] = 2.0  # a row of one value has no deviation
            x, weight = prepare(raw)
            loss = (weight * F.mse_loss(model(x), x.sum(1, keepdim=True), reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(doctor.chart().facts.get("problems") or ()) == problems
    return doctor.chart(), [p.detach() for p in model.parameters()]


def told(id_: str, chart: Chart) -> Diagnosis:
    verdict = ask(id_, chart)
    assert isinstance(verdict, Diagnosis) and verdict.severity == "critical"
    return verdict


def line_of(function: Any, words: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(index for index, line in enumerate(lines) if words in line)}"


@pytest.mark.parametrize("prepare", [standardised, standardised_late, weighted])
def test_a_division_before_the_model_is_the_cause(tmp_path: Path, prepare: Callable[[Tensor], Prepared]) -> None:
    chart, _ = trained(tmp_path / "run", prepare)
    verdict = told("division-by-zero", chart)
    assert verdict.step == 4 and verdict.source == line_of(prepare, "raw.std(1")
    assert "step 5's" in verdict.summary


def test_a_logarithm_before_the_model_is_the_cause(tmp_path: Path) -> None:
    verdict = told("log-of-zero", trained(tmp_path / "run", lambda raw: logarithmic(raw + 2 * (raw < 2)))[0])
    assert verdict.source == line_of(logarithmic, ".log()")


@pytest.mark.parametrize("prepare", [brought_along, beside_a_mask])
def test_a_nan_of_the_data_stays_the_datas(tmp_path: Path, prepare: Callable[[Tensor], Prepared]) -> None:
    chart, _ = trained(tmp_path / "run", prepare)
    told("non-finite-input", chart)
    assert ask("division-by-zero", chart) is None and ask("log-of-zero", chart) is None


@pytest.mark.parametrize("part", ["from_outside", "round_end", "forward_begin"])
def test_an_error_of_the_looking_is_named_and_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Preparation, part, fails)
    told("non-finite-input", trained(tmp_path / "run", standardised, problems=1)[0])
    assert torch._C._len_torch_function_stack() == 0


def test_looking_closely_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, looked = trained(tmp_path / "looked", standardised)
    monkeypatch.setattr(Preparation, "from_outside", lambda self: None)
    _, left = trained(tmp_path / "left", standardised)
    assert all(torch.equal(one, other) or bool(one.isnan().all() and other.isnan().all()) for one, other in zip(looked, left))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,  # its gradient is finite even where its target is not
    "by hand": lambda output, target: ((output - target) ** 2).mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_target_that_is_not_finite_is_named(tmp_path: Path, loss: str, bad: str) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        for step in range(8):
            x = torch.rand(6, 4)
            target = x.sum(1, keepdim=True)
            if step >= 3:
                target[2] = float(bad)
            value = LOSSES[loss](model(x), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    verdict = told("non-finite-input", doctor.chart())
    assert verdict.step == 3
    assert ("'target'" if loss != "by hand" else "sub met") in verdict.summary
