"""At steps that a GradScaler leaves out: gradients too large for float16 as they are, against gradients that the scale made too large."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sickbay
from sickbay.core.chart import Series


class Stretched(nn.Module):
    """A linear layer between a factor and its inverse: outputs as without, gradients `factor` times as large in between."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.outer, self.factor = nn.Linear(8, 8), nn.Linear(8, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(x).float()
        result: Tensor = self.outer(torch.tanh(hidden * self.factor / 8))
        return result


def _first_nonfinite(out: Path, factor: float, scale: float, broken_hook: bool = False) -> Series:
    torch.manual_seed(0)
    with sickbay.watch(out=out) as doctor:
        model = Stretched(factor)
        nn.init.zeros_(model.inner.weight)
        nn.init.zeros_(model.inner.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(8):
            inputs, targets = torch.randn(16, 8), torch.randn(16, 1)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
            loss = nn.functional.mse_loss(outputs.float(), targets)
            scaler.scale(loss).backward()
            if broken_hook:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, torch.inf)
            scaler.step(optimizer)
            scaler.update()
    return doctor.chart()["first_nonfinite"]


def test_a_gradient_beyond_float16_at_no_scale_is_traced(tmp_path: Path) -> None:
    found = _first_nonfinite(tmp_path / "run", factor=1e8, scale=4.0)
    assert len(found) == 1
    assert found[0].note["phase"] == "backward" and found[0].note["loss_scale"] <= 1
    assert found[0].note["result"]["dtype"] == "float16"
    assert Path(found[0].source.rpartition(":")[0]).name == Path(__file__).name


@pytest.mark.parametrize(("factor", "scale", "broken_hook"), [(1.0, 2.0**24, False), (1.0, 1.0, True), (1e8, 2.0**20, False)])
def test_what_the_scale_or_the_script_made_too_large_is_not(tmp_path: Path, factor: float, scale: float, broken_hook: bool) -> None:
    assert not _first_nonfinite(tmp_path / "run", factor, scale, broken_hook)
