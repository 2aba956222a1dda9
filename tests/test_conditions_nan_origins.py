"""The conditions that ask which operation made the first non-finite value: each claims its own, and no other claims it too."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from charts import chart

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from sickbay.core.diagnosis import Diagnosis, NotExamined
from sickbay.core.nonfinite import bare_name, origins
from sickbay.registry import conditions

NAN = math.nan
INF = math.inf


def operand(
    low: float, high: float, *, shape: tuple[int, ...] = (4, 8), zeros: int = 0, nonfinite: int = 0, name: str = ""
) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "min": low, "max": high, "zeros": zeros, "nonfinite": nonfinite}


def born(
    op: str,
    *operands: dict[str, Any],
    phase: str = "forward",
    dtype: str = "float32",
    chain: tuple[str, ...] = (),
    step: int = 7,
    **note: Any,
) -> Reading:
    note = {"op": op, "phase": phase, "dtype": dtype, "operands": list(operands), "chain": list(chain), **note}
    note["result"] = {"shape": [4, 8], "dtype": dtype, "nonfinite": 3, "absmax": INF}
    return Reading(step, "first_nonfinite", 3.0, "block.1", note, "train.py:88")


def found(readings: Chart) -> list[str]:
    """The ids of the nan chapter's findings, roots and what they explain."""
    verdict = checkup(readings, [c for c in conditions().values() if c.chapter == "nan"])
    broken = [reason for reason in verdict.unexamined.values() if "its rule failed" in reason]
    assert not broken, broken
    return sorted({d.condition for d in verdict.diagnoses} | {effect for d in verdict.diagnoses for effect in d.explains})


def verdict(condition: str, readings: Chart) -> Diagnosis | NotExamined | None:
    chosen = conditions()[condition]
    return chosen.diagnose(readings.only((*chosen.needs, *chosen.uses)))


ZERO_OF_MANY = operand(0.0, 3.0, zeros=2)
MADE_BY = [
    ("exp past the limit of float32", "softmax-overflow", born("exp", operand(-3.0, 100.0))),
    ("exp past the limit of float16", "softmax-overflow", born("aten.exp.default", operand(-3.0, 12.0), dtype="float16")),
    ("exp past the limit of bfloat16", "softmax-overflow", born("exp", operand(-3.0, 91.0), dtype="bfloat16")),
    ("exp in the loss", "softmax-overflow", born("exp", operand(0.0, 200.0), phase="loss")),
    ("sum of finite exponentials", "softmax-overflow", born("sum", operand(0.0, 3e38), chain=("exp",))),
    ("inf/inf", "softmax-overflow", born("div", operand(0, 1, nonfinite=1), operand(0, 1, nonfinite=1), chain=("exp", "sum"))),
    ("0/0 where every exponential is 0", "softmax-overflow", born("div", operand(0, 0, zeros=32), ZERO_OF_MANY, chain=("sum", "exp"))),
    ("division by a zero count", "division-by-zero", born("div", operand(0, 0), operand(0, 0, shape=(), zeros=1), phase="loss")),
    ("reciprocal of 0", "division-by-zero", born("reciprocal", ZERO_OF_MANY)),
    ("rsqrt of 0", "division-by-zero", born("rsqrt", ZERO_OF_MANY)),
    ("0 to a negative power", "division-by-zero", born("pow", ZERO_OF_MANY)),
    ("mean of nothing", "division-by-zero", born("mean", operand(NAN, NAN, shape=(0, 8)), phase="loss")),
    ("division behind torch.where", "division-by-zero", born("DivBackward0", operand(1, 1), ZERO_OF_MANY, phase="backward")),
    ("division by zero in float16", "division-by-zero", born("div", operand(1, 2), ZERO_OF_MANY, dtype="float16")),
    ("log of 0", "log-of-zero", born("log", ZERO_OF_MANY)),
    ("log of a negative number", "log-of-zero", born("log", operand(-1.0, 3.0))),
    ("log1p of -1", "log-of-zero", born("log1p", operand(-1.0, 3.0))),
    ("log of a handmade softmax that rounded to 0", "log-of-zero", born("log", ZERO_OF_MANY, chain=("div", "sum", "exp"))),
    ("root of a negative number", "log-of-zero", born("sqrt", operand(-1e-9, 3.0))),
    ("root at 0, backward", "log-of-zero", born("SqrtBackward0", ZERO_OF_MANY, phase="backward")),
    ("norm at 0, backward", "log-of-zero", born("linalg_vector_norm", ZERO_OF_MANY, phase="backward")),
    ("power at 0, backward", "log-of-zero", born("pow", ZERO_OF_MANY, phase="backward")),
    ("root, backward, operand unknown", "log-of-zero", born("sqrt", phase="backward")),
    ("float16 product", "half-precision-overflow", born("linear", operand(-300, 400.0), operand(-2, 9.0), dtype="float16")),
    ("cast to float16", "half-precision-overflow", born("_to_copy", operand(-300, 70_000.0), dtype="torch.float16")),
    ("float16 square", "half-precision-overflow", born("pow", operand(-300, 300.0, zeros=1), dtype="float16")),
    ("batch", "non-finite-input", born("", operand(-3, 3, nonfinite=1, name="features"), phase="input", sample=5)),
    ("grown product", "exploding-gradients", born("matmul", operand(-1e19, 1e20), operand(-1e19, 1e20))),
]


