"""The named backward returns the derivative of its forward.

Advice: `torch.autograd.gradcheck(Function.apply, inputs)` with small float64 inputs that require a gradient shows which entry is off;
write the derivative of each line of forward in reverse order. Often the simplest cure is to delete the Function and call its forward's
operations, whose backward autograd knows.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="check-backward",
    safety="advice",
    summary="Correct the named backward with torch.autograd.gradcheck, or let autograd derive it.",
)
