"""What a checklist answers: one row per exam, the findings (root causes first), and the whole as text or data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sickbay.core.diagnosis import Severity, number

Verdict = Literal["ok", "found", "not examined"]


@dataclass(frozen=True)
class Finding:
    """One fault that an exam found. `condition`: its id in the catalogue; `value` against `limit` in `unit`; `cure`: what to do."""

    condition: str
    summary: str
    severity: Severity = "warning"
    where: str = ""
    source: str = ""
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    cure: str = ""
    certainty: str = "confirmed"
    explains: tuple[str, ...] = ()

    @property
    def numbers(self) -> str:
        """`value unit (limit)`; "" if there is none."""
        if self.value is None:
            return ""
        limit = f" (limit {number(self.limit)})" if self.limit is not None else ""
        return f"{number(self.value)}{' ' + self.unit if self.unit else ''}{limit}"


@dataclass(frozen=True)
class Row:
    """One exam's verdict. `text`: what was measured, or why it was not; `conditions`: the findings it is about; `data`: its numbers."""

    exam: str
    verdict: Verdict
    text: str
    conditions: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Checklist:
    """All rows and findings of one checkup. `stopped`: why it ended early; "" if it did not."""

    target: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    healthy: tuple[str, ...] = ()
    unexamined: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    stopped: str = ""

    @property
    def verdict(self) -> Literal["sick", "healthy", "unexamined"]:
        """`sick` with any critical or warning; `unexamined` where no exam could be made."""
        if any(finding.severity != "note" for finding in self.findings):
            return "sick"
        return "healthy" if any(row.verdict != "not examined" for row in self.rows) else "unexamined"

    def row(self, exam: str) -> Row:
        """The row of `exam`. Raises KeyError if it was not asked for."""
        for row in self.rows:
            if row.exam == exam:
                return row
        raise KeyError(exam)

    def as_data(self) -> dict[str, Any]:
        """The whole as what JSON can hold, numbers that are not finite as strings."""
        from sickbay.report.record import chapter_of, jsonable, version

        content = {
            "schema": 1,
            "sickbay": version(),
            "target": self.target,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
            "stopped": self.stopped or None,
            "exams": [
                {
                    "exam": row.exam,
                    "verdict": row.verdict,
                    "text": row.text,
                    "conditions": list(row.conditions),
                    "seconds": round(row.seconds, 2),
                    "data": dict(row.data),
                }
                for row in self.rows
            ],
            "findings": [
                {
                    "condition": finding.condition,
                    "chapter": chapter_of(finding.condition),
                    "severity": finding.severity,
                    "certainty": finding.certainty,
                    "where": finding.where,
                    "source": finding.source,
                    "summary": finding.summary,
                    "value": finding.value,
                    "limit": finding.limit,
                    "unit": finding.unit,
                    "cure": finding.cure,
                    "explains": list(finding.explains),
                }
                for finding in self.findings
            ],
            "healthy": list(self.healthy),
            "unexamined": [{"condition": id_, "reason": reason} for id_, reason in self.unexamined.items()],
            "problems": list(self.problems),
        }
        cleaned: dict[str, Any] = jsonable(content)
        return cleaned

    def __str__(self) -> str:
        from sickbay.checklist.show import plain

        return plain(self)

    def _repr_html_(self) -> str:
        from sickbay.checklist.show import html

        return html(self)
