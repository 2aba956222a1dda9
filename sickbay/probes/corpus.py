"""Counts the tokens that the run is trained on, and measures how well mere counting would predict them beside the model."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sickbay.core.ngrams import GAP, NGrams, windows
from sickbay.core.record import RecordWriter
from sickbay.patient import LossCall, Patient, tensors_in
from sickbay.probes.loop import Loop
from sickbay.probes.losses import per_target
from sickbay.probes.purse import Purse

SIGNALS = ("ngram_loss",)
FEEDS = ("generated_repetition", "generated_cross_entropy")  # judged against the counts made here

SHARE = 0.0015  # of the run's time
FIRST = 0.06  # seconds: about sixty looks at 2,000 tokens, so that a run of seconds is seen as well
_MAX_TOKENS = 4096  # of one batch
_MAX_ROWS = 1 << 16  # rows remembered as counted
_STRETCH = 16  # tokens: a stretch of text that came before makes a repetition, a shorter one may be a phrase
_SEEN_BITS = 20  # places for stretches, 1 MB once full
_FACTOR = np.uint64(0x5851F42D4C957F2D)  # multiplier of Knuth's MMIX generator, The Art of Computer Programming 2, section 3.3.4
_MAX_COUNTED = 1 << 20  # tokens
_MATCH = 0.95  # share of targets that are the next input: exact by construction, the rest for edited tokens

Ids = NDArray[np.int64]


@dataclass
class NextTokens:
    """Rows of a loss over next tokens: `ids` and `targets` `(B, T)` int64, `targets[:, t]` after `ids[:, t]`, GAP where not counted."""

    ids: Ids
    targets: Ids


class Corpus:
    """Feeds `patient.corpus`, and writes at sampled steps what the counts of all batches before would have lost on this one."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record = patient, record
        self._purse = Purse(SHARE, FIRST)
        self._counted: set[int] = set()
        self._seen = np.zeros(1 << _SEEN_BITS, dtype=bool)
        self._found = 0
        self._tried = 0

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if (self._tried >= 8 and not self._found) or not self._purse.affords():
            return
        losses = [call for call in self.patient.losses if call.grad_enabled and not call.spent]
        calls = [call for call in self.patient.training_calls() if not call.spent]
        if not losses or not calls or not losses[-1].classifies:
            return
        self._tried += 1
        with self._purse.paying():
            rows = next_tokens((calls[-1].args, calls[-1].kwargs), losses[-1])
            if rows is not None:
                self._found += 1
                self.read(rows, losses[-1])

    def read(self, rows: NextTokens, call: LossCall) -> None:
        """Scores the new text of `rows` by what was counted before, then counts it."""
        classes = call.logits.shape[1] if call.logits.dim() > 1 else 1
        if self.patient.corpus is None:
            self.patient.corpus = NGrams(classes)
        model = self.patient.corpus
        if model.tokens >= _MAX_COUNTED:
            return
        targets = np.where(self._fresh(rows.targets), rows.targets, GAP)
        _, before, _ = windows(rows.ids)
        grams = (before, rows.ids.reshape(-1), targets.reshape(-1))
        known = int((grams[2] >= 0).sum())
        if not known:
            return
        if model.tokens:
            single, pair, triple = (float(order.mean()) for order in model.losses(*grams))
            note = {"unigram": single, "bigram": pair, "trigram": triple, "model": _mean(call), "tokens": model.tokens, "counted": known}
            self.record.read("ngram_loss", min(single, pair, triple), note=note, source=call.source)
        model.add_grams(*grams)

    def _fresh(self, targets: Ids) -> NDArray[np.bool_]:
        """Which targets `(B, T)` stand in text not counted before: what a table has seen it knows by heart, and crops overlap."""
        fresh = np.zeros(targets.shape, dtype=bool)
        if targets.shape[1] >= _STRETCH:
            marks = np.zeros((len(targets), targets.shape[1] - _STRETCH + 1), dtype=np.uint64)
            for place in range(_STRETCH):
                marks = marks * _FACTOR + targets[:, place : place + marks.shape[1]].astype(np.uint64)
            places = (marks * _FACTOR >> np.uint64(64 - _SEEN_BITS)).astype(np.intp)
            new = ~self._seen[places]
            self._seen[places] = True
            fresh[:, _STRETCH - 1 :] = new
            fresh[:, : _STRETCH - 1] = new[:, :1]
            return fresh
        for index, row in enumerate(targets):
            mark = zlib.crc32(row.tobytes())
            if mark not in self._counted and len(self._counted) < _MAX_ROWS:
                self._counted.add(mark)
                fresh[index] = True
        return fresh


def next_tokens(inputs: Any, call: LossCall) -> NextTokens | None:
    """The first rows of `call`'s targets beside the token ids they follow; None unless each target is the next id of its row."""
    targets = call.targets.detach()
    if targets.is_floating_point() or targets.device.type != "cpu" or call.smoothing or not targets.numel():
        return None
    for _, ids in tensors_in(inputs):
        if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.device.type != "cpu" or ids.shape[1] < 3:
            continue
        for cut in (0, 1):
            rows, columns = ids.shape[0], ids.shape[1] - cut
            if rows * columns != targets.numel():
                continue
            few = max(1, _MAX_TOKENS // columns)
            wanted = targets.reshape(rows, columns)[:few, :_MAX_TOKENS].numpy().astype(np.int64)
            given = ids.detach()[:few, :columns][:, :_MAX_TOKENS].numpy().astype(np.int64)
            wanted = np.where(wanted == call.ignore_index, GAP, wanted)
            compared = wanted[:, :-1] >= 0
            if compared.sum() >= 8 and (wanted[:, :-1] == given[:, 1:])[compared].mean() >= _MATCH:
                return NextTokens(given, wanted)
    return None


def _mean(call: LossCall) -> float:
    """The loss per counted target in nats; NaN where the call does not tell."""
    if call.value.numel() != 1 or call.value.device.type != "cpu" or call.reduction not in ("mean", "sum"):
        return float("nan")
    return per_target(call)


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on the tokens of sampled batches are counted."""
    probe = Corpus(patient, record, loop)
    loop.on("backward_begin", probe, probe.backward_begin)
    loop.sleeps(probe)
    return lambda: None
