"""The named operation's operands fit: the transpose, the head split or the batch dimension is where it belongs.

Advice: read the shapes along the module path from the input on; the first one that is not what the module's weight expects is the
line to change. `x @ weight.T` for a weight of (out, in); `.view(B, T, H, K).transpose(1, 2)` to split heads; `.unsqueeze(0)` for
a missing batch dimension.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="fix-shape",
    safety="advice",
    summary="Change the named line so that the sizes agree: transpose, split the heads, or add the missing dimension.",
)
