"""The speed chapter: what each condition says of a chart, what the probe times, and what the copy measures on models known by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis
from sickbay.exams import copies, loops, op_profile, products
from sickbay.exams.speed import repeated
from sickbay.patient import ForwardCall, user_line
from sickbay.probes.clock import Clock
from sickbay.probes.phases import Step, Stretch
from sickbay.probes.statements import Stretch as Lines
from sickbay.probes.statements import data_lines, idle_copies
from sickbay.registry import conditions

LOOP = {"count": 64, "width": 32, "operation": "bmm", "loop_seconds": 0.1, "batched_seconds": 0.01, "per_row": False}
WAIT = {"seconds": 0.03, "step_seconds": 0.1, "loader": True, "workers": 0, "dataset": "Rows", "idle": 0.1, "steps": 40}
SINGLE = {"saved": 0.6, "gain": 5.0, "shape": [1, 24], "same_storage": True}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the copy that questions are asked in: threads that spin would count as work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reading(signal: str, value: float, **note: Any) -> Reading:
    return Reading(6, signal, value, note=note, source="train.py:12")


def found(id_: str, *readings: Reading) -> Diagnosis | None:
    return next(iter(checkup(Chart(readings), [conditions()[id_]]).diagnoses), None)


@pytest.mark.parametrize(("gain", "expected"), [(0.6, True), (0.15, True), (0.149, False), (0.0, False)])
def test_slow_matmul_from_a_fifth_of_the_step(gain: float, expected: bool) -> None:
    assert (found("slow-matmul", reading("loop_gain", gain, **LOOP)) is not None) is expected


def test_slow_matmul_names_the_largest_saving() -> None:
    loop, wide = reading("loop_gain", 0.25, **LOOP), reading("float64_gain", 0.5, seconds64=0.2, seconds32=0.1, elements=1000)
    diagnosis = found("slow-matmul", loop, wide)
    assert diagnosis is not None and "float64" in diagnosis.summary and "50%" in diagnosis.summary
    assert diagnosis.source == "train.py:12"


def test_attention_written_out_is_an_alarm_only_where_it_is_most_of_the_step() -> None:
    note = {"shape": [4, 16, 16], "count": 2, "seconds": 0.02, "fused_seconds": 0.01}
    rest = reading("loop_gain", 0.0)
    assert found("slow-matmul", rest, reading("attention_gain", 0.3, **note)) is None
    assert found("slow-matmul", rest, reading("attention_gain", 0.5, **note)) is not None


def test_a_loop_over_the_rows_is_unbatched_forward_and_not_slow_matmul() -> None:
    loop = reading("loop_gain", 0.5, **{**LOOP, "per_row": True})
    assert found("slow-matmul", loop) is None
    assert found("unbatched-forward", reading("step_seconds", 0.1), loop) is not None


def test_unbatched_forward_alarms_only_where_the_rows_lie_together() -> None:
    step = reading("step_seconds", 0.1)
    together = found("unbatched-forward", step, reading("single_forwards", 16, **SINGLE))
    apart = found("unbatched-forward", step, reading("single_forwards", 16, **{**SINGLE, "same_storage": False}))
    little = found("unbatched-forward", step, reading("single_forwards", 16, **{**SINGLE, "saved": 0.39}))
    assert together is not None and together.severity == "warning"
    assert apart is not None and apart.severity == "note"
    assert little is None


def test_needless_copies_adds_up_both_kinds() -> None:
    inside = reading("copy_share", 0.05, kinds={"clone": 3, "cast": 1}, count=4)
    beside = reading("idle_copies", 0.05)
    step = reading("step_seconds", 0.1)
    assert found("needless-copies", step, inside) is None
    unseen = checkup(Chart([beside]), [conditions()["needless-copies"]])
    assert "needless-copies" in unseen.unexamined, "half a look is none"
    diagnosis = found("needless-copies", step, inside, beside)
    assert diagnosis is not None and "3 clones and 1 cast in" in diagnosis.summary


def test_data_bottleneck_needs_a_share_a_length_and_steps() -> None:
    assert found("data-bottleneck", reading("data_wait", 0.3, **WAIT)) is not None
    assert found("data-bottleneck", reading("data_wait", 0.19, **WAIT)) is None
    assert found("data-bottleneck", reading("data_wait", 0.6, **{**WAIT, "seconds": 0.002})) is None
    short = checkup(Chart([reading("data_wait", 0.3, **{**WAIT, "steps": 9})]), [conditions()["data-bottleneck"]])
    assert "9 steps" in short.unexamined["data-bottleneck"]


@pytest.mark.parametrize(("rows", "idle", "expected"), [(499, 0.1, True), (501, 0.1, False), (501, 0.9, True), (0, 0.1, True)])
def test_stacking_finished_rows_is_no_bottleneck(rows: int, idle: float, expected: bool) -> None:
    wait = reading("data_wait", 0.3, **{**WAIT, "rows": rows, "idle": idle})  # 30 ms, so 60 µs a row at 500 rows
    assert (found("data-bottleneck", wait) is not None) is expected


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"workers": 2}, "2 workers that do not keep up"),
        ({"idle": 0.9}, "waits"),
        ({"loader": False}, "between the steps"),
        ({}, "computes"),
    ],
)
def test_data_bottleneck_says_who_makes_the_batch(note: dict[str, Any], said: str) -> None:
    diagnosis = found("data-bottleneck", reading("data_wait", 0.3, **{**WAIT, **note}))
    assert diagnosis is not None and said in diagnosis.summary


def test_small_batch_is_a_note_from_three_times_the_rows() -> None:
    note = {"rows": 2, "knee": 8, "curve": {"2": 100.0, "8": 350.0}}
    diagnosis = found("small-batch", reading("throughput_gain", 3.5, **note))
    assert diagnosis is not None and diagnosis.severity == "note" and "2: 100, 8: 350" in diagnosis.summary
    assert found("small-batch", reading("throughput_gain", 2.9, **note)) is None


# --- the probe's arithmetic -----------------------------------------------------------------------------------------------
def test_a_step_is_slowed_by_what_it_neither_computed_nor_slept() -> None:
    step = Step(wall=1.0, cpu=0.2, loader=Stretch(cpu=0.01, slept=0.2))  # the rest took four times longer than it computed
    assert step.slowed() == pytest.approx(4.0)
    assert Step(wall=1.0, cpu=0.5, queued=0.4, gap=Stretch(cpu=0.1)).rest == pytest.approx(0.5)


def test_the_clock_stands_still_only_while_the_thread_is_queued() -> None:
    clock = Clock()
    try:
        began = clock.now()
        time.sleep(0.05)
        asleep = clock.now().since(began)
        began = clock.now()
        while time.thread_time() - began.cpu < 0.02:
            pass
        busy = clock.now().since(began)
    finally:
        clock.close()
    assert asleep.clear - asleep.cpu >= 0.045
    assert busy.cpu >= 0.02
    if clock_of_the_queue():  # else nothing tells waiting for a processor from sleeping
        assert busy.clear == pytest.approx(busy.cpu, rel=0.2)


def clock_of_the_queue() -> bool:
    clock = Clock()
    try:
        return clock.exact
    finally:
        clock.close()


def test_a_closed_clock_falls_back_to_the_wall() -> None:
    clock = Clock()
    clock.close()
    moment = clock.now()
    assert not clock.exact and moment.queued == 0.0 and moment.passed > 0


def test_the_users_line_is_found_however_deep_it_is_looked_for() -> None:
    assert user_line(1).startswith(f"{__file__}:")
    assert user_line(10_000) == ""


SCRIPT = """\
def rule(n):
    return n