@pytest.mark.parametrize(("condition", "reading"), [row[1:] for row in MADE_BY], ids=[row[0] for row in MADE_BY])
def test_the_operation_names_the_condition_and_only_one(condition: str, reading: Reading) -> None:
    assert found(chart(grad_norm=[1.0] * 8, first_nonfinite=[reading])) == [condition]


NOBODYS = [
    ("exp at the limit", born("exp", operand(-3.0, 88.72))),
    ("softmax of a fully masked row", born("_softmax", operand(NAN, NAN, nonfinite=8))),
    ("division by small numbers", born("div", operand(1, 2), operand(1e-30, 1.0))),
    ("log of a positive number", born("log", operand(1e-9, 1.0))),
    ("additive mask", born("", operand(NAN, 0.0, nonfinite=28, name="attention_mask"), phase="input")),
    ("gradient of a root away from 0", born("sqrt", operand(0.1, 1.0), phase="backward")),
    ("weight after another cause", born("", phase="weight")),
    ("nothing known", Reading(3, "first_nonfinite", 1.0)),
    ("operands of unknown range", born("mul", operand(NAN, NAN))),
]


@pytest.mark.parametrize("reading", [row[1] for row in NOBODYS], ids=[row[0] for row in NOBODYS])
def test_what_is_no_known_operation_is_claimed_by_nobody(reading: Reading) -> None:
    readings = chart(grad_norm=[1.0] * 8, first_nonfinite=[reading])
    assert set(found(readings)) <= {"non-finite-weights"}
    assert "non-finite-weights" not in found(readings) or reading.note["phase"] == "weight"


def test_silence_while_watched_is_health_and_an_unwatched_run_is_not_examined() -> None:
    origin_conditions = [conditions()[id_] for id_ in ("softmax-overflow", "division-by-zero", "log-of-zero", "half-precision-overflow")]
    assert len(checkup(chart(loss=[1.0]), origin_conditions).healthy) == 4
    assert len(checkup(chart(facts={"watched": False}), origin_conditions).unexamined) == 4


def test_a_finding_names_operation_number_limit_and_line() -> None:
    finding = verdict("softmax-overflow", chart(first_nonfinite=[born("exp", operand(-3.0, 100.0))]))
    assert isinstance(finding, Diagnosis)
    assert (finding.step, finding.where, finding.source, finding.severity) == (7, "block.1", "train.py:88", "critical")
    assert "exp() of 100 is infinite in float32 (limit 88.7) at block.1" in finding.summary
    assert str(finding.evidence[0]) == "first_nonfinite 3 (limit 0 elements)"


def test_a_nan_that_a_carried_state_brings_back_is_not_the_batch_s() -> None:
    state = born("", operand(-3, 3, nonfinite=1, name="states.0"), phase="input", sample=0, step=8)
    overflow = born("exp", operand(-1, 104), step=7)
    assert verdict("non-finite-input", chart(first_nonfinite=[overflow, state])) is None
    assert verdict("softmax-overflow", chart(first_nonfinite=[overflow, state])) is not None


def test_the_batch_and_sample_are_named() -> None:
    finding = verdict("non-finite-input", chart(first_nonfinite=[MADE_BY[-2][2]]))
    assert isinstance(finding, Diagnosis)
    assert "sample 5" in finding.summary
    assert "'features'" in finding.summary
    assert "step 7" in finding.summary


def test_gradients_that_overflow_under_a_loss_scale_are_the_scalers_business() -> None:
    backward = born("mm", operand(-6e4, 6e4), phase="backward", dtype="float16")
    assert found(chart(first_nonfinite=[backward], loss_scale=[65536.0] * 9, skipped_step=[0.0] * 7 + [1.0, 0.0])) == []
    assert found(chart(first_nonfinite=[backward])) == ["half-precision-overflow"]


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_gradients_that_overflow_without_being_scaled_up_are_not(scale: float) -> None:
    backward = born("mm", operand(-6e4, 6e4), phase="backward", dtype="float16")
    backward = dataclasses.replace(backward, note={**backward.note, "loss_scale": scale})
    falling, skipped = [2.0**-power for power in range(-8, 4)], [1.0] * 12
    conditions_found = found(chart(first_nonfinite=[backward], loss_scale=falling, skipped_step=skipped))
    assert ("half-precision-overflow" in conditions_found) == (scale <= 1)


