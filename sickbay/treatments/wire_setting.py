"""Every setting of the model is read where it should act, or is gone.

Advice: follow the named setting from the configuration to the line that should use it; a misspelt attribute, a constant, or a default
of a library's constructor stands there. `sickbay checkup` tries all settings again.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="wire-setting",
    safety="advice",
    summary="Read the named setting where the model is built and called, or remove it.",
)
