"""How the reports put facts into words; every string that comes from the run passes through `one_line`."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from sickbay.core.chart import Chart
from sickbay.core.diagnosis import Checkup

LONGEST = 2000
CHAPTER_TITLES = {
    "nan": "NaN loss and gradients",
    "convergence": "Convergence",
    "memory": "Memory",
    "speed": "Speed",
    "generation": "Generation",
    "bugs": "Implementation bugs",
}


def one_line(value: object) -> str:
    """`value` as one line of printable characters: line ends become spaces, control and direction-changing characters their escapes."""
    text = " ".join(str(value).split())
    text = shorten(text, LONGEST)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters: the middle goes, since both ends of a path tell where it leads."""
    if len(text) <= width:
        return text
    left = max(1, (width - 3) // 3)
    return text[:left] + "..." + text[-(width - 3 - left) :]


def duration(seconds: float) -> str:
    """`seconds` as a person says it: 0.4 s, 41 s, 12 min 5 s, 3 h 20 min."""
    if not seconds < float("inf"):
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def num_steps(chart: Chart) -> int:
    """How many optimizer steps the run took: as recorded, else one more than the number of the last that updated (steps count from 0)."""
    if isinstance(chart.facts.get("steps"), int):
        return int(chart.facts["steps"])
    last = [chart[signal][-1].step for signal in ("learning_rate", "grad_norm") if len(chart[signal])]
    return max(last) + 1 if last else chart.last_step


def ended(facts: Mapping[str, Any]) -> str:
    """How the run ended: `finished`, `failed (exit code 1)`, `killed (SIGKILL)`; empty when it is not known."""
    how = one_line(facts.get("ended") or "")
    code, killer = facts.get("exit_code"), facts.get("signal")
    if killer:
        return f"{how or 'killed'} ({signal_name(killer)})"
    if isinstance(code, int) and code:
        return f"{how or 'ended'} (exit code {code})"
    return how


def signal_name(value: object) -> str:
    """The name of signal number `value`, or `value` itself in words."""
    try:
        return signal.Signals(int(str(value))).name
    except ValueError:
        return one_line(value)


def verdict_line(checkup: Checkup) -> str:
    """The verdict in one line: counts by severity, or that all is well, or that nothing could be judged."""
    counts = {level: sum(d.severity == level for d in checkup.diagnoses) for level in ("critical", "warning", "note")}
    plural = {
        "critical": "critical",
        "warning": "warnings" if counts["warning"] != 1 else "warning",
        "note": "notes" if counts["note"] != 1 else "note",
    }
    found = ", ".join(f"{count} {plural[level]}" for level, count in counts.items() if count)
    if checkup.verdict == "sick":
        return f"SICK: {found}"
    if checkup.verdict == "healthy":
        return f"HEALTHY: {len(checkup.healthy)} conditions examined, none found" + (f"; {found}" if found else "")
    return f"UNEXAMINED: {found or 'nothing could be judged'}"


def by_reason(unexamined: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The conditions not examined, gathered by reason, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for condition, reason in unexamined.items():
        groups.setdefault(reason, []).append(condition)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def recording_stopped(facts: Mapping[str, Any]) -> str:
    """When and why recording stopped; empty if it went on to the end."""
    return one_line(facts.get("recording_stopped") or facts.get("recording") or "")


def problem_texts(facts: Mapping[str, Any]) -> list[str]:
    """What went wrong inside sickbay itself, one line each, on every rank."""
    texts = [_problem(problem) for problem in _listed(facts.get("problems"))]
    ranks = facts.get("ranks")
    for rank, own in ranks.items() if isinstance(ranks, Mapping) else ():
        if str(rank) != "0" and isinstance(own, Mapping):
            texts += [f"rank {one_line(rank)}: {_problem(problem)}" for problem in _listed(own.get("problems"))]
    return texts


def _listed(problems: Any) -> list[Any]:
    return [problems] if isinstance(problems, (str, Mapping)) else list(problems or ())


def _problem(problem: Any) -> str:
    if isinstance(problem, Mapping) and {"probe", "error"} <= problem.keys():
        occasion = f", {problem['event']}" if "event" in problem else ""
        step = f" at step {problem['step']}" if "step" in problem else ""
        return one_line(f"{problem['probe']}{occasion}{step}: {problem['error']}")
    return one_line(", ".join(f"{k} {v}" for k, v in problem.items()) if isinstance(problem, Mapping) else problem)
