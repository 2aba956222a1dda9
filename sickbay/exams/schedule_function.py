"""Asks a schedule written as a function what it plans, in a forked copy: whatever the function counts, prints or draws stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sickbay.core.rates import Plan, plan_of_function
from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.patient import Patient

FEEDS = ("scheduler_steps",)  # of the probe that asks

_SECONDS = 5.0  # after which a function that answers a thousand times is given up
_MOST = 4  # schedulers asked: each is a copy of the process, a few milliseconds


class ScheduleFunction:
    """Answers the event `schedule_function(function, take)` by calling `take(plan)`; silent where no copy can be made."""

    SIGNALS: tuple[str, ...] = ()

    def __init__(self, asking: Asking) -> None:
        self.asking = asking
        self._asked = 0

    def schedule_function(self, function: Callable[[int], Any], take: Callable[[Plan], None]) -> None:
        if self._asked >= _MOST:
            return
        self._asked += 1
        answer = self.asking.ask(lambda: fork.ask(lambda: dataclasses.asdict(plan_of_function(function)), _SECONDS))
        if isinstance(answer, dict):
            take(Plan(**answer))


def attach(patient: Patient, record: RecordWriter, loop: Any, asking: Asking) -> Callable[[], None]:
    """From now on schedules that are functions are asked for their plan, once each."""
    exam = ScheduleFunction(asking)
    loop.on("schedule_function", exam, exam.schedule_function)
    return lambda: None
