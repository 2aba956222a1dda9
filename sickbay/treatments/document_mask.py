"""Each packed document sees itself alone, from position 0.

Advice: visible[t, s] = (document[t] == document[s]) and s <= t, or an attention that takes the documents' cumulative lengths; restart
position ids at every boundary.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="document-mask",
    safety="advice",
    summary="Keep packed documents apart: a block-diagonal mask or cumulative lengths, and positions that restart.",
)
