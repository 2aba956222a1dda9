"""Tiny models whose masks can be spoiled, and the patient that a run of them leaves for an exam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sickbay.exams.fork import NoAnswer
from sickbay.exams.masks import Findings, examine
from sickbay.patient import ForwardCall, LossCall, Patient

V, T, D = 31, 20, 16

MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda q, k: k <= q,
    "full": lambda q, k: k == k,
    "one ahead": lambda q, k: k <= q + 1,
    "inverted": lambda q, k: k >= q,
    "itself only": lambda q, k: k == q,
    "not the nearest": lambda q, k: (k <= q) & (k != q - 1),
    "window": lambda q, k: (k <= q) & (k > q - 3),
}


class Attention(nn.Module):
    def __init__(self, mask: str, dim: int = D, heads: int = 2) -> None:
        super().__init__()
        self.mask, self.heads = mask, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        seen = MASKS[self.mask](torch.arange(t)[:, None], torch.arange(t)[None]).expand(b, 1, t, t)
        if allowed is not None:
            seen = seen & allowed[:, None]
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(d // self.heads)
        weights = scores.masked_fill(~seen, -1e9).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


class Model(nn.Module):
    """ids `(B, T)` -> logits `(B, T, V)`, or (logits, loss) with targets. `allowed`: bool `(B, 1 or T, T)`, who may be seen besides."""

    def __init__(self, mask: str = "causal", depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D) * 0.1)
        self.layers = nn.ModuleList(Attention(mask) for _ in range(depth))
        self.norm, self.head, self.dropout = nn.LayerNorm(D), nn.Linear(D, V), nn.Dropout(dropout)

    def forward(self, ids: Tensor, targets: Tensor | None = None, allowed: Tensor | None = None, **_: Any) -> Any:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = x + self.dropout(layer(self.norm(x), allowed))
        logits = self.head(self.norm(x))
        return logits if targets is None else (logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def patient_of(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Patient, Any]:
    """A patient whose last forward is `module(*args, **kwargs)`, and what that gave."""
    patient = Patient()
    call = ForwardCall(module, args, kwargs, True, module.training, torch.get_rng_state(), "train.py:7", finished=True)
    patient.calls.append(call)
    return patient, module(*args, **kwargs)


def captured(patient: Patient, name: str, logits: Tensor, targets: Tensor, value: Tensor) -> None:
    """As the probe of loss functions would have it."""
    patient.losses.append(LossCall(name, logits, targets, -100, "mean", value, "train.py:9", True))


class Answers:
    """The readings of one examination by signal; a signal asked of several token inputs gives its largest value."""

    def __init__(self, found: Findings | NoAnswer) -> None:
        assert isinstance(found, Findings), found
        self.reasons = found.reasons
        self.readings: dict[str, dict[str, Any]] = {}
        for reading in found:
            known = self.readings.get(reading["signal"])
            if known is None or reading["value"] > known["value"]:
                self.readings[reading["signal"]] = reading

    def __getitem__(self, signal: str) -> float:
        return float(self.readings[signal]["value"])

    def __contains__(self, signal: str) -> bool:
        return signal in self.readings

    def note(self, signal: str) -> dict[str, Any]:
        return dict(self.readings[signal]["note"])


def answers(patient: Patient, loss: Tensor | None, step: int = 0) -> Answers:
    return Answers(examine(patient, loss, step))


def text(rows: int = 10, length: int = T) -> tuple[Tensor, Tensor]:
    """Random ids `(rows, length)` from 3 on, and the same one position later."""
    ids = torch.randint(3, V, (rows, length + 1))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def padded(rows: int = 10, length: int = T, pad: int = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids whose rows end (or begin) in padding, and the mask of what is real: int64 `(rows, length)`, 1 = real."""
    ids, _ = text(rows, length)
    lengths = torch.randint(length // 2, length, (rows, 1))
    places = torch.arange(length)[None]
    real = places >= length - lengths if left else places < lengths
    return ids.masked_fill(~real, pad), real.long()


def loss_of(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)
