"""The resumed run has all of the state that the stopped one had.

Advice: save `{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "rng":
torch.get_rng_state(), "step": step}` (and the GradScaler's), and load each of them after the objects were made. A file that lacks the
optimizer's state can still be used: warm the learning rate up again for some hundred steps.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="resume-everything",
    safety="advice",
    summary="Save and load optimizer, scheduler, GradScaler, random state and position with the weights and the step count.",
)
