"""The record: what is written comes back, within bounds, whatever its length."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sickbay.core import bounds, json_text, record
from sickbay.core.chart import Chart
from sickbay.core.packing import SCALAR, Row, merge, unpack_spans, unpack_tables
from sickbay.core.reader import _outstanding, chart_of, load_chart
from sickbay.core.record import RecordWriter

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RecordWriter]:
    made = RecordWriter(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("tail", [True, False])
def test_a_plain_step_is_its_readings_and_its_end(tmp_path: Path, tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it goes to the tail or, where there is none, to the file; first without numbers for its places, then with them."""
    if not tail:
        monkeypatch.setattr("sickbay.core.tail.Tail.keep", lambda *_: False)
    monkeypatch.setattr(record, "COMMIT_SECONDS", 60.0)
    plain, full = RecordWriter(tmp_path / "plain"), RecordWriter(tmp_path / "full")
    for step in range(6):
        readings = [("loss", 2.0 + step, "train.py:7"), ("grad_norm", 0.5, ""), ("learning_rate", 1e-3, "train.py:3")]
        plain.plain_step(readings)
        for name, value, source in readings:
            full.read(name, value, source=source)
        full.end_step()
        assert load_chart(plain.folder).last_step == step  # while it is being written, as after a kill
    assert plain.step == full.step == 6
    for name in ("loss", "grad_norm", "learning_rate"):
        assert rows_of(load_chart(plain.folder), name) == rows_of(load_chart(full.folder), name)
    plain.close()
    full.close()


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def rows_of(chart: Chart, name: str) -> list[tuple[Any, ...]]:
    return [(r.step, r.value, r.where, dict(r.note), r.source) for r in chart[name]]


def test_what_is_written_comes_back_live_and_from_disk(writer: RecordWriter) -> None:
    writer.fact("device", {"name": "cpu", "share": NAN})
    writer.fact("device", {"name": "cpu", "share": INF})
    writer.unobserved("dead_units", "the model has no ReLU")
    writer.read("loss", 2.5, source="train.py:7")
    writer.read("grad_norm", NAN)
    writer.read("future_influence", 0.5, where="h.0", note={"position": 3, "affected": [INF, -INF]})
    writer.read("nonfinite_step", NAN, note={"what": "loss"})
    writer.table("param_grad_norm", ("a", "b"), [0.1, NAN])
    writer.end_step()
    writer.read("loss", -INF)
    writer.read("loss", 1.5, step=0)
    writer.table("param_grad_norm", ("a", "b", "c"), np.array([1, 2, 3]))
    writer.end_step()
    for chart in (chart_of(writer), load_chart(writer.folder)):
        assert chart.facts["device"] == {"name": "cpu", "share": INF}
        assert chart.unobserved == {"dead_units": "the model has no ReLU"}
        assert sorted(rows_of(chart, "loss"), key=repr) == [(0, 1.5, "", {}, ""), (0, 2.5, "", {}, "train.py:7"), (1, -INF, "", {}, "")]
        assert math.isnan(chart["grad_norm"][0].value) and math.isnan(chart["nonfinite_step"][0].value)
        assert rows_of(chart, "future_influence") == [(0, 0.5, "h.0", {"position": 3, "affected": [INF, -INF]}, "")]
        assert chart["nonfinite_step"][0].note == {"what": "loss"}
        table = chart.table("param_grad_norm")
        assert table.places == ("a", "b", "c") and table.steps.tolist() == [0, 1] and table.counts.tolist() == [[1, 1, 0], [1, 1, 1]]
        assert repr([(r.step, r.where, r.value) for r in chart["param_grad_norm"]]) == repr(
            [(0, "a", float(np.float32(0.1))), (0, "b", NAN), (1, "a", 1.0), (1, "b", 2.0), (1, "c", 3.0)]
        )
        assert chart.last_step == 1 and 0 < chart["loss"][0].seconds < 60
    assert load_chart(writer.folder).facts["ranks"] == {"0": {"device": {"name": "cpu", "share": INF}}}


def test_flush_keeps_the_step_and_close_leaves_one_file(writer: RecordWriter) -> None:
    writer.read("loss", 1)
    writer.flush()
    writer.read("loss", 2)
    assert writer.step == 0
    writer.close()
    writer.read("loss", 3)
    writer.end_step()
    assert rows_of(load_chart(writer.folder), "loss") == [(0, 1.0, "", {}, ""), (0, 2.0, "", {}, "")]
    assert [path.name for path in writer.folder.iterdir()] == ["record-0.sqlite"]


