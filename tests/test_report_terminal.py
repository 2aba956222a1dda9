"""The closing card: its form, its bounds, and that no string from the run can act on a terminal."""

from __future__ import annotations

import io

import pytest
import report_samples as samples
from rich.cells import cell_len

from sickbay import registry
from sickbay.core.chart import Chart, Reading
from sickbay.core.diagnosis import Checkup
from sickbay.report import markdown, terminal
from sickbay.report.words import duration, ended, num_steps, one_line, shorten


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "conditions", samples.known_conditions)
    monkeypatch.setattr(registry, "treatments", samples.known_treatments)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_card_says_what_where_by_which_numbers_and_the_way_out():
    text = terminal.plain_card(samples.sick_chart(), samples.sick_checkup(), "runs/x/report.html")
    assert text.splitlines() == [
        "sickbay  train.py  412 optimizer steps in 41 s, failed (exit code 1)",
        "SICK: 1 critical, 1 warning",
        "",
        "1 exploding-gradients  critical  step 400  transformer.h.3.attn.c_proj.weight  (train.py:88)",
        "  The gradient norm rose from a median of 1.2 to 18,400 within 40 steps and ended in NaN.",
        "  grad_norm 18,400 (limit 10 L2 norm); grad_norm at the end inf L2 norm",
        "  leads to non-finite-weights",
        "  clip-gradients [changes-training]: clip the global gradient norm before the optimizer's step",
        "  sickbay explain exploding-gradients",
        "",
        "2 causal-leak  warning, likely  step 1",
        "  Changing token 5 changes the outputs before it.",
        "  future_influence 0.7 (limit 1e-06 ratio)",
        "  fix-mask [advice]: pass is_causal=True   |   sickbay explain causal-leak",
        "",
        "healthy 1   not examined 1",
        "  no padding was seen: padding-attended",
        "report runs/x/report.html",
    ]


def test_a_healthy_run_and_an_unexamined_one_say_so():
    assert "HEALTHY: 2 conditions examined, none found\n" in terminal.plain_card(Chart(), samples.healthy_checkup())
    assert "UNEXAMINED: nothing could be judged\n" in terminal.plain_card(Chart(), Checkup((), (), {"causal-leak": "no loss"}))


@pytest.mark.parametrize("width", [24, 40, 80, 100, 200])
@pytest.mark.parametrize("copies", [0, 1, 2, 30])
@pytest.mark.parametrize("case", ["sick", "hostile"])
def test_the_card_stays_within_its_lines_and_columns(width: int, copies: int, case: str):
    chart = samples.sick_chart(5) if case == "sick" else samples.hostile_chart()
    one = samples.sick_checkup() if case == "sick" else samples.hostile_checkup()
    many = Checkup(one.diagnoses * copies, ("data-repeats",), {f"condition-{i}": f"reason {i} " + "x" * 300 for i in range(60)})
    lines = terminal.plain_card(chart, many, "/a/long/path/" + "d" * 60 + "/report.html", width).splitlines()
    assert len(lines) <= terminal.MAX_LINES
    assert max(cell_len(line) for line in lines) <= width
    if copies:
        assert "exploding-gradients" in "".join(lines)
    assert "".join(line.strip() for line in lines).endswith("report.html")


def test_findings_that_do_not_fit_are_named():
    text = terminal.plain_card(samples.sick_chart(5), Checkup(samples.sick_checkup().diagnoses * 12))
    shown = sum(line.startswith(tuple(f"{rank} " for rank in range(1, 25))) for line in text.splitlines())
    assert f"and {24 - shown} more: " in text
    everything = terminal.plain_card(samples.sick_chart(5), Checkup(samples.sick_checkup().diagnoses * 12), max_lines=None)
    assert "more:" not in everything
    assert "24 causal-leak" in everything


