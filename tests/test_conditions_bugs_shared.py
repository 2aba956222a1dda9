"""Broadcasts, gradients by hand, resumed runs, small batches, several ranks: verdicts on made-up charts, probes on known answers."""

from __future__ import annotations

import dis
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from charts import chart
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from verdicts import ask, found, read, unexamined

import sickbay
from sickbay.core.chart import Chart, Reading
from sickbay.exams import broadcasts, custom_backward
from sickbay.probes.checkpoints import reads


def of_rank(rank: int) -> dict[str, Any]:
    """What the reader adds to the note of a reading of rank 1 and up."""
    return {"rank": rank} if rank else {}


# --- several ranks -----------------------------------------------------------------------------------------------------
def weights(first: Sequence[float], second: Sequence[float], by: str = "DistributedDataParallel", **note: Any) -> Chart:
    """Two ranks' marks of one tensor, step by step."""
    readings = []
    for step, pair in enumerate(zip(first, second, strict=True)):
        for rank, value in enumerate(pair):
            notes: dict[str, Any] = {
                "by": by,
                "layout": 1,
                "norms": [value],
                "apart": [],
                "gradients": 1.0 + rank,
                "names": ["head.weight"],
                **note,
            }
            readings.append(read("rank_weights", value, step, "Net", **notes, **of_rank(rank)))
    return chart(rank_weights=readings)


def test_replicas_that_part_are_named_with_the_tensor_and_the_step() -> None:
    verdict = found("rank-desync", weights([5, 5, 5.0, 5.0], [5, 5, 5.1, 5.2]), "critical")
    assert verdict.step == 2 and verdict.where == "head.weight"
    assert "from step 2 on" in verdict.summary and "by 0.02 of its size" in verdict.summary


def test_a_wrapper_that_is_gone_around_is_said() -> None:
    parted = weights([5, 5, 5], [5, 6, 7], around="DistributedDataParallel")
    assert "goes around the DistributedDataParallel" in found("rank-desync", parted, "critical").summary


@pytest.mark.parametrize(
    "record",
    [
        weights([5, 4, 3], [5, 4, 3]),
        weights([5, 4, 3], [6, 4, 3]),  # broadcast after the first step
        weights([5, 4, 3, 2, 1], [5, 4.5, 3, 2.5, 1.5]),  # averaged at step 2, local steps between
        weights([5, 4, 3], [5, 5, 5], averaged=True),
        weights([5, 4, 3], [6, 5, 4], apart=[0]),  # left out of the averaging and unlike from the beginning: a rank's own expert
        weights([5, 5 * (1 + 5e-7)], [5, 5]),
    ],
)
def test_replicas_that_stay_or_come_together_are_healthy(record: Chart) -> None:
    assert ask("rank-desync", record) is None


def test_ranks_are_not_compared_unless_they_are_to_be_alike() -> None:
    assert "nothing shows" in unexamined("rank-desync", weights([5, 4, 3], [6, 5, 4], by=""))
    assert "marked on more than one rank" in unexamined("rank-desync", weights([5], [6]))
    split = Chart(
        [
            Reading(r.step, r.signal, r.value, r.where, {**r.note, "layout": i % 2})
            for i, r in enumerate(weights([1, 2], [3, 4])["rank_weights"])
        ]
    )
    assert "split over them" in unexamined("rank-desync", split)
    assert "only one process" in unexamined("rank-desync", chart(loss=[1.0]))


def test_equal_gradients_of_unequal_weights_show_replicas_too() -> None:
    assert found("rank-desync", weights([5, 5, 5], [6, 6, 6], by="", gradients=2.0), "critical")


def batches(first: Sequence[float], second: Sequence[float], by: str = "DistributedDataParallel") -> Chart:
    marks = [
        read("rank_batch", value, step, **of_rank(rank))
        for step, pair in enumerate(zip(first, second, strict=True))
        for rank, value in enumerate(pair)
    ]
    return Chart([*marks, read("rank_weights", 1.0, by=by, norms=[1.0])])


def test_ranks_on_the_same_batches() -> None:
    verdict = found("rank-duplicate-data", batches([1, 2, 3, 4], [1, 2, 3, 4]), "critical")
    assert "4 of 4" in verdict.summary and "0, 1" in verdict.summary


