"""report.json: schema 1, strictly valid, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest
import report_samples as samples

from sickbay import registry
from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup
from sickbay.report import record
from sickbay.report.write import write_report, write_whole

KEYS = {"schema", "sickbay", "run", "verdict", "diagnoses", "healthy", "unexamined", "treatments", "problems", "recording"}
RUN_KEYS = {
    "script", "argv", "started", "seconds", "steps", "exit_code", "signal", "ended", "world_size", "device", "torch", "overhead",
}  # fmt: skip
DIAGNOSIS_KEYS = {
    "condition", "chapter", "severity", "certainty", "step", "seconds", "where", "source", "summary", "evidence", "explains", "fix",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "conditions", samples.known_conditions)
    monkeypatch.setattr(registry, "treatments", samples.known_treatments)


def strict(text: str) -> dict:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_sick_run_has_every_key_of_schema_1():
    content = strict(record.to_json(record.report(samples.sick_chart(), samples.sick_checkup())))
    assert content.keys() == KEYS
    assert content["run"].keys() == RUN_KEYS
    assert content["schema"] == 1
    assert content["verdict"] == "sick"
    assert content["run"]["overhead"] == {"share_of_step_time": 0.018, "how": "time inside hooks over wall time"}
    first, second = content["diagnoses"]
    assert first.keys() == DIAGNOSIS_KEYS
    assert (first["condition"], first["chapter"], first["source"]) == ("exploding-gradients", "nan", "train.py:88")
    assert first["explains"] == ["non-finite-weights"]
    assert first["fix"] == {
        "treatment": "clip-gradients",
        "safety": "changes-training",
        "summary": "clip the global gradient norm before the optimizer's step",
        "patch": None,
    }
    seen = first["evidence"][0]
    assert (seen["signal"], seen["step"], seen["value"], seen["limit"], seen["unit"]) == ("grad_norm", 412, 18400.0, 10.0, "L2 norm")
    assert second["certainty"] == "likely"
    assert content["healthy"] == ["data-repeats"]
    assert content["unexamined"] == [{"condition": "padding-attended", "reason": "no padding was seen"}]


def test_an_empty_run_has_every_key_too():
    content = strict(record.to_json(record.report(Chart(), Checkup())))
    assert content.keys() == KEYS
    assert content["run"].keys() == RUN_KEYS
    assert content["verdict"] == "unexamined"
    assert content["run"]["overhead"] == {"share_of_step_time": None, "how": "not measured"}


def test_a_finding_without_a_treatment_has_no_fix():
    checkup = samples.sick_checkup()
    registry_without = samples.sick_checkup().diagnoses[0].__class__(summary="s", evidence=(), severity="note", condition="unheard-of")
    content = record.report(Chart(), Checkup((registry_without, *checkup.diagnoses)))
    assert content["diagnoses"][0]["fix"] is None
    assert content["diagnoses"][0]["chapter"] == ""


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_number_that_is_not_finite_is_text_that_float_reads_back(value: float, text: str):
    assert record.jsonable(value) == text
    assert str(float(record.jsonable(value))) == str(value)


def test_hostile_strings_survive_as_they_are():
    content = strict(record.to_json(record.report(samples.hostile_chart(), samples.hostile_checkup())))
    assert content["run"]["script"] == samples.HOSTILE
    assert content["run"]["argv"] == [samples.HOSTILE, "café", "\\udcff"]
    assert content["run"]["seconds"] == "NaN"
    assert content["diagnoses"][0]["evidence"][0]["value"] == "NaN"
    assert content["diagnoses"][0]["evidence"][0]["limit"] == "Infinity"
    assert content["problems"] == [samples.HOSTILE, {"probe": samples.HOSTILE}]
    assert content["recording"] == samples.HOSTILE


def test_write_report_leaves_two_whole_files_and_nothing_else(tmp_path):
    folder = tmp_path / "new" / "run"
    assert write_report(folder, samples.sick_chart(), samples.sick_checkup()) is None
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert strict((folder / "report.json").read_text())["verdict"] == "sick"
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def test_a_folder_that_cannot_be_made_is_told_not_raised(tmp_path):
    (tmp_path / "file").write_text("in the way")
    problem = write_report(tmp_path / "file" / "run", Chart(), Checkup())
    assert problem is not None
    assert "report.json could not be written" in problem
    assert "report.html could not be written" in problem
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_page_that_cannot_be_drawn_costs_only_the_page(tmp_path, monkeypatch):
    from sickbay.report import heatmap

    monkeypatch.setattr(heatmap, "grid", lambda *_: 1 / 0)
    problem = write_report(tmp_path, samples.sick_chart(), samples.sick_checkup())
    assert problem == "report.html could not be made: ZeroDivisionError: division by zero"
    assert strict((tmp_path / "report.json").read_text())["verdict"] == "sick"


def test_reports_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "other").write_text("")
    write_whole(tmp_path / "report.json", "{}")
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_facts_are_remembered_from_an_earlier_report(tmp_path):
    assert record.remembered_facts(tmp_path) == {}
    write_report(tmp_path, samples.sick_chart(), samples.sick_checkup())
    facts = record.remembered_facts(tmp_path)
    assert (facts["exit_code"], facts["ended"], facts["argv"]) == (1, "failed", ["--lr", "3e-3"])
    (tmp_path / "report.json").write_text("[1")
    assert record.remembered_facts(tmp_path) == {}
