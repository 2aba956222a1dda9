"""Holders, saved bytes, predictions and the plan, against models whose bytes are known by hand."""

from __future__ import annotations

import collections
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sickbay.cli.main import main
from sickbay.core import plan
from sickbay.core.reader import chart_of
from sickbay.core.record import RecordWriter
from sickbay.exams.footprint import blocks_of, kept_by, parts_of, without_memory
from sickbay.exams.holders import census, grown, holder_of_graphs
from sickbay.exams.reach import Reach, text_of
from sickbay.exams.saved import by_block, saved_bytes
from sickbay.exams.storing_lines import drops_elements, storing_line
from sickbay.patient import GRAPH_MARK, ForwardCall, Patient
from sickbay.probes import evaluation_memory
from sickbay.probes.loop import Loop
from sickbay.probes.retention import Mark
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder_decoder import Decoder, EncoderDecoder

HISTORY: list[Any] = []


def marked(model: nn.Module, step: int) -> tuple[torch.Tensor, weakref.ref[Mark]]:
    loss = model(torch.ones(2, 4)).sum()
    mark = Mark(step)
    loss.grad_fn.metadata[GRAPH_MARK] = mark
    return loss, weakref.ref(mark)


def test_a_list_of_losses_is_named_with_its_line() -> None:
    model, marks = nn.Linear(4, 4), []
    for step in range(12):
        loss, mark = marked(model, step)
        HISTORY.append({"loss": loss})
        marks.append(mark)
    answer = holder_of_graphs(sys._getframe(), marks, Patient())
    assert answer is not None
    assert (answer["path"], answer["type"], answer["count"]) == ("HISTORY", "list", 11), "the newest hangs on `loss` too"
    assert answer["freed"] is False and answer["bytes"] > 0
    line = int(answer["source"].rpartition(":")[2])
    assert "HISTORY.append" in Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]
    HISTORY.clear()


def test_a_running_sum_is_one_long_graph() -> None:
    model, marks, total = nn.Linear(4, 4), [], torch.zeros(())
    for step in range(12):
        loss, mark = marked(model, step)
        total = total + loss
        marks.append(mark)
    answer = holder_of_graphs(sys._getframe(), marks, Patient())
    assert answer is not None and answer["chain"] and (answer["path"], answer["count"]) == ("total", 12)


def test_what_only_cycles_keep_is_no_leak() -> None:
    model, marks = nn.Linear(4, 4), []
    for step in range(12):
        loss, mark = marked(model, step)
        ring: list[Any] = [loss]
        ring.append(ring)
        marks.append(mark)
        del ring, loss
    assert holder_of_graphs(sys._getframe(), marks, Patient()) is None


def test_the_container_that_grows_is_found_and_a_bounded_one_is_not() -> None:
    pile, window = [torch.zeros(8)], collections.deque([torch.zeros(8)], maxlen=100)
    before = census(sys._getframe())
    window.extend(torch.zeros(8) for _ in range(6))
    assert grown(sys._getframe(), before, 6) is None
    pile.extend(torch.zeros(1000) for _ in range(6))
    answer = grown(sys._getframe(), before, 6)
    assert answer is not None and answer["path"] == "pile" and answer["bytes"] == pytest.approx(4000)


def test_lists_that_grow_alike_are_counted_together_and_one_is_named() -> None:
    def keep(count: int) -> None:
        for part in model:
            part.maps = [*getattr(part, "maps", ()), *(part(torch.ones(1, 4)) for _ in range(count))]

    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    keep(1)
    before = census(sys._getframe())
    keep(6)
    answer = grown(sys._getframe(), before, 6)
    assert answer is not None and answer["path"] == "model._modules['0'].maps" and answer["type"] == "list"
    assert (answer["count"], answer["others"], answer["graphs"]) == (18, 2, 21)


def test_paths_lead_through_closures_attributes_and_slots() -> None:
    class Holder:
        __slots__ = ("kept",)

    holder = Holder()
    holder.kept = {"a": [torch.zeros(1)]}

    def make() -> Any:
        hidden = torch.zeros(2)
        return lambda: hidden

    closure = make()
    names = {text_of(found.path) for found in Reach(sys._getframe()).found}
    assert "holder.kept['a'][0]" in names
    assert "closure.<hidden>" in names and closure().shape == (2,)


def test_lines_that_store_and_lines_that_drop(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text("kept = []\nfor i in range(3):\n    kept.append(i)\n    if i: kept.pop(0)\nrarest_yet = {}\nrarest_yet['x'] = 1\n")
    assert storing_line(("kept", "[0]"), str(file), "") == f"{file}:3"
    assert storing_line(("rarest_yet",), str(file), "") == f"{file}:6"
    assert drops_elements(("kept",), str(file)) and not drops_elements(("rarest_yet",), str(file))


def test_saved_bytes_of_a_chain_are_those_computed_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    x = torch.ones(3, 4)
    out = model(x).sum()
    assert saved_bytes([out]) == (4 * (3 * 4 + 3 * 8), False), "the input and tanh's result; the second matmul shares it"
    names = {id(p): f"h.{n}" for n, p in model.named_parameters()}
    assert sum(by_block([out], names).values()) == 4 * (3 * 4 + 3 * 8)
    out.backward()
    assert saved_bytes([out]) == (0, True)


def test_a_prediction_without_memory_equals_the_real_graph() -> None:
    def build() -> nn.Module:
        layers = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(4)]
        return nn.Sequential(*layers)

    with without_memory():
        model = build()
        kept = kept_by(model, lambda: model(torch.zeros(5, 16)))
    real = build()
    out = real(torch.zeros(5, 16))
    assert sum(kept.blocks.values()) + kept.around == saved_bytes([out])[0]
    assert len(kept.blocks) == 4
    parts = parts_of(real, kept, 5)
    assert parts.weights == sum(p.nbytes for p in real.parameters()) and parts.optimizer == 2 * parts.weights