def test_ranks_on_shards_full_batches_or_split_models_are_left_alone() -> None:
    assert ask("rank-duplicate-data", batches([1, 2, 3, 4], [5, 6, 7, 8])) is None
    assert ask("rank-duplicate-data", batches([1, 1, 1, 1, 1], [1, 1, 1, 1, 1])) is None
    assert ask("rank-duplicate-data", batches([1, 2, 3, 4, 5], [1, 6, 7, 8, 9])) is None
    assert "split one model" in unexamined("rank-duplicate-data", batches([1, 2, 3, 4], [1, 2, 3, 4], by=""))
    assert "this needs 4" in unexamined("rank-duplicate-data", batches([1, 2, 3], [1, 2, 3]))


# --- broadcasting ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([8, 1], [8], True),
        ([8], [8, 1], True),
        ([8, 1], [1, 8], True),
        ([1, 8], [8], False),
        ([1], [1, 1], False),
        ([8, 4], [4], False),
        ([8, 1], [4], False),
        ([8, 8], [8, 8], False),
        ([8, 1], [8, 1], False),
        ([2, 3, 1], [2, 3], False),  # torch itself raises
    ],
)
def test_which_shapes_pair_every_element_with_every_other(left: list[int], right: list[int], expected: bool) -> None:
    assert broadcasts.pairs(left, right) == expected


def test_a_pairing_is_told_from_pairs_on_purpose() -> None:
    prediction, target = torch.ones(4, 1, requires_grad=True) * 1, torch.ones(4)
    slip = broadcasts.pairing(torch.Tensor.sub, (prediction, target), prediction - target, 0)
    assert isinstance(slip, broadcasts.Pairing) and slip.growth == 4 and slip.predictions == 0
    flat = torch.ones(4, requires_grad=True) * 1
    arranged = flat.unsqueeze(1)
    assert broadcasts.pairing(torch.Tensor.sub, (arranged, target), arranged - target, 0) == "on purpose"
    assert broadcasts.pairing(torch.Tensor.sub, (arranged, flat), arranged - flat, 0) == "on purpose"
    assert broadcasts.pairing(torch.Tensor.sub, (flat, target), flat - target, 0) is None


def test_only_elementwise_functions_and_sums_lead_back_from_a_loss() -> None:
    x = torch.ones(4, 1, requires_grad=True)
    difference = x * 1.0 - torch.ones(4)
    node = difference.grad_fn
    assert node in broadcasts.summed(difference.pow(2).mean())
    assert node not in broadcasts.summed(difference.softmax(-1).diagonal().sum())


def test_a_broadcast_is_said_with_both_shapes() -> None:
    note: dict[str, Any] = {"function": "sub", "shapes": [[16, 1], [16]], "result": [16, 16], "roles": ["prediction", "target"]}
    verdict = found("silent-broadcast", chart(paired_broadcast=[read("paired_broadcast", 16, **note)]), "critical")
    assert "the prediction (16, 1) and the target (16,), which broadcast to (16, 16)" in verdict.summary
    assert ask("silent-broadcast", chart(loss=[1.0])) is None


