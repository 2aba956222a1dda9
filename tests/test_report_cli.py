"""`sickbay report` and `sickbay diagnose` on a real record: what they print, where, and their exit codes; no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sickbay.cli.main import main
from sickbay.core.record import RecordWriter

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from sickbay.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def clean_run(tmp_path):
    """A recorded run with a falling loss."""
    folder = tmp_path / "clean"
    folder.mkdir()
    writer = RecordWriter(folder)
    writer.fact("device", "cpu")
    for step in range(20):
        writer.read("loss", 3.0 - step / 20)
        writer.read("learning_rate", 1e-3)
        writer.end_step()
    writer.close()
    (folder / "report.json").write_text(json.dumps({"schema": 1, "run": {"script": "fine.py", "exit_code": 0, "ended": "finished"}}))
    return folder


@pytest.fixture
def leaking_run(tmp_path):
    """A recorded run whose outputs depend on the future."""
    folder = tmp_path / "leaking"
    folder.mkdir()
    writer = RecordWriter(folder)
    for _ in range(3):
        writer.read("loss", 3.0)
        writer.read("target_offset", 1.0, note={"match": 1.0, "counted": 64})
        writer.read("future_influence", 0.8, where="model", note={"position": 5, "affected": [0, 1, 2, 3, 4]}, source="train.py:9")
        writer.end_step()
    writer.close()
    return folder


def test_text_goes_to_stdout_and_findings_are_exit_1(leaking_run, capsys):
    assert main(["report", str(leaking_run)]) == 1
    said = capsys.readouterr()
    assert "causal-leak  critical" in said.out
    assert "sickbay explain causal-leak" in said.out
    assert said.err == ""


def test_a_clean_run_is_exit_0_and_remembers_how_it_ended(clean_run, capsys):
    assert main(["report", str(clean_run)]) == 0
    assert capsys.readouterr().out.startswith("sickbay  fine.py  20 optimizer steps, finished\n")


def test_json_is_the_same_by_all_three_ways(leaking_run, capsys):
    outputs = []
    for words in (["report", "--json"], ["report", "--format", "json"], ["diagnose", "--json"]):
        assert main([words[0], str(leaking_run), *words[1:]]) == 1
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0]["diagnoses"][0]["condition"] == "causal-leak"


@pytest.mark.parametrize(("format_", "start"), [("html", "<!doctype html>"), ("markdown", "## SICK"), ("json", "{"), ("text", "sickbay")])
def test_every_format_goes_to_a_file(leaking_run, tmp_path, capsys, format_, start):
    target = tmp_path / "made" / "report"
    assert main(["report", str(leaking_run), "--format", format_, "--output", str(target)]) == 1
    assert target.read_text().startswith(start)
    assert capsys.readouterr().out == ""


def test_an_unwritable_output_is_exit_2_with_the_way_out(leaking_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(leaking_run), "--output", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_a_run_that_is_not_there_is_exit_2(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert str(tmp_path / "nowhere") in said.err
    assert said.err.count("\n") == 1


def test_diagnose_reads_several_runs(clean_run, leaking_run, capsys):
    assert main(["diagnose", str(clean_run), str(leaking_run), "--json"]) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["verdict"] == "sick", second["verdict"]) == (False, "sick")
    assert main(["diagnose", str(clean_run), str(leaking_run)]) == 1
    out = capsys.readouterr().out
    assert out.index(f"== {clean_run}") < out.index(f"== {leaking_run}") < out.index("causal-leak  critical")


def test_diagnose_asks_only_what_was_selected(leaking_run, capsys):
    assert main(["diagnose", str(leaking_run), "--ignore", "causal-leak", "--json"]) == 0
    assert "causal-leak" not in capsys.readouterr().out
    assert main(["diagnose", str(leaking_run), "--select", "nan,causal-leak", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert [d["condition"] for d in content["diagnoses"]] == ["causal-leak"]
    assert main(["diagnose", str(leaking_run), "--select", "causal-leek"]) == 2
    assert "did you mean causal-leak" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report", "--format", "html"], ["diagnose"]])
def test_no_torch_is_needed(leaking_run, words):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, words[0], str(leaking_run), *words[1:]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "causal-leak" in done.stdout
