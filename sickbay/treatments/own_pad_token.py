"""The end token is a target of every text.

Advice: `tokenizer.add_special_tokens({"pad_token": "<pad>"})` and a resized embedding; or labels ignored where attention_mask is 0, so
that the first end token of each text stays a target.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="own-pad-token",
    safety="advice",
    summary="Give padding a token of its own, or ignore targets by attention_mask instead of by id.",
)
