"""Charts: series, tables, what a condition may see, and that a saved chart comes back exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from charts import chart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sickbay.core.chart import Chart, Reading, SavedTables, Series, Table
from sickbay.core.errors import RecordError, SickbayError
from sickbay.core.json_text import from_text, to_text
from sickbay.core.signals import SIGNALS

NAN, INF = float("nan"), float("inf")
floats = st.floats(allow_nan=True, allow_infinity=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["$float", "$dict"]), inner, max_size=4),
    max_leaves=8,
)
notes = st.dictionaries(st.text(max_size=8), values, max_size=3)
readings = st.builds(
    Reading,
    step=st.integers(0, 50),
    signal=st.sampled_from(sorted(SIGNALS)),
    value=floats,
    where=st.text(max_size=8),
    note=notes,
    source=st.text(max_size=8),
    seconds=st.floats(0, 1e6),
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def same(left: Any, right: Any) -> bool:
    """Equal, NaN being equal to itself, types and signs of zero included."""
    return repr(left) == repr(right)


def same_table(left: Table, right: Table) -> bool:
    arrays = ("firsts", "steps", "seconds", "values", "sums", "counts")
    return (left.signal, left.places) == (right.signal, right.places) and all(
        np.array_equal(getattr(left, a), getattr(right, a), equal_nan=True) and getattr(left, a).dtype == getattr(right, a).dtype
        for a in arrays
    )


@quick
@given(values)
def test_any_json_value_survives_strict_json(value: Any) -> None:
    text = to_text(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(from_text(text), value)


@pytest.mark.parametrize(
    ("given_value", "kept"),
    [
        ((1, 2), [1, 2]),
        ({3, 1}, [1, 3]),
        (np.float32(0.5), 0.5),
        (np.array([1.0, NAN]), [1.0, NAN]),
        ({1: np.int64(2)}, {"1": 2}),
        (Path("a/b"), "a/b"),
        (np.float64(INF), INF),
        ("\udcff", "\udcff"),
    ],
)
def test_what_is_not_json_is_kept_as_its_nearest(given_value: Any, kept: Any) -> None:
    assert same(from_text(to_text({"x": given_value})), {"x": kept})


@quick
@given(st.lists(readings, max_size=30))
def test_a_series_is_in_order_of_step_and_loses_nothing(rows: list[Reading]) -> None:
    series = Series(rows)
    assert series.steps == sorted(r.step for r in rows)
    assert sorted(map(repr, series)) == sorted(map(repr, rows))
    assert [r for r in series if r.step == 7] == [r for r in rows if r.step == 7]  # ties keep the order of writing


@quick
@given(st.lists(readings, min_size=1, max_size=30), st.integers(0, 50), st.integers(0, 50))
def test_views_of_a_series_agree_with_each_other(rows: list[Reading], first: int, last: int) -> None:
    series = Series(rows)
    assert [len(series.at(place)) for place in series.places()] == [sum(r.where == p for r in rows) for p in series.places()]
    assert sum(len(series.at(place)) for place in series.places()) == len(rows)
    assert len(series.between(first, last)) == sum(first <= r.step <= last for r in rows)
    assert all(math.isfinite(value) for value in series.finite().values)
    worst, least = series.worst(), series.least()
    assert worst is not None and least is not None
    has_nan = any(math.isnan(r.value) for r in rows)
    assert math.isnan(worst.value) if has_nan else worst.value == max(r.value for r in rows)
    numbers = [r.value for r in rows if not math.isnan(r.value)]
    assert least.value == min(numbers) if numbers else math.isnan(least.value)


def test_the_median_counts_finite_values_only() -> None:
    assert chart(grad_norm=[1, NAN, 3, INF, 2])["grad_norm"].median() == 2
    assert math.isnan(chart(grad_norm=[NAN])["grad_norm"].median())


@quick
@given(
    st.lists(readings, max_size=20),
    st.dictionaries(st.text(max_size=8), values, max_size=3),
    st.dictionaries(st.sampled_from(sorted(SIGNALS)), st.text()),
)
def test_a_saved_chart_comes_back_exactly(tmp_path: Path, rows: list[Reading], facts: dict[str, Any], unobserved: dict[str, str]) -> None:
    before = Chart(rows, facts, unobserved)
    before.save(tmp_path / "chart.json")
    after = Chart.load(tmp_path / "chart.json")
    assert same(after.facts, before.facts) and after.unobserved == before.unobserved
    assert after.signals() == before.signals() and after.last_step == before.last_step
    assert all(same(list(after[signal]), list(before[signal])) for signal in SIGNALS)
    json.loads((tmp_path / "chart.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@quick
@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=20))
def test_a_saved_table_comes_back_exactly_and_decodes_to_readings(tmp_path: Path, rows: list[list[float]]) -> None:
    table = table_of(np.array(rows, np.float32))
    before = Chart((), recorded=SavedTables({"weight_norm": table}))
    before.save(tmp_path / "chart.json")
    after = Chart.load(tmp_path / "chart.json")
    assert same_table(after.table("weight_norm"), table)
    assert same(
        [(r.step, r.where, r.value) for r in after["weight_norm"]], [(s, p, v) for s, r in enumerate(rows) for p, v in zip("abc", r)]
    )


def table_of(array: np.ndarray[Any, Any]) -> Table:
    steps = np.arange(len(array))
    ones = np.ones(array.shape, np.uint32)
    return Table("weight_norm", ("a", "b", "c"), steps, steps, steps.astype(float), array, array.astype(np.float64), ones)


def test_a_long_table_is_thinned_with_largest_sum_and_count_exact() -> None:
    array = np.random.default_rng(1).integers(0, 1000, (5000, 3)).astype(np.float32)
    array[17, 1] = np.nan
    table = table_of(array)
    thin = table.thinned(800)
    assert len(thin) <= 800 and thin.firsts[0] == 0 and thin.steps[-1] == 4999
    assert (thin.firsts[1:] == thin.steps[:-1] + 1).all()
    assert np.array_equal(thin.values[-256:], array[-256:])
    assert thin.counts.sum(axis=0).tolist() == [5000] * 3
    assert thin.sums[:, 0].sum() == array[:, 0].astype(np.float64).sum()
    assert thin.values[:, 2].max() == array[:, 2].max() and np.isnan(thin.values[:, 1]).sum() == 1
    readings = table.thinned(800).readings()
    assert np.array_equal(thin.values[:64], array[:64], equal_nan=True) and readings[0].note == {}
    first, last = int(thin.firsts[70]), int(thin.steps[70])
    assert readings[210].note == {"steps": [first, last], "sum": float(thin.sums[70, 0]), "count": last - first + 1}


def test_any_signal_can_be_seen_as_a_table() -> None:
    rows = [Reading(0, "weight_norm", 1, "a"), Reading(2, "weight_norm", 3, "b"), Reading(2, "weight_norm", NAN, "a")]
    table = Chart(rows).table("weight_norm")
    assert table.places == ("a", "b") and table.steps.tolist() == [0, 2]
    assert same(table.values.tolist(), [[1.0, NAN], [NAN, 3.0]])
    assert table.counts.tolist() == [[1, 0], [1, 1]]
    assert same(table.means.tolist(), [[1.0, NAN], [NAN, 3.0]])
    assert len(Chart().table("weight_norm")) == 0


def test_a_view_answers_only_for_what_was_declared() -> None:
    view = chart(grad_norm=[1], loss={3: 2.5}).only(["loss"])
    assert view["loss"].values == [2.5] and view.last_step == 3
    for ask in (lambda: view["grad_norm"], lambda: view.table("grad_norm")):
        with pytest.raises(SickbayError, match="not declared"):
            ask()
    with pytest.raises(SickbayError, match="unknown signal"):
        chart()["grad_nrom"]


def test_why_a_signal_cannot_be_judged() -> None:
    seen = chart(loss=[1], unobserved={"grad_norm": "its probe failed", "loss": "later"})
    assert seen.why_unobserved("loss") is None  # it has readings, whatever was said
    assert seen.why_unobserved("grad_norm") == "its probe failed"
    assert seen.why_unobserved("learning_rate") == SIGNALS["learning_rate"].absent
    assert seen.why_unobserved("exception") is None  # silence means: did not happen
    assert chart(facts={"watched": False}).why_unobserved("exception") == "nothing was observed"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"chart": 1}', '{"chart": 1, "facts": {}, "unobserved": {}, "readings": [[1]], "tables": {}}']
)
def test_what_is_no_chart_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"bad\.json"):
        Chart.load(path)


def test_a_chart_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text('{"chart": 99}')
    with pytest.raises(RecordError, match="version 99"):
        Chart.load(path)
    with pytest.raises(RecordError, match="nowhere"):
        Chart.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="cannot be written"):
        chart().save(tmp_path / "no" / "such")


def test_the_chart_helper(chart: Callable[..., Chart]) -> None:
    reading = Reading(9, "loss", 1.0, note={"a": 1})
    made = chart(loss=[reading], grad_norm={4: 2}, eval_loss=[3, 2], facts={"device": "cpu"})
    assert list(made["loss"]) == [reading]
    assert (made["grad_norm"].steps, made["eval_loss"].values, made.facts) == ([4], [3.0, 2.0], {"device": "cpu"})
    with pytest.raises(ValueError, match="no signal"):
        chart(grad_nrom=[1])
    with pytest.raises(ValueError, match="was given as"):
        chart(grad_norm=[reading])
