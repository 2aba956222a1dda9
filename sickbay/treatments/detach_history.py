"""Nothing of a step outlives it but numbers.

Advice: `total += loss.item()`; `history.append(loss.detach())`; outputs that are needed later go to the host detached, in a container that
is bounded or cleared; no retain_graph=True, no create_graph=True in a backward that is the only one.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="detach-history",
    safety="advice",
    summary="Keep numbers, not graphs: .item() or .detach() before storing, and a bound on every container that outlives the step.",
)