def test_what_cannot_be_kept_is_named_and_nothing_is_raised(writer: RecordWriter) -> None:
    writer.read("grad_nrom", 1.0)
    writer.read("grad_norm", "much")  # type: ignore[arg-type]
    writer.table("weight_norm", ("a", "b"), [1.0])
    writer.read("loss", 1, where="\udcff", note={"odd": {1, 2}, "name": "\udcff", "number": np.float32(2)}, source="\udcff.py:1")
    writer.fact("\udcff", object())
    writer.read("exception", 1, where="\udcff", source="\udcff.py:1")
    writer.end_step()
    chart = chart_of(writer)
    assert writer.stopped == ""
    assert "could not convert" in chart.unobserved["grad_norm"]
    assert "2 places but values of shape (1,)" in chart.unobserved["weight_norm"]
    assert "grad_nrom" in chart.unobserved
    assert chart["loss"][0].note == {"odd": [1, 2], "name": "\udcff", "number": 2.0} and chart["loss"][0].where == "\udcff"
    assert chart["exception"][0].source == "\\udcff.py:1"


def test_a_long_note_is_cut_and_keeps_its_keys(writer: RecordWriter) -> None:
    writer.read("gradient_absent", 5, note={"names": [f"layer.{i}.weight" for i in range(50_000)], "op": "detach", "text": "x" * 99_999})
    note = chart_of(writer)["gradient_absent"][0].note
    assert note["op"] == "detach" and note["names"][:2] == ["layer.0.weight", "layer.1.weight"] and note["text"].startswith("xx")
    assert len(repr(note)) < 2 * json_text.MAX_NOTE


def test_the_file_stays_bounded_and_largest_and_sum_stay_exact(tmp_path: Path) -> None:
    limit, steps, places = 1 << 20, 12_000, tuple(f"h.{i}.weight" for i in range(40))
    rng = np.random.default_rng(0)
    loss, norms = rng.integers(-1000, 1000, steps), rng.integers(0, 100_000, (steps, 40)).astype(np.float32)
    writer, most = RecordWriter(tmp_path, max_bytes=limit), 0
    for step in range(steps):
        writer.read("loss", loss[step], source="train.py:3")
        writer.read("future_influence", float(loss[step]), note={"position": step})
        writer.table("param_grad_norm", places, norms[step])
        writer.end_step()
        if step % 500 == 0:
            most = max(most, disk_use(tmp_path))
            writer.read("nonfinite_step", step, note={"what": "gradient"})
    writer.flush()
    assert writer.stopped == "" and max(most, disk_use(tmp_path)) <= limit
    rows = [*writer.connection.execute("SELECT first, last, seconds, scalars, tables, extras FROM merged")]  # type: ignore[union-attr]
    spans = [span for row in rows for span in unpack_spans(Row(*row)).values()]
    writer.close()
    chart = load_chart(tmp_path)
    table = chart.table("param_grad_norm")
    assert (table.firsts[0], table.steps[-1]) == (0, steps - 1) and (table.firsts[1:] == table.steps[:-1] + 1).all()
    assert len(table) < steps // 4
    full = steps - int(table.steps[table.firsts != table.steps][-1]) - 1
    assert full >= bounds.NEWEST_FULL and np.array_equal(table.values[-full:], norms[-full:])
    assert np.array_equal(table.values[: bounds.FIRST_FULL], norms[: bounds.FIRST_FULL])
    assert np.array_equal(table.counts.sum(axis=0), [steps] * 40)
    for first, last, largest, total in zip(table.firsts, table.steps, table.values, table.sums, strict=True):
        assert np.array_equal(largest, norms[first : last + 1].max(axis=0))
        assert np.array_equal(total, norms[first : last + 1].astype(np.float64).sum(axis=0))
    kept = chart["loss"]
    assert all(reading.value == loss[reading.step] for reading in kept)  # merged or not, every reading is a real one
    assert kept[0].step == 0 and kept.worst().value == loss.max() and kept.least().value == loss.min()  # type: ignore[union-attr]
    assert all(r.note == {"position": r.step} for r in chart["future_influence"])
    merged = loss[bounds.FIRST_FULL : steps - full]
    assert sum(span.count for span in spans) == 2 * len(merged) and sum(span.sum for span in spans) == 2 * merged.sum()
    assert chart["nonfinite_step"].values == list(range(0, steps, 500))


