"""Of weights too many to copy at once each tensor takes its turn."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

import sickbay
from sickbay.probes import updates

STEPS = 33  # the samples are those of steps 0, 1, 2, 4, 8, 16 and 32


def updates_of(model: nn.Module, width: int, folder: Path) -> dict[int, dict[str, float]]:
    """For each sampled step the update ratio of each tensor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with sickbay.watch(model, optimizer, out=folder) as doctor:
        for _ in range(STEPS):
            model(torch.rand(4, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for reading in doctor.chart()["update_ratio"]:
        found[reading.step][reading.where] = reading.value
    return found


@pytest.mark.parametrize("limit", [2 * 64 * 4, 3 * 64 * 4 + 32, 1 << 20])
def test_every_tensor_takes_its_turn(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(updates, "_MAX_BYTES", limit)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    found = updates_of(model, 8, tmp_path / "run")
    assert set(found) == {0, 1, 2, 4, 8, 16, 32}
    assert all(sum(sizes[name] for name in ratios) <= limit for ratios in found.values())
    seen = [name for ratios in found.values() for name in ratios]
    fewest, most = min(seen.count(name) for name in sizes), max(seen.count(name) for name in sizes)
    assert 1 <= fewest <= most <= fewest + 1
    assert all(ratio > 0 for ratios in found.values() for ratio in ratios.values())


def test_a_tensor_beyond_the_limit_is_left_out_and_the_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_MAX_BYTES", 1024)
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2))
    assert {frozenset(ratios) for ratios in updates_of(model, 8, tmp_path / "run").values()} == {
        frozenset(["0.bias", "1.weight", "1.bias"])
    }
