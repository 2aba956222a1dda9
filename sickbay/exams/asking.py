"""The one purse that all questions are paid from, so that however many there are, asking stays within its share of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sickbay.exams.fork import NoAnswer
from sickbay.patient import Patient

SHARE = 0.01  # of the run's time that questions after the first ones may take: half of the two percent that watching may cost


class Asking:
    """Puts questions with the probes silent. `spent`: seconds so far; `cost`: seconds of the newest question.

    A question costs the processor time it took, here and in the copy, where that is less than the time that passed: on a busy machine
    the same questions are asked as on a quiet one.
    """

    def __init__(self, patient: Patient, note_problem: Callable[[str, str, Exception], Any]) -> None:
        self.patient = patient
        self.spent = 0.0
        self.cost = 0.0
        self._note_problem = note_problem
        self._began = time.monotonic()
        self._hung = False

    def affordable(self) -> bool:
        """True while what was spent is less than the share of the run so far that questions may take."""
        return self.spent < SHARE * (time.monotonic() - self._began)

    def ask(self, question: Callable[[], Any]) -> Any:
        """`question()`'s answer, NoAnswer where it failed; never raises. A question that could change anything must fork (fork.ask)."""
        if self._hung:
            return NoAnswer("a question asked earlier gave no answer in time, so none is asked any more")
        began, worked = time.monotonic(), _processor_seconds()
        losses, calls = self.patient.losses, self.patient.calls
        self.patient.losses, self.patient.calls = list(losses), list(calls)
        self.patient.muted = True
        try:
            with torch._C._EnableTorchFunction():  # the loop tells its events with the script's modes off
                answer = question()
            self._hung = isinstance(answer, NoAnswer) and answer.hung
            return answer
        except Exception as problem:
            self._note_problem("examiner", "question", problem)
            return NoAnswer(f"the question failed: {type(problem).__name__}: {problem}"[:300])
        finally:
            self.patient.muted = False
            self.patient.losses, self.patient.calls = losses, calls
            self.cost = min(time.monotonic() - began, _processor_seconds() - worked)
            self.spent += self.cost
            self.patient.exam_seconds += time.monotonic() - began


def _processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    import resource  # not on every platform, but wherever there is a fork

    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
