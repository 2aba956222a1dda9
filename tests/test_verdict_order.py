"""Which verdicts a checkup shows, in which order: causes over consequences, alarms over notes, and nothing that an alarm may explain."""

from __future__ import annotations

from sickbay.core.chart import Chart
from sickbay.core.condition import Condition, checkup
from sickbay.core.diagnosis import Diagnosis, Severity


def says(id_: str, severity: Severity | None, **rest: object) -> Condition:
    """A condition that finds itself with `severity`, or nothing."""
    found = None if severity is None else Diagnosis(f"{id_} is there", (), severity)
    return Condition(id_, "", (), lambda chart: found, (), **rest)  # type: ignore[arg-type]


def test_consequences_stand_beneath_their_cause_however_they_are_linked() -> None:
    found = checkup(
        Chart(),
        [
            says("late", "critical"),
            says("middle", None, leads_to=("late",)),
            says("root", "critical", leads_to=("middle",)),
            says("other", "warning"),
        ],
    )
    assert [(each.condition, each.explains) for each in found.diagnoses] == [("root", ("late",)), ("other", ())]
    assert found.healthy == ("middle",)


def test_a_note_does_not_hide_an_alarm() -> None:
    found = checkup(Chart(), [says("alarm", "critical"), says("note", "note", leads_to=("alarm",))])
    assert [each.condition for each in found.diagnoses] == ["alarm", "note"]


def test_a_note_that_presumes_health_is_made_beside_notes_alone() -> None:
    short = says("short", "note", presumes_health=True)
    assert [each.condition for each in checkup(Chart(), [short, says("small", "note")]).diagnoses] == ["short", "small"]
    sick = checkup(Chart(), [short, says("leak", "warning"), says("small", "note")])
    assert [each.condition for each in sick.diagnoses] == ["leak", "small"]
    assert sick.unexamined == {"short": "leak was found, and may be all there is to it"}


def test_an_alarm_is_made_whatever_it_presumes() -> None:
    found = checkup(Chart(), [says("untaught", "warning", presumes_health=True), says("leak", "critical")])
    assert [each.condition for each in found.diagnoses] == ["leak", "untaught"]
