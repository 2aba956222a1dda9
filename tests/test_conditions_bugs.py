"""Shapes, ids, masks and targets of the bugs chapter: sick, healthy, exactly at the threshold, too short, NaN."""

from __future__ import annotations

from typing import Any

import pytest

from sickbay import registry
from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import checkup
from tests.charts import chart
from tests.verdicts import ask, found, read, unexamined

NAN = float("nan")


# --- shapes and ids ----------------------------------------------------------------------------------------------------
def error(kind: str, **note: Any) -> Chart:
    return chart(
        exception=[read("exception", 1, 3, "blocks.0.down", "model.py:41", kind=kind, type="RuntimeError", message="bad\nmore", **note)]
    )


def test_shape_mismatch_tells_shapes_and_cause() -> None:
    note = {
        "operation": "linear",
        "shapes": [{"name": "input", "shape": [8, 128]}, {"name": "weight", "shape": [32, 128]}],
        "path": [{"module": "blocks.0.down", "shape_in": {"x": [8, 128]}}],
        "likely": "the weight is not transposed.",
    }
    verdict = found("shape-mismatch", error("shape", **note), "critical")
    assert (verdict.step, verdict.where, verdict.source) == (3, "blocks.0.down", "model.py:41")
    for part in ("linear", "input (8, 128)", "weight (32, 128)", "the weight is not transposed", "blocks.0.down x (8, 128)"):
        assert part in verdict.summary
    assert found("shape-mismatch", error("shape"), "critical").summary == "The shapes do not fit: bad."


def test_token_id_out_of_range_tells_the_likely_cause() -> None:
    assert "id 70 of 65" in found("token-id-out-of-range", error("token-id", likely="id 70 of 65 rows"), "critical").summary
    assert "bad" in found("token-id-out-of-range", error("token-id"), "critical").summary


@pytest.mark.parametrize(("id_", "other"), [("shape-mismatch", "token-id"), ("token-id-out-of-range", "shape")])
def test_exceptions_of_another_kind_are_not_theirs(id_: str, other: str) -> None:
    assert ask(id_, error(other)) is None
    assert ask(id_, error("out-of-memory")) is None
    assert ask(id_, chart(loss=[1.0])) is None


# --- perturbation ------------------------------------------------------------------------------------------------------
INFLUENCES = [
    ("causal-leak", "future_influence", "critical"),
    ("padding-attended", "padding_influence", "warning"),
    ("packing-contamination", "packing_influence", "warning"),
    ("batch-mixing", "row_influence", "critical"),
]


@pytest.mark.parametrize(("id_", "signal", "severity"), INFLUENCES)
def test_influence_where_there_must_be_none(id_: str, signal: str, severity: str) -> None:
    sick = chart(**{signal: [read(signal, 0.002, 1, "early"), read(signal, 0.7, 5, "model", "model.py:9"), read(signal, NAN, 6)]})
    verdict = found(id_, sick, severity)
    assert (verdict.step, verdict.where, verdict.source) == (1, "model", "model.py:9")
    assert (verdict.evidence[0].reading.value, verdict.evidence[0].limit) == (0.7, 1e-3)
    assert "0.7 times" in verdict.summary
    assert ask(id_, chart(**{signal: [0.0, 3e-6]})) is None
    assert ask(id_, chart(**{signal: [1e-3]})) is None
    assert "not finite" in unexamined(id_, chart(**{signal: [NAN]}))
    assert unexamined(id_, chart(loss=[1.0]))


@pytest.mark.parametrize(("id_", "signal", "severity"), INFLUENCES[1:])
def test_batch_norm_mixes_by_design(id_: str, signal: str, severity: str) -> None:
    assert "batch-norm" in unexamined(id_, chart(**{signal: [read(signal, 0.7, batch_norm=True)]}))


def blocked(share: float, nearest: bool, step: int = 1) -> list[Reading]:
    return [read("past_blocked", share, step, "model", nearest_blocked=nearest, span=3)]


def test_mask_blocks_past() -> None:
    verdict = found("mask-blocks-past", chart(past_blocked=blocked(0.4, True)), "critical")
    assert "40%" in verdict.summary and "3 positions" in verdict.summary and verdict.evidence[0].limit == 0.05
    assert found("mask-blocks-past", chart(past_blocked=blocked(1.0, False)), "critical").step == 1
    assert ask("mask-blocks-past", chart(past_blocked=blocked(0.05, True))) is None
    assert ask("mask-blocks-past", chart(past_blocked=blocked(0.8, False))) is None, "a sliding window blocks the far past on purpose"
    assert ask("mask-blocks-past", chart(past_blocked=[0.0])) is None
    assert unexamined("mask-blocks-past", chart(past_blocked=[NAN]))
    assert "next-token" in unexamined("mask-blocks-past", chart(loss=[1.0]))


def test_mask_blocks_past_when_a_row_has_no_key() -> None:
    row = {"op": "_softmax", "operands": [{"min": -0.3, "max": 0.1}], "fully_masked_rows": 2}
    assert (
        "every key is masked"
        in found("mask-blocks-past", chart(first_nonfinite=[read("first_nonfinite", 4, 2, **row)]), "critical").summary
    )
    other = {"op": "_softmax", "operands": [{"min": -3.0, "max": "nan"}], "fully_masked_rows": 0}
    assert unexamined("mask-blocks-past", chart(first_nonfinite=[read("first_nonfinite", 4, 2, **other)]))
    assert unexamined("mask-blocks-past", chart(first_nonfinite=[read("first_nonfinite", 4, 2, op="add", fully_masked_rows=1)]))


