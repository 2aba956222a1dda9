"""What a run is known by does not depend on which of its steps were slept through."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from early_naps import sleep_after
from noninterference_habits import Operations
from torch import Tensor, nn

import sickbay
from sickbay.core.chart import Chart
from sickbay.probes import nap

STEPS = 30
TROUBLE = 20  # a step that is slept through unless something wakes us

# Called at each step's start with (step, model, optimizer); what it returns, if anything, is added to the loss.
Disturb = Callable[[int, nn.Module, torch.optim.Optimizer], Any]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.bad = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.bad:
            self.bad -= 1
            hidden = hidden.log()
        return self.second(hidden.relu())


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps may be slept through after four; the name of the module in each forward that was."""
    sleep_after(4, monkeypatch.setattr)
    found: list[str] = []
    forward = nap.Nap.forward

    def noted(self: nap.Nap, module: nn.Module, *args: Any) -> bool:
        slept_through = forward(self, module, *args)
        if slept_through:
            found.append(type(module).__name__)
        return slept_through

    monkeypatch.setattr(nap.Nap, "forward", noted)
    return found


def trained(folder: Path, disturb: Disturb | None = None, clip: bool = True, accumulate: int = 1) -> tuple[Chart, list[Any], list[int]]:
    """The chart of a watched training, what the script saw of each step (loss, norm, learning rate), and the steps slept through."""
    torch.manual_seed(0)
    seen = []
    slept: list[int] = []
    with sickbay.watch(out=folder) as doctor:
        doctor._loop.on("slept", "test", lambda _: slept.append(doctor._loop.record.step))
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            extra = disturb(step, model, optimizer) if disturb is not None else None
            total = 0.0
            for _ in range(accumulate):
                loss = F.cross_entropy(model(torch.rand(6, 4)), torch.randint(0, 3, (6,))) / accumulate
                loss = loss if extra is None else loss + extra
                loss.backward()
                total += loss.item()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else torch.nn.utils.get_total_norm(grads))
            optimizer.step()
            seen.append((total, norm, optimizer.param_groups[0]["lr"]))
            schedule.step()
    chart = doctor.chart()
    assert not chart.facts.get("problems")
    return chart, seen, slept


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [True, False])
def test_every_step_is_written(tmp_path: Path, clip: bool, accumulate: int) -> None:
    chart, seen, slept = trained(tmp_path / "run", clip=clip, accumulate=accumulate)
    assert len(slept) > STEPS / 2
    for place, signal in enumerate(("loss", "grad_norm", "learning_rate")):
        assert chart[signal].steps == list(range(STEPS))
        assert chart[signal].values == pytest.approx([row[place] for row in seen], rel=1e-5)
    assert chart["train_loss"].values == pytest.approx([row[0] for row in seen], rel=1e-5)
    assert len({reading.source for reading in chart["loss"]}) == 1
    (scheduler,) = chart["scheduler_steps"]
    assert (scheduler.value, scheduler.note["updates"]) == (STEPS, STEPS)


def test_a_loss_that_is_not_finite_is_traced_in_its_own_step(tmp_path: Path) -> None:
    def disturb(step: int, model: Any, _: Any) -> None:
        model.bad = 40 if step == TROUBLE else model.bad

    chart, _, _ = trained(tmp_path / "run", disturb)
    first = chart["first_nonfinite"][0]
    assert first.step == TROUBLE and "log" in first.note["op"] and first.source.startswith(__file__)


def test_a_gradient_that_is_not_finite_is_traced_in_its_own_step(tmp_path: Path) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * math.inf * 0

    def disturb(step: int, model: Any, _: Any) -> None:
        if step == TROUBLE:
            plain = model.second.forward
            model.second.forward = lambda x: plain(Bad.apply(x))

    chart, _, _ = trained(tmp_path / "run", disturb)
    assert chart["nonfinite_step"][0].step == TROUBLE
    assert chart["nonfinite_step"][0].note == {"what": "gradient"}


def test_an_evaluation_is_seen_at_its_step(tmp_path: Path) -> None:
    def disturb(step: int, model: Any, _: Any) -> None:
        if step in (12, TROUBLE):
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    F.cross_entropy(model(torch.rand(5, 4)), torch.randint(0, 3, (5,)))
            model.train()

    chart, _, slept = trained(tmp_path / "run", disturb)
    assert [reading.step for reading in chart["eval_loss"]] == [12, TROUBLE]
    assert [reading.note["batches"] for reading in chart["eval_loss"]] == [3, 3]
    assert len(slept) > STEPS / 3


@pytest.mark.parametrize("step", range(TROUBLE, TROUBLE + 9))
def test_in_whatever_step_an_evaluation_comes_its_mode_is_seen(tmp_path: Path, step: int) -> None:
    def disturb(now: int, model: Any, _: Any) -> None:
        if now == 0:
            model.noise = nn.Dropout(0.5)
        if now == step:
            with torch.no_grad():
                for _ in range(3):
                    F.cross_entropy(model(torch.rand(5, 4)), torch.randint(0, 3, (5,)))

    chart, _, slept = trained(tmp_path / "run", disturb)
    assert [reading.step for reading in chart["evaluation_mode"]] == [step]
    assert len(slept) > STEPS / 3


