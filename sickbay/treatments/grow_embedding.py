"""Every id the data can hold has a row in the table.

Advice: `model.resize_token_embeddings(len(tokenizer))` in transformers; elsewhere a larger nn.Embedding with the old rows copied, and
the head with it. If the id is an ignore value such as -100, it belongs into the targets only.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="grow-embedding",
    safety="advice",
    summary="Give the embedding a row for every id (resize_token_embeddings), or mend the tokenizer or padding id.",
)