while True:
    rows = rule(3)
    ids = rows + 1
    unread = [w.clone() for w in weights]
    kept = [w.clone() for w in weights]
    print(kept)
    out = model(ids)
for x, y in stream():
    model(x)
for step in range(3):
    model(x)
"""


def stretch(folder: Path, lines: list[int], at: int) -> Lines:
    file = folder / "script.py"
    file.write_text(SCRIPT)
    spent = {(str(file), "<module>", line): 0.1 for line in lines}
    return Lines(spent, [(str(file), "<module>", at)])


def test_lines_whose_results_reach_the_model_make_the_batch(tmp_path: Path) -> None:
    seen = stretch(tmp_path, [5, 6, 7, 8, 9], 10)
    assert {line for _, _, line in data_lines(seen, "")} == {5, 6}
    assert {line for _, _, line in idle_copies(seen)} == {7}


def test_a_loop_over_a_stream_makes_batches_and_one_that_counts_does_not(tmp_path: Path) -> None:
    assert {line for _, _, line in data_lines(stretch(tmp_path, [11], 12), "")} == {11}
    assert data_lines(stretch(tmp_path, [13], 14), "") == set()


# --- what the copy measures -----------------------------------------------------------------------------------------------
class Model(nn.Module):
    """Applies `body(self, x)` to its input; one weight `(8, 8)`."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self, x)
        return out