def test_evaluations_in_training_mode_are_a_habit_though_the_last_one_is_right(tmp_path: Path) -> None:
    def disturb(now: int, model: Any, _: Any) -> None:
        if now == 0:
            model.noise = nn.Dropout(0.5)
        if now in (12, TROUBLE, TROUBLE + 6):
            model.train(now != TROUBLE + 6)  # the last one is the closing sample
            with torch.no_grad():
                F.cross_entropy(model(torch.rand(5, 4)), torch.randint(0, 3, (5,)))
            model.train()

    chart, _, _ = trained(tmp_path / "run", disturb)
    assert [(reading.step, reading.value) for reading in chart["evaluation_mode"]] == [(12, 1.0), (TROUBLE, 1.0), (TROUBLE + 6, 0.0)]


@pytest.mark.parametrize("what", ["evaluation mode", "another loss", "rows", "another optimizer", "a second backward"])
def test_whatever_is_not_plain_wakes(tmp_path: Path, what: str) -> None:
    side = nn.Linear(4, 3)
    others = torch.optim.SGD(side.parameters(), lr=0.1)

    def disturb(step: int, model: nn.Module, optimizer: Any) -> Any:
        model.train(not (what == "evaluation mode" and step == TROUBLE))
        if step != TROUBLE:
            return None
        if what == "another loss":
            return 0.1 * sum(p.square().sum() for p in model.parameters())
        if what == "rows":
            F.cross_entropy(model(torch.rand(2, 4)), torch.randint(0, 3, (2,)))
        elif what == "another optimizer":
            F.mse_loss(side(torch.rand(2, 4)), torch.rand(2, 3)).backward()
            others.step()
        elif what == "a second backward":
            F.cross_entropy(model(torch.rand(6, 4)), torch.randint(0, 3, (6,))).backward()
        return None

    _, _, slept = trained(tmp_path / "run", disturb)
    assert TROUBLE - 1 in slept and TROUBLE not in slept and len(slept) > STEPS / 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_held_is_let_go(tmp_path: Path, taken: list[str], accumulate: int) -> None:
    """No logits and no graph of a step slept through outlive its backward, and of its batches only the newest does, until the step."""
    torch.manual_seed(0)
    alive: list[weakref.ref[Any]] = []
    with sickbay.watch(out=tmp_path / "run"):
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(accumulate):
                assert sum(ref() is not None for ref in alive) <= 1
                batch = torch.rand(6, 4)
                logits = model(batch)
                loss = F.cross_entropy(logits, torch.randint(0, 3, (6,)))
                mark = Tiny()  # lives as long as the graph's last node
                loss.grad_fn.metadata["mark"] = mark
                alive += [weakref.ref(batch), weakref.ref(mark), weakref.ref(logits)]
                del mark, logits
                loss.backward()
                assert alive[-1]() is None
                del loss, batch
                gc.collect()
            optimizer.step()
            gc.collect()
            assert all(ref() is None for ref in alive)
    assert taken


def test_a_mode_of_the_scripts_sees_nothing_of_ours(tmp_path: Path, taken: list[str]) -> None:
    def calls(watched: bool) -> list[str]:
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        mode = Operations()

        def train() -> None:
            for _ in range(STEPS):
                with mode:
                    optimizer.zero_grad()
                    F.cross_entropy(model(torch.rand(6, 4)), torch.randint(0, 3, (6,))).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()

        if watched:
            with sickbay.watch(out=tmp_path / "run"):
                train()
        else:
            train()
        return mode.names

    assert calls(watched=True) == calls(watched=False)
    assert taken


def test_without_a_plain_habit_nothing_is_slept_through(tmp_path: Path, taken: list[str]) -> None:
    with sickbay.watch(out=tmp_path / "run"):
        model, teacher = Tiny(), Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(STEPS):
            x = torch.rand(6, 4)
            with torch.no_grad():
                wanted = teacher(x)
            optimizer.zero_grad()
            F.mse_loss(model(x), wanted).backward()
            optimizer.step()
    assert not taken


@pytest.mark.parametrize("kind", ["in place", "torch.func"])
def test_steps_that_no_optimizer_tells_of_are_all_counted(tmp_path: Path, kind: str) -> None:
    """Whoever counts them may not rest."""
    weight, x = torch.rand(4, 3, requires_grad=True), torch.rand(8, 4)

    def loss_of(weight: Tensor) -> Tensor:
        return (x @ weight).square().mean()

    with sickbay.watch(out=tmp_path / "run") as doctor:
        for _ in range(STEPS):
            if kind == "torch.func":
                weight = weight.detach() - 0.1 * torch.func.grad(loss_of)(weight.detach())
                continue
            loss_of(weight).backward()
            with torch.no_grad():
                weight -= 0.1 * weight.grad
                weight.grad = None
    assert doctor.chart().facts["steps"] >= STEPS - 1