def test_the_arithmetic_of_fits() -> None:
    parts = plan.Parts(100, 100, 200, (1000.0,) * 9, 50, 10, 0, 0, rows=8)
    assert parts.of_rows(4).activations == pytest.approx(parts.activations / 2)
    assert parts.checkpointed(3).activations == pytest.approx(3 * 1000 + 2 * 10 + 50)
    assert plan.best_segment(parts) == 1
    first = plan.fits(parts, 8, 6000)[0]
    assert first.rows == 4 and first.accumulation == 2 and first.peak <= 6000
    assert plan.fits(parts, 8, 100) == []
    made = plan.schedule(1000, 1e-3)
    assert made.at(made.warmup) == pytest.approx(1e-3) and made.at(1000) == made.at(5000) == pytest.approx(1e-4)


def test_plan_prints_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["--dim", "32", "--layers", "2", "--vocab", "100", "--context", "16"]
    assert main(["plan", *model, "--memory", "1GiB", "--tokens", "1e5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"]["layers"] == 2 and answer["fits"]["ways"][0]["rows"] == 8
    assert answer["data"]["compute_optimal_parameters"] == 5000
    assert main(["plan", "--tokens", "5e6"]) == 0
    assert "disagree" in capsys.readouterr().out
    broken = tmp_path / "config.json"
    broken.write_text("{")
    for words in (
        [],
        ["nothing-such"],
        [str(broken)],
        [*model, "--memory", "much"],
        ["--layers", "3"],
        ["--tokens", "-1"],
        ["json:nothing"],
    ):
        assert main(["plan", *words]) == 2, words
        assert capsys.readouterr().err.startswith("sickbay plan: ")


def test_of_an_encoder_decoder_both_sides_are_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def planned(target: str) -> Any:
        assert main(["plan", target, "--length", "16", "--batch", "2", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "decoder_start_token_id": 0, **sizes}))
    folder, function = planned(str(tmp_path)), planned("test_memory:both_sides")
    assert folder["model"]["layers"] == 4 and function["model"]["layers"] == 5
    assert function["step"]["logits"] == 2 * 16 * 50 * 4
    names = [name for name, _ in blocks_of(both_sides())]
    assert names == ["encoder.blocks.0", "encoder.blocks.1", "decoder.blocks.0", "decoder.blocks.1", "decoder.blocks.2"]


def both_sides() -> nn.Module:
    model = EncoderDecoder(Config(dim=16, num_layers=2, num_heads=4, vocab_size=50, context=16))
    model.decoder = Decoder(replace(model.config, num_layers=3))
    return model


def test_a_head_of_two_layers_is_no_side_of_the_model() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2)]
    model = nn.ModuleDict({"body": nn.ModuleList(layers), "head": nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))})
    assert [name for name, _ in blocks_of(model)] == ["body.0", "body.1"]


@pytest.mark.parametrize(("how", "rows"), [("joined", 21), ("listed", 24), ("reduced", 0)])
def test_outputs_of_an_evaluation_are_seen_where_they_lie(how: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight batches of three rows; what is joined lacks the batch that has just come."""
    monkeypatch.setattr(evaluation_memory, "_MANY", 1)
    monkeypatch.setattr(evaluation_memory, "_WORTH", 1)
    patient, record, model = Patient(), RecordWriter(tmp_path, 0), nn.Linear(4, 50)
    probe = evaluation_memory.EvaluationMemory(patient, record, Loop(patient, record))
    probe._trained.add(model)
    kept: list[torch.Tensor] = []
    for _ in range(8):
        with torch.no_grad():
            output = model(torch.ones(3, 5, 4))
        probe.forward_end(ForwardCall(model, (), {}, False, False, torch.get_rng_state(), "eval.py:1"), output)
        if how == "joined":
            kept = [torch.cat([*kept, output])]
        else:
            kept.append(output if how == "listed" else output.argmax(-1))
        del output
    found = chart_of(record)["evaluation_outputs"]
    assert (found[-1].value if found else 0) == rows * 5 * 50 * 4


@pytest.mark.parametrize(("kept", "graphs"), [(99, 4), (1, 0)], ids=["all of them", "the newest"])
def test_graphs_of_short_evaluations_are_seen_when_they_outlive_others(kept: int, graphs: int, tmp_path: Path) -> None:
    patient, record, model = Patient(), RecordWriter(tmp_path, 0), nn.Linear(4, 5)
    probe = evaluation_memory.EvaluationMemory(patient, record, Loop(patient, record))
    probe._trained.add(model)
    held: list[torch.Tensor] = []
    for _ in range(4):
        model.eval()
        for _ in range(2):
            held = [*held, model(torch.ones(3, 4))][-kept:]
            probe.forward_end(ForwardCall(model, (), {}, True, False, torch.get_rng_state(), "eval.py:1"), held[-1])
        probe.backward_begin(model.train()(torch.ones(3, 4)).sum(), "backward")
        record.end_step()
    found = [reading.value for reading in chart_of(record)["evaluation_graphs"]]
    assert max(found, default=0) == graphs
