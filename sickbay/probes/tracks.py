"""One sequence of token ids as it grows from call to call, and how its tokens were chosen from the logits before them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["", "whole", "window", "cached", "buffer"]

ROWS = 4  # of a batch are followed
TEMPERATURES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)  # tried on each token
MOST_TOKENS = 1024  # of a sequence are kept
_WHOLE = 1 << 16  # ids: a larger batch is cut to its first rows
_AT_ONCE = 1 << 14  # logits of one token that are looked at every time; larger ones every eighth token
_RARELY = 8
_CLOSELY = 64  # tokens from the start that are all looked at
_MOST_NATS = 50.0  # of one token: what a rounding to zero counts


class Sampling:
    """How likely the chosen tokens were: sums over tokens, on the logits' own device."""

    def __init__(self) -> None:
        self.tokens = 0
        self._offered = 0
        self._sums: Tensor | None = None
        self._grid: Tensor | None = None

    def add(self, log_probabilities: Tensor, chosen: Tensor) -> None:
        """`chosen` `(R,)` were drawn where the model said `log_probabilities` `(R, V)`."""
        self._offered += 1
        if (log_probabilities.numel() > _AT_ONCE or self._offered > _CLOSELY) and self._offered % _RARELY != 1:
            return
        own = log_probabilities.gather(1, chosen[:, None])
        nats = -own.clamp(min=-_MOST_NATS).sum()
        entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-_MOST_NATS)).sum()
        hits = (own.squeeze(1) >= log_probabilities.amax(1)).sum().float()
        if self._grid is None:
            self._grid = torch.tensor(TEMPERATURES, device=own.device)[:, None, None]
        grid = self._grid
        fits = (own[None] / grid - (log_probabilities[None] / grid).logsumexp(-1, keepdim=True)).clamp(min=-_MOST_NATS).sum((1, 2))
        sums = torch.cat((torch.stack((nats, entropy, hits)), fits))
        self._sums = sums if self._sums is None else self._sums + sums
        self.tokens += len(chosen)

    def outcome(self) -> dict[str, float] | None:
        """Per token: `surprise` and `entropy` in nats, `greedy` share; `temperature` that fits best and its `lead` over 1, in nats."""
        if self._sums is None or not self.tokens:
            return None
        nats, entropy, hits, *fits = (float(value) for value in self._sums.tolist())
        best = max(range(len(fits)), key=fits.__getitem__)
        greedy = hits / self.tokens
        temperature = 0.0 if greedy >= 0.995 else TEMPERATURES[best]
        lead = fits[best] - fits[TEMPERATURES.index(1.0)]
        per_token = {"surprise": nats / self.tokens, "entropy": entropy / self.tokens, "greedy": greedy}
        return {**per_token, "temperature": temperature, "lead": lead, "tokens": float(self.tokens)}


@dataclass
class Track:
    """A batch of sequences fed to `module` as `name`. `prompt` `(R, P)`, then one `(R,)` in `tokens` for each call that brought a new one.

    `kind`: how they come back in: the whole sequence, a sliding window of it, the new token alone beside a cache, or one more place
    filled in a buffer. `logits` `(R, V)`: log-probabilities of the token that comes next. `settings`: the library's, where it decodes.
    """

    module: weakref.ref[nn.Module]
    name: str
    ids: Tensor
    step: int
    source: str
    training: bool = False
    kind: Kind = ""
    rows: int = 0
    time_first: bool = False
    place: int = -1
    prompt: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    sampling: Sampling = field(default_factory=Sampling)
    settings: dict[str, Any] = field(default_factory=dict)
    seen: int = 0

    @classmethod
    def of(cls, module: nn.Module, name: str, ids: Tensor, step: int, source: str, training: bool) -> Track:
        return cls(weakref.ref(module), name, _small(ids).clone(), step, source, training)

    def grows(self, ids: Tensor) -> bool:
        """True, and the new tokens are kept, if `ids` are the same sequences with one more token each."""
        if ids.dim() != self.ids.dim():
            return False
        if ids.dim() == 1:
            return self._grows(_small(ids)[None], self.ids[None], False, ids)
        new = _small(ids)
        axes = (self.time_first,) if self.kind else (False, True)
        return any(self._grows(new.t(), self.ids.t(), True, ids) if flipped else self._grows(new, self.ids, False, ids) for flipped in axes)

    def _grows(self, new: Tensor, old: Tensor, time_first: bool, ids: Tensor) -> bool:
        if new.shape[0] != old.shape[0]:
            return False
        before, now = old.shape[1], new.shape[1]
        kind: Kind = ""
        place = now - 1
        if now == 1 and not (time_first and not self.kind) and self.kind in ("", "cached"):
            kind = "cached"
        elif now == before + 1 and self.kind in ("", "whole") and torch.equal(new[:, :-1], old):
            kind = "whole"
        elif now == before and now > 1 and not self.training and not (time_first and not self.kind):
            kind, place = self._moved(new, old)
        if not kind:
            return False
        if not self.tokens:
            self.prompt = old[:ROWS, : place if kind == "buffer" else before].clone()
            self.rows, self.time_first = old.shape[0], time_first
        if kind == "buffer" and not self.tokens:
            self.logits = None  # read where a growing sequence ends, which is not where this one had got to
        self.kind, self.place = kind, place
        chosen = new[:ROWS, place].clone()
        logits = self.logits
        known = logits is not None and len(logits) == len(chosen) and len(self.tokens) < MOST_TOKENS
        if known and logits is not None and not bool((chosen >= logits.shape[1]).any()):
            self.sampling.add(logits, chosen.long())
        if len(self.tokens) < MOST_TOKENS:
            self.tokens.append(chosen)
        self.seen += 1
        self.logits = None
        self.ids = _small(ids).clone()
        return True

    def _moved(self, new: Tensor, old: Tensor) -> tuple[Kind, int]:
        """The kind and place of the new token where the shape stayed as it was; "" if no single token is new."""
        last = new.shape[1] - 1
        same = torch.equal(new, old)
        if self.kind in ("", "whole", "window") and torch.equal(new[:, :-1], old[:, 1:]) and (not same or self.kind == "window"):
            return "window", last
        if same or self.kind not in ("", "buffer"):
            return "", -1
        changed = (new != old).any(0).nonzero().flatten().tolist()
        if len(changed) == 1 and changed[0] > 0 and (self.place < 0 or not self.kind or changed[0] == self.place + 1):
            return "buffer", int(changed[0])
        return "", -1

    def reads_from(self, logits: Tensor) -> int:
        """The position of `logits`, counted from the end, that tells of the token to come."""
        if self.kind != "buffer":
            return -1
        length = self.ids.shape[0 if self.time_first else -1]
        return self.place - length if length in logits.shape[:-1] else -1

    @property
    def counts(self) -> bool:
        """True where each id is the one before it plus 1: positions, not tokens."""
        history = self.history()
        return bool((history[:, 1:] - history[:, :-1] == 1).all())

    def history(self) -> Tensor:
        """All ids of the followed rows so far, `(R, P + tokens)`."""
        assert self.prompt is not None
        return torch.cat((self.prompt, torch.stack(self.tokens, 1)), 1)


def _small(ids: Tensor) -> Tensor:
    return ids.detach() if ids.dim() == 1 or ids.numel() <= _WHOLE else ids.detach()[:ROWS]
