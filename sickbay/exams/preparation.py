"""Which line made a NaN before the model was called: a batch divided by its deviation of zero, the logarithm of a count.

Nothing watches the script while it prepares a batch, and what it did there leaves no graph. But a line that made a NaN once mostly
does so again: after a NaN that came from outside the model, what is computed before the next few forwards is looked at closely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.exams.asking import Asking
from sickbay.exams.nonfinite import born
from sickbay.exams.operand import kinds
from sickbay.exams.ungraded import Birth, Ungraded
from sickbay.patient import ForwardCall, Patient, tensors_in
from sickbay.probes.loop import Loop
from sickbay.probes.loss_lines import LossLines
from sickbay.probes.token_inputs import arguments

SIGNALS = ("first_nonfinite",)

_LOOKS = 4  # steps looked at
# What makes a NaN or an infinity of finite numbers by itself; a fill with infinities is meant.
_RISKY = frozenset({"div", "reciprocal", "true_divide", "rsqrt", "log", "log2", "log10", "log1p", "sqrt", "pow", "std", "var", "mean"})
_EVENTS = ("round_end", "forward_begin")


class Preparation:
    """Waits for a NaN nobody can explain, then looks at what comes before the next forwards until one of them explains it."""

    SIGNALS = SIGNALS

    def __init__(self, record: RecordWriter, loop: Loop) -> None:
        self.record, self.loop = record, loop
        self._step = -1
        self._made = Ungraded(only_bad=True)
        self._lines = LossLines(steps=1 + _LOOKS, told=lambda function, args, result, _: self._made.note(function, args, result))

    def from_outside(self) -> None:
        """A NaN of this step was there before the model was called, or came into the loss as a constant."""
        if self._step < 0:
            self._step = self.record.step
            for event in _EVENTS:
                self.loop.on(event, self, getattr(self, event))

    def round_end(self, step: int) -> None:
        self._lines.end_step()
        self._made.forget()
        if self._lines.learning:
            self._lines.begin()
        else:
            self._stop()

    def forward_begin(self, call: ForwardCall) -> None:
        self._lines.end()
        birth = next(self._births(call), None)
        if birth is not None:
            found = born(birth, "data", "the operations before the next forward were looked at")
            note = {**found.note, "seen_again": self.record.step}
            self.record.read("first_nonfinite", found.value, note=note, source=found.source, step=self._step)
            self._stop()

    def _births(self, call: ForwardCall) -> Iterator[Birth]:
        """What made an input of `call` non-finite; else what made a constant NaN or infinite, but for the -inf of an additive mask."""
        inputs = [(name, tensor) for name, value in arguments(call).items() if "mask" not in name for _, tensor in tensors_in(value)]
        births = [self._made.birth(tensor) for _, tensor in inputs if _whole(tensor) and kinds(tensor)]
        newest = self._made.newest()
        others = [newest] if newest is not None and kinds(newest.result) != {"-inf"} else []
        return (birth for birth in (*births, *others) if birth is not None and birth.op in _RISKY)

    def _stop(self) -> None:
        self._lines.end()
        self._made.forget()
        for event in _EVENTS:
            self.loop.off(event, self)


def _whole(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.device.type == "cpu"


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on a NaN that came from outside the model is looked for before the next forwards."""
    exam = Preparation(record, loop)
    loop.on("from_outside", exam, exam.from_outside)
    return exam._lines.end