# --- gradients written by hand ------------------------------------------------------------------------------------------
class Cube(Function):
    factor = 3.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @classmethod
    def backward(cls, ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * Cube.factor * x**2


class Slip(Cube):
    """Its forward is inherited."""

    @classmethod
    def backward(cls, ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * x**2


class Sign(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0]


class Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return -gradients[0]


def test_a_gradient_is_off_by_exactly_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    right = custom_backward.compare(Cube, (x,))
    assert isinstance(right, dict) and right["error"] < 1e-6
    monkeypatch.setattr(Cube, "factor", 2.0)
    wrong = custom_backward.compare(Cube, (x,))
    assert isinstance(wrong, dict) and wrong["error"] == pytest.approx(1 / 3, rel=1e-4)


def test_a_function_that_inherits_its_forward_is_asked_about_and_left_as_it_was(tmp_path: Path) -> None:
    linear = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    with sickbay.watch(linear, optimizer, out=tmp_path / "run") as doctor:
        for _ in range(3):
            Slip.apply(linear(torch.randn(5, 4))).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                Slip.apply(linear(torch.randn(5, 4)))  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
    (reading,) = doctor.chart()["gradient_error"]
    assert reading.where == "Slip" and reading.value == pytest.approx(2 / 3, rel=1e-3)
    assert "forward" not in vars(Slip) and isinstance(vars(Cube)["forward"], staticmethod)


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x.square() * gradients[0]


def test_a_backward_behind_a_decorator_of_torchs_is_the_scripts_own(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with sickbay.watch(out=tmp_path / "run") as doctor:
        optimizer = torch.optim.SGD(first.parameters(), lr=1e-3)
        for _ in range(30):
            first(torch.randn(5, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer = torch.optim.SGD(second.parameters(), lr=1e-3)  # a second training
        for _ in range(3):
            Once.apply(second(torch.randn(5, 4))).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    (reading,) = doctor.chart()["gradient_error"]
    assert (reading.where, reading.source.rsplit(":", 1)[0]) == ("Once", __file__) and reading.value == pytest.approx(1 / 3, rel=1e-3)


def test_gradients_that_differ_on_purpose_are_told() -> None:
    x = torch.randn(9, requires_grad=True)
    assert "piecewise constant" in custom_backward.compare(Sign, (x,))
    assert "on purpose" in custom_backward.compare(Reversed, (x,))


def test_the_scripts_functions_are_found_in_a_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    assert custom_backward.functions_of(Cube.apply(x).sum().exp()) == [Cube]  # type: ignore[no-untyped-call]
    assert custom_backward.functions_of(x.exp().sum()) == []


def test_a_wrong_gradient_is_measured_against_its_limit() -> None:
    def record(error: float) -> Chart:
        return chart(gradient_error=[read("gradient_error", error, where="Norm", input=0, directions=6, analytic=1.0, numeric=2.0)])

    assert "50% off" in found("wrong-gradient", record(0.5), "critical").summary
    assert ask("wrong-gradient", record(0.05)) is None
    assert ask("wrong-gradient", record(math.nan)) is None
    assert "no autograd Function" in unexamined("wrong-gradient", chart(loss=[1.0]))


# --- resumed runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("start = ckpt['step'] + 1", True),
        ("start = ckpt.get('step', 0)", True),
        ("self.step = int(ckpt.pop('step'))", True),
        ("for i in range(ckpt['step'], 10): pass", True),
        ("print('at', ckpt['step'])", False),
        ("print(f\"at {ckpt['step']}\")", False),
        ("torch.save({'step': step, 'model': model}, path)", False),
        ("log['step'] = step", False),
    ],
)
def test_a_count_is_read_when_it_is_used(line: str, expected: bool) -> None:
    assert reads(compile(line, "train.py", "exec"), "step") == expected


def test_a_count_read_in_another_branch_is_not_read() -> None:
    text = "if a:\n    s = load()\n    print(s)\nelif b:\n    s = load()\n    start = s['step']\nelse:\n    pass\nwhile c:\n    n = s\n"
    code = compile(text, "train.py", "exec")
    lines = {one.offset: one.positions.lineno for one in dis.get_instructions(code) if one.opname == "CALL" and one.positions}
    first, second = (next(offset for offset, line in lines.items() if line == wanted) for wanted in (2, 5))
    assert not reads(code, "step", first)
    assert reads(code, "step", second)


def test_what_a_resume_lacks_is_named() -> None:
    note: dict[str, Any] = {"missing": ["optimizer"], "saved": ["optimizer"], "file": "last.pt", "key": "step", "count": 300}
    sick = chart(restored_state=[read("restored_state", 1, 300, "AdamW", **note)])
    verdict = found("checkpoint-resume-incomplete", sick, "warning")
    assert "last.pt (step 300)" in verdict.summary and "which the file holds" in verdict.summary
    assert ask("checkpoint-resume-incomplete", chart(restored_state=[read("restored_state", 0, 300, "AdamW", missing=[])])) is None
    assert "no training was taken up" in unexamined("checkpoint-resume-incomplete", chart(loss=[1.0]))


# --- batches -----------------------------------------------------------------------------------------------------------
def test_a_tiny_batch_is_a_note() -> None:
    def record(rows: int) -> Chart:
        return chart(batch_rows=[read("batch_rows", 32, promised=32), read("batch_rows", rows, 9, promised=32)])

    assert "1 of 32 rows" in found("batch-size-mismatch", record(1), "note").summary
    assert found("batch-size-mismatch", record(8), "note").step == 9
    assert ask("batch-size-mismatch", record(9)) is None
    assert "no training batch" in unexamined("batch-size-mismatch", chart(loss=[1.0]))
