"""The demo plants, finds and cures by real runs; it says so in text and JSON, and admits what it misses."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from running import environment, sickbay

from sickbay import demonstration, registry
from sickbay.cli.main import main
from sickbay.reference.case import Case


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tour of two faults after a few healthy steps."""
    monkeypatch.setattr(demonstration, "TOUR", ("causal-leak", "shape-mismatch"))
    monkeypatch.setattr(demonstration, "HEALTHY_STEPS", 6)


def test_the_tour_crosses_both_chapters_and_every_stop_can_be_planted() -> None:
    chapters = {demonstration.chosen(id_).chapter for id_ in demonstration.TOUR}
    assert chapters == {"nan", "bugs"}
    assert 10 <= len(set(demonstration.TOUR)) == len(demonstration.TOUR)


@pytest.mark.usefixtures("short")
def test_the_tour_tells_what_is_planted_found_and_cured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 100
    assert "\x1b" not in shown
    for part in (
        "6/6  loss",
        "HEALTHY",
        "1/2  causal-leak",
        "Attention without its mask.",
        "future_influence",
        "conditions/bugs/causal_leak.py",
    ):
        assert part in shown
    assert "2 of 2 planted faults found, 2 cured" in shown
    (page,) = [line.removeprefix("report: ") for line in shown.splitlines() if line.startswith("report: ")]
    assert "shape-mismatch" in Path(page).read_text(encoding="utf-8")


@pytest.mark.usefixtures("short")
def test_json_holds_each_fault_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr()
    result: dict[str, Any] = json.loads(printed.out)
    assert (result["planted"], result["found"], result["cured"]) == (2, 2, 2)
    assert result["healthy"]["verdict"] == "healthy"
    assert [fault["report"]["diagnoses"][0]["condition"] for fault in result["faults"]] == ["causal-leak", "shape-mismatch"]
    assert "causal-leak" in printed.err, "the talk goes to stderr"


def test_one_fault_is_shown_with_its_card_and_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "label-misalignment", "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    for part in ("SICK: 1 critical", "shift-labels-once", "sickbay explain label-misalignment", "the same run without the fault: healthy"):
        assert part in shown
    assert (tmp_path / "demo" / "label-misalignment" / "report.json").is_file()


def test_a_fault_that_is_not_found_is_admitted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def harmless(case: Case) -> Case:
        """Nothing at all."""
        return case.but(steps=4)

    spared = dataclasses.replace(registry.conditions()["causal-leak"], inject=harmless)
    monkeypatch.setattr(demonstration, "conditions", lambda: {"causal-leak": spared})
    assert main(["demo", "causal-leak", "--out", str(tmp_path / "demo")]) == 1
    assert "nothing was named" in capsys.readouterr().out


def test_what_is_taken_out_is_the_fault_alone() -> None:
    healthy = Case()
    sick = demonstration.planted(registry.conditions()["accumulation-weighting"], healthy)
    cured = demonstration.without_fault(sick, healthy)
    assert (cured.accumulation, cured.config, cured.steps) == (sick.accumulation, sick.config, sick.steps)
    assert cured.backward is healthy.backward is not sick.backward


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["demo", "causal-leek"], "did you mean causal-leak"),
        (["demo", "bugs"], "is a chapter"),
        (["demo", "--out", "{taken}"], "not empty"),
        (["demo", "--out", "{taken}/file/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("taken", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([word.format(taken=tmp_path) for word in words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing was started"


def test_an_interrupt_ends_it_by_the_signal_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        sickbay("demo", "--out", "demo"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "the reports made so far are in demo" in out
    assert "Traceback" not in err
