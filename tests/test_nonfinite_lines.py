"""The lines of a loss: learnt without disturbing anything, and given back to the nodes of a later graph."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from nonfinite_steps import line_with
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sickbay.exams.graph_walk import nodes_below
from sickbay.exams.stretch import Stretch
from sickbay.probes.loss_lines import LossLines


def depth() -> int:
    return int(torch._C._len_torch_function_stack())


class Theirs(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_begin_and_end_any_number_of_times() -> None:
    lines = LossLines()
    lines.end()
    lines.begin()
    lines.begin()
    assert depth() == 1
    lines.end()
    lines.end()
    assert depth() == 0 and lines.segments == []


def test_records_nodes_in_order_with_function_and_line() -> None:
    x, lines = torch.ones(3, requires_grad=True), LossLines()
    lines.begin()
    y = torch.nn.functional.mse_loss(x.exp(), torch.zeros(3)) / 2
    lines.end()
    assert y.item() == pytest.approx(torch.e**2 / 2)
    (segment,) = lines.segments
    assert [node for node, _, _ in segment] == ["ExpBackward0", "MseLossBackward0", "DivBackward0"]
    assert [function for _, function, _ in segment][:2] == ["exp", "mse_loss"]
    assert all(source.startswith(__file__ + ":") for _, _, source in segment)


def test_stays_away_from_another_mode_and_leaves_a_later_one() -> None:
    lines, theirs = LossLines(), Theirs()
    with theirs:
        lines.begin()
        assert depth() == 1
    lines.begin()
    with theirs:
        lines.end()
        assert depth() == 1
        torch.ones(2).exp()
    assert theirs.calls >= 1 and depth() == 0


def test_users_exception_leaves_nothing_behind() -> None:
    lines = LossLines()
    lines.begin()
    with pytest.raises(RuntimeError):
        torch.ones(2) @ torch.ones(3)
    lines.end()
    assert depth() == 0


def test_ended_from_inside_a_call_or_another_thread_it_is_gone_at_the_next_begin() -> None:
    lines, x = LossLines(), torch.ones(2, requires_grad=True)
    lines.begin()
    loss = (x * 2).sum()
    x.register_hook(lambda gradient: lines.end())
    loss.backward()
    lines.end()
    assert depth() == 0
    lines.begin()
    thread = threading.Thread(target=lines.end)
    thread.start()
    thread.join()
    lines.end()
    assert depth() == 0


def test_off_after_its_steps() -> None:
    lines = LossLines(steps=2)
    for _ in range(2):
        lines.begin()
        lines.end_step()
    lines.begin()
    assert depth() == 0


def test_lines_survive_an_extra_operation() -> None:
    x, lines = torch.full((3,), 2.0, requires_grad=True), LossLines()
    stretch = Stretch(lines.segments)
    for extra in (False, True):
        lines.begin()
        y = x.log()  # mark: first
        if extra:
            y = y * 2
        z = y.exp().mean()
        lines.end()
    log = z.grad_fn.next_functions[0][0].next_functions[0][0].next_functions[0][0]
    del lines.segments[1:]
    assert stretch.line_of(log, nodes_below(z.grad_fn)) == line_with("mark: first", __file__)


def test_note_is_cheap_and_forgets() -> None:
    x = torch.rand(4, 8, requires_grad=True)

    def loss() -> Tensor:
        y = x
        for _ in range(40):
            y = (y * 1.01 + 0.1).sqrt()
        return y.mean()

    stretch, value = Stretch(), loss()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        stretch.note(value)
        times.append(time.perf_counter() - start)
        stretch.forget()
    assert min(times) < 1e-3
    stretch.note(value)
    assert stretch.fault() is None
    stretch.forget()
    assert stretch._held == [] and stretch._names == []
    stretch.note(None)
    stretch.note(torch.ones(1))