@pytest.mark.parametrize(("leak", "root", "beneath"), [(1.0, "causal-leak", "mask-blocks-past"), (0.2, "mask-blocks-past", "causal-leak")])
def test_an_inverted_mask_is_one_finding(leak: float, root: str, beneath: str) -> None:
    record = chart(future_influence=[leak], past_blocked=blocked(0.9, True))
    result = checkup(record, [registry.conditions()[id_] for id_ in ("causal-leak", "mask-blocks-past")])
    assert [(d.condition, d.explains) for d in result.diagnoses] == [(root, (beneath,))]


def test_attention_over_the_wrong_dimension_explains_the_masks() -> None:
    record = chart(row_influence=[0.5], future_influence=[0.4], past_blocked=blocked(0.9, True), padding_influence=[0.3])
    result = checkup(record, [c for c in registry.conditions().values() if c.chapter == "bugs"])
    assert [d.condition for d in result.diagnoses] == ["batch-mixing"]
    assert set(result.diagnoses[0].explains) == {"causal-leak", "mask-blocks-past", "padding-attended"}


# --- targets -----------------------------------------------------------------------------------------------------------
def offset(value: float, share: float = 1.0, step: int = 0, causal: bool | None = True, counted: int = 64, **match: float) -> Reading:
    return read("target_offset", value, step, match={str(int(value)): share, **match}, counted=counted, causal=causal)


@pytest.mark.parametrize(
    ("value", "causal", "severity"),
    [(0, True, "critical"), (0, None, "warning"), (0, False, "note"), (2, None, "critical"), (3, False, "critical")],
)
def test_label_misalignment(value: int, causal: bool | None, severity: str) -> None:
    verdict = found("label-misalignment", chart(target_offset=[offset(value, 0.97, causal=causal)]), severity)
    assert f"97% of the 64 targets equal the input at offset {value}" in verdict.summary
    assert verdict.evidence[0].limit == 1


def test_label_alignment_is_healthy() -> None:
    for reading in (offset(1), offset(-1), offset(2, 0.94), offset(0, 1.0, **{"1": 0.96})):
        assert ask("label-misalignment", chart(target_offset=[reading])) is None, reading
    assert found("label-misalignment", chart(target_offset=[offset(2, 0.95)]), "critical")
    assert ask("label-misalignment", chart(target_offset=[offset(1), offset(2)])) is None, "a second head may look two tokens ahead"
    assert "16 targets" in unexamined("label-misalignment", chart(target_offset=[offset(2, counted=15)]))
    assert found("label-misalignment", chart(target_offset=[offset(2, counted=16)]), "critical")
    assert unexamined("label-misalignment", chart(target_offset=[NAN]))


def test_padding_in_loss() -> None:
    def share(*values: float, counted: int = 100) -> Chart:
        rows = [read("padding_counted", v, step, pad_id=0, known_by="padding_idx", counted=counted) for step, v in enumerate(values)]
        return chart(padding_counted=rows)

    verdict = found("padding-in-loss", share(0.0, 0.3, 0.3), "warning")
    assert verdict.step == 1 and "20% of all counted targets" in verdict.summary and "id 0" in verdict.summary
    assert ask("padding-in-loss", share(0.0, 0.0)) is None
    assert ask("padding-in-loss", share(0.01)) is None
    assert ask("padding-in-loss", share(*[0.0] * 99, 0.5)) is None, "one batch in a hundred"
    assert unexamined("padding-in-loss", share(NAN))
    assert unexamined("padding-in-loss", share(0.5, counted=0))


def test_eos_masked() -> None:
    def ends(*values: float, inputs: int = 5) -> Chart:
        return chart(eos_targets=[read("eos_targets", v, step, eos_id=9, eos_in_inputs=inputs) for step, v in enumerate(values)])

    verdict = found("eos-masked", ends(0, 0), "warning")
    assert "id 9" in verdict.summary and "10 times in the inputs of 2 batches" in verdict.summary
    assert ask("eos-masked", ends(0, 0, 3)) is None
    assert "3 end tokens among the inputs of 1 batches" in unexamined("eos-masked", ends(0, inputs=3))
    assert found("eos-masked", ends(0, inputs=4), "warning") and found("eos-masked", ends(0, 0, inputs=1), "warning")
    assert unexamined("eos-masked", ends(0, 0, inputs=0))
    assert unexamined("eos-masked", ends(NAN, NAN))


def test_padding_that_can_be_cut_off_is_no_fault_unless_it_mostly_cannot() -> None:
    def looks(*cuts: float | None) -> Any:
        return chart(padding_influence=[read("padding_influence", 0.5, step, pad_id=0, cut=cut) for step, cut in enumerate(cuts)])

    assert ask("padding-attended", looks(0.01, 0.04, 0.03, 0.27)) is None
    found("padding-attended", looks(0.01, 0.6, 0.7), "warning")
    found("padding-attended", looks(None), "warning")