def test_merging_ranks_nan_highest_and_follows_changing_places() -> None:
    layouts = {0: ("weight_norm", ("a", "b")), 1: ("weight_norm", ("b", "c"))}

    def layout_of(name: str, places: tuple[str, ...]) -> int:
        layouts.setdefault(2, (name, places))
        return 2

    def full(step: int, layout: int, values: list[float], loss: float) -> Row:
        head = np.array([1, layout], "<u4").tobytes()
        return Row(step, step, float(step), np.array([(0, loss)], SCALAR).tobytes(), head + np.array(values, "<f4").tobytes(), "")

    once = merge([full(0, 0, [1, 5], 3.0), full(1, 1, [7, INF], NAN)], False, layouts, layout_of)
    other = merge([full(2, 0, [NAN, 2], -1.0), full(3, 0, [4, 4], 9.0)], False, layouts, layout_of)
    both = merge([once, other], True, layouts, layout_of)
    widths = {layout: len(places) for layout, (_, places) in layouts.items()}
    [(layout, aggregate)] = unpack_tables(both.tables, widths, True)
    assert layouts[layout][1] == ("a", "b", "c") and (both.first, both.last, both.seconds) == (0, 3, 3.0)
    assert repr(aggregate.largest.tolist()) == "[nan, 7.0, inf]"
    assert repr(aggregate.sum.tolist()) == "[nan, 18.0, inf]" and aggregate.count.tolist() == [3, 4, 1]
    span = unpack_spans(both)[0]
    assert (span.count, span.first[:2], span.last[:2], span.least[:2]) == (4, (0, 3.0), (3, 9.0), (2, -1.0))
    assert span.largest[0] == 1 and math.isnan(span.largest[1])
    assert [step for step, _, _ in span.points()] == [0, 1, 2, 3]


def test_events_keep_the_first_and_the_newest(writer: RecordWriter) -> None:
    for step in range(3500):
        writer.read("skipped_step", 0)
        writer.read("dropped_backwards", step)
        writer.end_step()
    kept = chart_of(writer)["dropped_backwards"].values
    assert kept == [*range(1000), *range(2500, 3500)]


def test_events_with_long_notes_are_bounded_too(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, max_bytes=1 << 20)
    for step in range(2000):
        writer.read("exception", step, note={"message": f"{step} " + "x" * 2000})
        writer.end_step()
    kept = chart_of(writer)["exception"].values
    assert writer.stopped == "" and disk_use(tmp_path) <= 1 << 20
    assert kept[0] == 0 and kept[-1] == 1999 and len(kept) > 50
    writer.close()


def test_a_long_series_is_thinned_to_its_outstanding_values() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[123] = NAN
    at = _outstanding(values, 4000)
    assert len(at) <= 4000 and 0 in at and 123 in at and int(np.nanargmin(values)) in at and int(np.nanargmax(values)) in at
    assert np.array_equal(at[:64], np.arange(64)) and np.array_equal(at[-256:], np.arange(49_744, 50_000))
    assert np.array_equal(_outstanding(values[:4000], 4000), np.arange(4000))


def test_ranks_are_read_together(tmp_path: Path) -> None:
    for rank in range(2):
        writer = RecordWriter(tmp_path, rank)
        writer.fact("device", f"cuda:{rank}")
        writer.read("loss", 10 + rank)
        writer.read("exception", 1, note={"type": f"E{rank}"})
        writer.end_step()
        writer.close()
    (tmp_path / "record-1.stopped").write_text("step 7: disk full\n")
    chart = load_chart(tmp_path)
    assert chart["loss"].values == [10.0]
    assert [r.note for r in chart["exception"]] == [{"type": "E0"}, {"type": "E1", "rank": 1}]
    assert chart.facts["device"] == "cuda:0" and chart.facts["ranks"] == {"0": {"device": "cuda:0"}, "1": {"device": "cuda:1"}}
    assert chart.facts["recording_stopped"] == "rank 1, step 7: disk full"


def test_many_places_and_many_layouts_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_CHANNELS", 3)
    monkeypatch.setattr(record, "MAX_LAYOUTS", 1)
    writer = RecordWriter(tmp_path)
    for i in range(5):
        writer.read("activation_rms", i, where=f"h.{i}")
    writer.table("weight_norm", ("a",), [1])
    writer.table("weight_norm", ("b",), [2])
    chart = chart_of(writer)
    assert [r.where for r in chart["activation_rms"]] == ["h.0", "h.1", "h.2", "", ""]
    assert sorted(chart["weight_norm"].values) == [1.0, 2.0]
    writer.close()


def test_steps_too_large_for_the_bound_stop_recording_with_that_reason(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, max_bytes=1)
    places = tuple(str(i) for i in range(20_000))
    for _ in range(40):
        writer.table("weight_norm", places, np.ones(20_000))
        writer.end_step()
    assert f"limit of {record.MIN_BYTES:,} bytes" in writer.stopped and writer.step == 40
    writer.close()


def test_steps_between_two_commits_survive_a_kill(tmp_path: Path) -> None:
    """Fast steps are committed now and then; those in between are read from the tail, in order and in full."""
    program = (
        "import os, signal, sys\nfrom sickbay.core.record import RecordWriter\nwriter = RecordWriter(sys.argv[1])\n"
        "for step in range(300):\n    writer.read('loss', step)\n    writer.table('param_grad_norm', ('a', 'b'), [step, 2 * step])\n"
        "    writer.end_step()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "record-0.tail").stat().st_size > 0
    chart = load_chart(tmp_path)
    assert chart["loss"].values == list(range(300))
    assert chart.table("param_grad_norm").values[-1].tolist() == [299.0, 598.0]
