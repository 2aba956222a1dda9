"""Text to batches: the door to the rooms that do it.

sources.py         where text comes from: files, folders, JSONL, stdin
tokenizer.py       text to ids and back
tokens.py          ids on disk, and which of them are for validation
corpus.py          all of that once for a text, found again by the next run
batches.py         ids to rows of inputs and targets; shuffle.py and packing.py are its parts
augment.py         altered copies of the training text
data_settings.py   what of this a run wants
"""

from __future__ import annotations

from sickbay.reference.data.batches import (
    Batch,
    Tokens,
    demand_length,
    random_batches,
    shuffled_batches,
    split,
    spread_batches,
    windows,
)
from sickbay.reference.data.corpus import Corpus, packed_by, prepare, train_batches, val_batches
from sickbay.reference.data.packing import documents_of, within_documents
from sickbay.reference.data.sources import fingerprint, shipped_text
from sickbay.reference.settings.data_settings import DataSettings
from sickbay.reference.text.tokenizer import CharTokenizer

__all__ = [
    "Batch",
    "CharTokenizer",
    "Corpus",
    "DataSettings",
    "Tokens",
    "demand_length",
    "documents_of",
    "fingerprint",
    "packed_by",
    "prepare",
    "random_batches",
    "shipped_text",
    "shuffled_batches",
    "split",
    "spread_batches",
    "train_batches",
    "val_batches",
    "windows",
    "within_documents",
]
