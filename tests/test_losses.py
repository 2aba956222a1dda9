"""What is read of a script's loss calls: what it trains on and what it evaluates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sickbay
from sickbay.core.chart import Chart
from sickbay.core.reader import load_chart


def trained(folder: Path, evaluate: Callable[[nn.Module, Tensor, Tensor], object]) -> Chart:
    """The chart of three steps, after each of which `evaluate` saw the model and a batch of its own."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    with sickbay.watch(out=folder):
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:16]), y[:16]).backward()
            optimizer.step()
            with torch.no_grad():
                evaluate(model, x[16:], y[16:])
    return load_chart(folder)


def test_an_evaluation_by_single_losses_is_their_mean(tmp_path: Path) -> None:
    known: list[float] = []

    def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> None:
        targets = torch.where(torch.arange(8) < 2, -100, y)
        losses = nn.functional.cross_entropy(model(x), targets, reduction="none")
        known.append(float(losses.sum() / 6))

    chart = trained(tmp_path / "run", evaluate)
    assert chart["eval_loss"].values == pytest.approx(known)


def test_a_mean_and_single_losses_agree(tmp_path: Path) -> None:
    single = trained(tmp_path / "single", lambda model, x, y: nn.functional.cross_entropy(model(x), y, reduction="none"))
    mean = trained(tmp_path / "mean", lambda model, x, y: nn.functional.cross_entropy(model(x), y))
    assert single["eval_loss"].values == pytest.approx(mean["eval_loss"].values)
    assert single["train_loss"].values == mean["train_loss"].values


def test_a_loss_beside_no_grad_is_an_evaluations_where_its_forward_was(tmp_path: Path) -> None:
    """Outputs computed under no_grad and scored outside of it; a training output that is scored detached stays training's."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    trained_on, known = [], []
    with sickbay.watch(out=tmp_path / "run"):
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(x[:16])
            nn.functional.cross_entropy(output.detach(), y[:16])
            loss = nn.functional.cross_entropy(output, y[:16])
            loss.backward()
            optimizer.step()
            trained_on.append(loss.item())
            with torch.no_grad():
                output = model(x[16:])
            known.append(float(nn.functional.cross_entropy(output, y[16:])))
    chart = load_chart(tmp_path / "run")
    assert chart["eval_loss"].values == pytest.approx(known)
    assert chart["validation_loss"].values == pytest.approx(known)
    assert chart["train_loss"].values == pytest.approx(trained_on)
