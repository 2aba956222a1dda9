"""The memory chapter on made-up charts: sick, healthy, at the threshold, and too little seen."""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart
from tests.charts import chart
from tests.verdicts import ask, found, read, unexamined

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30


def leak(value: float = 12, kept: float = 12, **note: Any) -> Chart:
    holder = read("memory_holder", value, 12, "", "train.py:9", **{"kind": "graph", "path": "self.history", "type": "list", **note})
    return chart(kept_graphs=[0.0, 0.0, kept], memory_holder=[holder], resident_memory=[100.0, 300.0])


def test_memory_leak_names_its_holder() -> None:
    verdict = found("memory-leak", leak(freed=True), "warning")
    assert "`self.history` (list) keeps the autograd graphs of 12 steps" in verdict.summary and verdict.source == "train.py:9"
    grave = found("memory-leak", leak(freed=False, bytes=3 * MEBIBYTE), "critical")
    assert "with all activations, 3 MiB a step" in grave.summary
    assert "one ever longer graph" in found("memory-leak", leak(chain=True, type="tensor", path="total"), "warning").summary
    assert found("memory-leak", leak(value=10, kept=10), "warning"), "exactly at the threshold"
    assert ask("memory-leak", leak(value=9, kept=9)) is None


def test_what_is_bounded_is_no_leak() -> None:
    assert found("memory-leak", leak(bounded=True), "note")
    assert found("memory-leak", leak(drops=True, kept=29), "note")
    assert found("memory-leak", leak(drops=True, kept=30), "warning")


def grown(**note: Any) -> Chart:
    facts = {"kind": "tensors", "path": "cache", "type": "dict", "bytes": 100.0, "growth": 150.0, "whole": True, "drops": False, "steps": 6}
    return chart(kept_graphs=[0.0], memory_holder=[read("memory_holder", 6, 20, **{**facts, **note})])


def test_tensors_that_pile_up() -> None:
    assert "`cache` (dict) gained 6 tensors in 6 steps" in found("memory-leak", grown(), "warning").summary
    assert ask("memory-leak", grown(drops=True)) is None
    assert ask("memory-leak", grown(whole=False)) is None
    assert ask("memory-leak", grown(bytes=74.0)) is None
    assert ask("memory-leak", grown(bytes=74.0, graphs=6)) is None, "graphs of six steps: too few to tell"
    assert ask("memory-leak", grown(bytes=74.0, graphs=10, drops=True)) is None
    small = found("memory-leak", grown(bytes=74.0, graphs=36, others=5), "warning").summary
    assert "and 5 like it gained" in small and "each with the graph that made it" in small
    assert ask("memory-leak", chart(kept_graphs=[0.0, 1.0])) is None
    assert unexamined("memory-leak", chart(loss=[1.0]))


def parts(**sizes: float) -> list[Any]:
    return [read("memory_part", size, 0, name, how="predicted", rows=64) for name, size in sizes.items()]


def test_out_of_memory_says_what_fits() -> None:
    failed = read(
        "exception", 1, 3, "", "train.py:5", kind="out-of-memory", message="tried to allocate 9000000000 bytes", type="RuntimeError"
    )
    limit = read(
        "memory_limit", 8 * GIBIBYTE, 3, what="the process's data limit", asked=9e9, rows=64, blocks=[4 * GIBIBYTE] * 4, boundary=MEBIBYTE
    )
    sizes = {"weights": 1e8, "gradients": 1e8, "optimizer": 2e8, "activations": 16.0 * GIBIBYTE, "logits": 1e6}
    verdict = found("out-of-memory", chart(exception=[failed], memory_limit=[limit], memory_part=parts(**sizes)), "critical")
    assert "8.00 GiB (the process's data limit)" in verdict.summary and "activations 16.0 GiB" in verdict.summary
    assert "micro-batch 16 x 4 accumulation" in verdict.summary and verdict.source == "train.py:5"
    killed = found("out-of-memory", chart({"ended": "out-of-memory"}, loss=[1.0]), "critical")
    assert "killed" in killed.summary
    other = read("exception", 1, kind="other", message="boom", type="ValueError")
    assert ask("out-of-memory", chart({"ended": "failed"}, exception=[other])) is None


def measured(activations: float, blocks: int = 6) -> Chart:
    readings = [read("memory_part", size, 1, name, how="measured") for name, size in (("weights", 1e7), ("activations", activations))]
    inside = [read("block_activations", activations / (blocks + 1), 1, f"h.{i}", boundary=0) for i in range(blocks)]
    return chart(memory_part=readings, block_activations=inside)


def test_activation_memory() -> None:
    assert "checkpointing every 1 of 6 blocks" in found("activation-memory", measured(GIBIBYTE), "note").summary
    assert ask("activation-memory", measured(GIBIBYTE / 8)) is None, "nothing to gain"
    assert ask("activation-memory", measured(GIBIBYTE, blocks=2)) is None
    assert unexamined("activation-memory", chart(loss=[1.0]))


def vocabulary(value: float = 0.01, **note: Any) -> Chart:
    facts = {"rows": 50_000, "seen": 500, "tokens": 90_000, "share": 0.9, "weight_bytes": 3e7, "trained": True, "new_late": 0.0, **note}
    return chart(vocabulary_used=[read("vocabulary_used", value, step, "wte.weight", **facts) for step in (4, 8)])


def test_large_vocabulary() -> None:
    assert "500 of its 50,000 rows" in found("large-vocabulary", vocabulary(), "note").summary
    assert ask("large-vocabulary", vocabulary(0.5)) is None
    assert ask("large-vocabulary", vocabulary(share=0.49)) is None
    assert ask("large-vocabulary", vocabulary(weight_bytes=1e6)) is None
    assert "still coming" in unexamined("large-vocabulary", vocabulary(new_late=0.2))


def evaluated(kept: int, mode: str = "evaluation") -> Chart:
    return chart(loss=[1.0], evaluation_graphs=[read("evaluation_graphs", 9, 3, kept=kept, bytes=8, mode=mode)])


def test_evaluation_memory() -> None:
    assert "4 of the graphs were alive at once" in found("evaluation-memory", evaluated(4), "warning").summary
    assert found("evaluation-memory", evaluated(3), "note")
    assert ask("evaluation-memory", evaluated(9, "training")) is None
    outputs = [read("evaluation_outputs", GIBIBYTE, 3, forwards=40)]
    step = [read("memory_part", 1e8, 1, "weights", how="measured")]
    assert found("evaluation-memory", chart(evaluation_outputs=outputs, memory_part=step), "warning")
    assert (
        ask("evaluation-memory", chart(evaluation_outputs=outputs, memory_part=[read("memory_part", 2e9, 1, "weights", how="measured")]))
        is None
    )