def test_missing_targets_take_the_zero_over_zero_of_their_own_step() -> None:
    mean = born("div", operand(0, 0, shape=()), operand(0, 0, shape=(), zeros=1), phase="loss", step=2)
    assert found(chart(first_nonfinite=[mean], ignored_targets=[0.5, 0.5, 1.0])) == ["missing-targets"]
    assert found(chart(first_nonfinite=[mean], ignored_targets=[0.5, 0.5, 0.5])) == ["division-by-zero"]


def test_missing_targets() -> None:
    sick = chart(loss=[3.0, NAN, 2.9], ignored_targets=[0.25, 1.0, 0.25])
    finding = verdict("missing-targets", sick)
    assert isinstance(finding, Diagnosis)
    assert finding.step == 1
    assert finding.evidence[0].limit == 1.0
    assert verdict("missing-targets", chart(loss=[3.0, NAN], ignored_targets=[0.25, 0.999])) is None
    assert verdict("missing-targets", chart(loss=[3.0, 0.0], ignored_targets=[0.25, 1.0])) is None, "a guarded mean"
    assert verdict("missing-targets", chart(loss=[3.0], ignored_targets=[NAN])) is None
    noticed = chart(ignored_targets=[0.0, 1.0], nonfinite_step=[Reading(1, "nonfinite_step", 1.0, note={"what": "loss"})])
    assert isinstance(verdict("missing-targets", noticed), Diagnosis)
    earlier = chart(ignored_targets=[0.0, 0.0, 1.0], loss=[3.0, NAN, NAN], first_nonfinite=[born("log", ZERO_OF_MANY, step=1)])
    assert verdict("missing-targets", earlier) is None, "the run was lost before"
    assert checkup(chart(loss=[3.0]), [conditions()["missing-targets"]]).unexamined


def test_non_finite_weights_are_a_root_only_before_the_first_update_or_without_another_cause() -> None:
    start = Reading(0, "nonfinite_weight", 2.0, "head.weight", {"updates_before": 0}, "train.py:9")
    finding = verdict("non-finite-weights", chart(nonfinite_weight=[start], first_nonfinite=[born("", phase="weight", step=0)]))
    assert isinstance(finding, Diagnosis)
    assert (finding.certainty, finding.where, finding.source) == ("confirmed", "head.weight", "train.py:9")
    assert "before the first update" in finding.summary
    later = Reading(8, "nonfinite_weight", 2.0, "head.weight", {"updates_before": 8})
    alone = verdict("non-finite-weights", chart(nonfinite_weight=[later]))
    assert isinstance(alone, Diagnosis)
    assert alone.certainty == "likely"
    assert verdict("non-finite-weights", chart(nonfinite_weight=[later], first_nonfinite=[born("log", ZERO_OF_MANY)])) is None
    updated = chart(nonfinite_weight=[later], first_nonfinite=[born("addcdiv", phase="update")])
    assert isinstance(verdict("non-finite-weights", updated), Diagnosis)
    assert verdict("non-finite-weights", chart(loss=[1.0])) is None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("aten.exp.default", "exp"),
        ("aten::exp_", "exp"),
        ("aten.exp_.default", "exp"),
        ("torch.Tensor.exp", "exp"),
        ("ExpBackward0", "exp"),
        ("_log_softmax", "log_softmax"),
        ("LogSoftmaxBackward0", "log_softmax"),
        ("Log1PBackward0", "log1p"),
        ("__truediv__", "truediv"),
        ("LinalgVectorNormBackward0", "linalg_vector_norm"),
        ("", ""),
    ],
)
def test_operations_have_one_name_whoever_wrote_it(written: str, name: str) -> None:
    assert bare_name(written) == name


def test_origins_come_in_order_of_step_and_survive_a_bare_note() -> None:
    late, early = born("log", ZERO_OF_MANY, step=9), Reading(2, "first_nonfinite", 1.0, note={"operands": [{"min": None, "max": "?"}]})
    first, second = origins([late, early])
    assert (first.reading.step, second.op) == (2, "log")
    assert math.isnan(first.first.low)
    assert math.isnan(first.largest)


def test_weights_that_turned_nan_are_named_even_where_the_operation_is_nobodys() -> None:
    spread = born("", phase="weight", step=5)
    unknown = chart(first_nonfinite=[born("add", step=4), spread])
    assert found(unknown) == ["non-finite-weights"]
    alone = verdict("non-finite-weights", unknown)
    assert isinstance(alone, Diagnosis)
    assert "came from add" in alone.summary
    assert (alone.step, alone.certainty) == (4, "likely")
    assert found(chart(first_nonfinite=[born("log", ZERO_OF_MANY, step=4), spread]))[0] == "log-of-zero"
