"""The embedding has rows only for ids that the data use, and head and embedding share them.

Advice: count ids over the whole corpus; keep special tokens and byte fallbacks; remap tokenizer, data and rows together; tie the head.
A tokenizer trained on the corpus does the same from the start.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="prune-vocabulary",
    safety="advice",
    summary="Drop rows that no data use, remapping tokenizer, data and weights together, special tokens kept; tie embedding and head.",
)