def test_a_file_gets_plain_text_and_a_terminal_gets_colours():
    plain, coloured = io.StringIO(), Terminal()
    terminal.show(samples.sick_chart(5), samples.sick_checkup(), file=plain)
    terminal.show(samples.sick_chart(5), samples.sick_checkup(), file=coloured)
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[1;31m" in coloured.getvalue()
    assert plain.getvalue().isascii()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_no_string_from_the_run_acts_on_the_terminal(stream):
    file = stream()
    terminal.show(samples.hostile_chart(), samples.hostile_checkup(), samples.HOSTILE, file=file)
    text = file.getvalue()
    assert "[red]bold" in text.replace("\n", "").replace("  ", "")  # rich's markup is shown, not obeyed
    assert "\x1b[31m{{" not in text
    assert "\u202e" not in text
    assert "\\u202e" in text
    assert "\\x1b[31m" in text.replace("\n", "")


def test_an_ascii_only_stream_loses_nothing_but_the_typography():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    chart = Chart(facts={"script": "tränieren×2.py"})
    terminal.show(chart, samples.healthy_checkup(), file=file)
    file.flush()
    assert b"tr\\xe4nierenx2.py" in raw.getvalue()


def test_problems_and_a_stopped_recording_are_told():
    chart = Chart(facts={"problems": ["probe gradients: RuntimeError: x", "b", "c"], "recording": "step 7: disk full"})
    text = terminal.plain_card(chart, Checkup())
    assert "recording stopped: step 7: disk full" in text
    assert "sickbay's own problem: probe gradients: RuntimeError: x" in text
    assert "and 1 more in the report" in text
    failed = {"probe": "gradients", "event": "step", "step": 3, "error": "RuntimeError('x')"}
    chart = Chart(facts={"recording_stopped": "step 9: read-only", "problems": [failed], "ranks": {"0": {}, "1": {"problems": ["lost"]}}})
    text = terminal.plain_card(chart, Checkup())
    assert "recording stopped: step 9: read-only" in text
    assert "sickbay's own problem: gradients, step at step 3: RuntimeError('x')" in text
    assert "sickbay's own problem: rank 1: lost" in text


def test_words():
    assert one_line("a\nb\tc\x00\u2028d") == "a b c\\x00 d"
    assert one_line("\udcff") == "\\udcff"
    assert shorten("transformer.h.11.attn.c_proj.weight", 20) == "trans..._proj.weight"
    assert len(shorten("x" * 100, 20)) == 20
    assert [duration(s) for s in (0.44, 41.2, 725, 12000, float("nan"))] == ["0.4 s", "41 s", "12 min 5 s", "3 h 20 min", "unknown time"]
    assert ended({"ended": "killed", "signal": 9, "exit_code": -9}) == "killed (SIGKILL)"
    assert ended({"ended": "failed", "exit_code": 3}) == "failed (exit code 3)"
    assert ended({"ended": "finished", "exit_code": 0}) == "finished"
    assert ended({}) == ""


def test_the_number_of_steps_is_the_recorded_one_or_counted_from_the_updates():
    updates = [Reading(step, "learning_rate", 1e-3) for step in range(20)]
    failed = Reading(20, "exception", 1.0)  # in the forward of a step that never came
    assert num_steps(Chart([*updates, failed])) == 20
    assert num_steps(Chart([*updates, failed], {"steps": 7})) == 7
    assert num_steps(Chart()) == 0


def test_markdown_shows_findings_and_disarms_the_runs_strings():
    text = markdown.markdown(samples.sick_chart(), samples.sick_checkup())
    assert text.startswith("## SICK: 1 critical, 1 warning\n")
    assert "### 1. exploding-gradients (critical)" in text
    assert "- At step 400, `transformer.h.3.attn.c_proj.weight`, `train.py:88`" in text
    assert "**clip-gradients** (changes-training)" in text
    hostile = markdown.markdown(samples.hostile_chart(), samples.hostile_checkup())
    assert "\n- At step 2, ``" in hostile  # a fence longer than the backtick inside
    outside = "".join(part for i, part in enumerate(hostile.split("``")) if i % 2 == 0)
    assert "<script>" not in outside
    assert "\\<script\\>" in outside