def call(body: Any, *shape: int) -> ForwardCall:
    draw = torch.Generator().manual_seed(0)
    return ForwardCall(Model(body), (torch.randn(shape, generator=draw),), {}, True, True, torch.get_rng_state(), "")


def profiled(call: ForwardCall) -> op_profile.Profile:
    """The second profile: an operation's first call loads its kernel."""
    op_profile.profile(call)
    return op_profile.profile(call)


def by_position(model: Model, x: Tensor) -> Tensor:
    return torch.stack([x[t] @ model.weight for t in range(len(x))])


def recurrent(model: Model, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[0])
    for t in range(len(x)):
        state = torch.tanh((state + x[t]) @ model.weight)
    return state


def read_out(model: Model, x: Tensor) -> Tensor:
    state, read = torch.zeros_like(x[0]), []
    for t in range(len(x)):
        state = torch.tanh(state + x[t])
        read.append(state @ model.weight)
    return torch.stack(read)


def test_a_loop_over_positions_can_be_batched_and_a_recurrence_cannot() -> None:
    wide = profiled(call(by_position, 64, 4, 8))
    (found_,) = loops.examine(wide, 64, 0.0, 2.0)
    assert found_["note"]["count"] == found_["note"]["width"] == 64
    assert found_["note"]["per_row"] and 0 < found_["value"] < 1
    assert found_["source"].endswith(f"test_conditions_speed.py:{by_position.__code__.co_firstlineno + 1}")
    assert loops.examine(profiled(call(recurrent, 64, 4, 8)), 4, 0.0, 2.0) == []
    assert loops.examine(profiled(call(read_out, 64, 4, 8)), 4, 0.0, 2.0) == [], "each call waits for the one before"


def test_copies_that_change_nothing_are_found_and_those_written_to_are_not() -> None:
    def copied(model: Model, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x.clone().double().float()
        return x @ model.weight

    def written(model: Model, x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 0.0
        return (x + y) @ model.weight

    sick, healthy = call(copied, 4096, 8), call(written, 4096, 8)
    (found_,) = copies.examine(sick, profiled(sick))
    assert found_["note"]["kinds"] == {"clone": 6, "cast": 12}
    assert copies.examine(healthy, profiled(healthy)) == []


def test_checks_that_only_python_reads_are_counted_and_results_are_not() -> None:
    def checked(model: Model, x: Tensor) -> Tensor:
        for _ in range(8):
            assert not x.isnan().any().item()
        return x.abs() @ model.weight

    seen = call(checked, 4096, 8)
    (found_,) = copies.examine(seen, profiled(seen))
    assert set(found_["note"]["kinds"]) == {"check"}


def test_checks_that_a_library_makes_are_not_the_scripts() -> None:
    layer = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)

    def encoded(model: Model, x: Tensor) -> Tensor:
        return layer(x, mask=mask) @ model.weight  # compares the mask with a causal one, to the last element

    seen = call(encoded, 4, 6, 8)
    profile = profiled(seen)
    assert any(operation.name in ("equal", "_local_scalar_dense", "is_nonzero") for operation in profile.operations)
    assert copies.examine(seen, profile) == []


def test_a_product_by_broadcasting_is_compared_with_the_matrix_product() -> None:
    def broadcast(model: Model, x: Tensor) -> Tensor:
        return (x[:, :, None, :] * x[:, None, :, :]).sum(-1) @ torch.ones(32, 8) @ model.weight

    (found_,) = products.examine(profiled(call(broadcast, 4, 32, 64)), 1.0)
    assert found_["signal"] == "broadcast_gain" and found_["note"]["shape"] == [4, 32, 32, 64]
    assert found_["note"]["product_seconds"] < found_["note"]["seconds"]


def test_rows_are_repeated_wherever_they_are() -> None:
    batch = {"ids": torch.zeros(2, 3), "mask": [torch.ones(2)], "table": torch.zeros(5, 2), "name": "x"}
    bigger = repeated(batch, 4, 2)
    assert bigger["ids"].shape == (8, 3) and bigger["mask"][0].shape == (8,)
    assert bigger["table"].shape == (5, 2) and bigger["name"] == "x"
