"""Does the loop that generates compute what was trained? The training forward is run on the same tokens, in a forked copy.

Both answers are for the token that comes next, from the same weights in the same mode, so they differ by rounding only, unless the
cache, the positions, the padding or the whole path is another function.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.exams import fork
from sickbay.exams.asking import Asking
from sickbay.exams.fork import NoAnswer
from sickbay.patient import ForwardCall, Patient, autocast_of, bare, stochastic_modules
from sickbay.probes.loop import Loop
from sickbay.probes.token_inputs import arguments, at_position, forward_parameters, logits_in, token_inputs
from sickbay.probes.tracks import ROWS, Track

SIGNALS = ("generation_gap",)

TIMEOUT = 20.0
MOST_QUESTIONS = 4  # of one model: another loop, or the same one further on
_LOOKS = 3  # training calls whose form is noted, the newest counts
_MOST_MASK = 1 << 16  # elements of a mask that is kept
_CAUSAL = 1e-3  # of the spread: more means that later tokens change what earlier ones say, and nothing can be compared
_HALF = (torch.float16, torch.bfloat16)
_TARGETS = ("labels", "targets", "target", "y", "label")
_ENDED = "the weights that generate are no module's that was trained"


@dataclass
class Form:
    """How training calls its module: `inputs` are token ids of `shape`, `targets` further integers of that shape, `masks` small
    tensors whose axes are as long, `plain` everything that is no tensor. `strange`: an argument that cannot be made up again.
    """

    shape: tuple[int, ...] = ()
    inputs: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, call: ForwardCall) -> Form | None:
        """The form of `call`; None if it takes no token ids."""
        ids = token_inputs(call)
        if not ids:
            return None
        names = [name for name in ids if name not in _TARGETS] or list(ids)
        shape = ids[names[0]].shape
        form = cls(tuple(shape))
        for name, value in arguments(call).items():
            if name in ids:
                same = ids[name].shape == shape and name != names[0]
                (form.targets if same or name in _TARGETS else form.inputs).append(name)
            elif not isinstance(value, Tensor):
                form.plain[name] = value if isinstance(value, (bool, int, float, str)) else None
                if form.plain[name] is None:
                    form.strange.append(name)
            elif value.numel() <= _MOST_MASK and value.dim() <= 4:
                form.masks[name] = value.detach().clone()
            else:
                form.strange.append(name)
        return form

    def fill(self, name: str, ids: Tensor, given: dict[str, Any], time_first: bool) -> dict[str, Any]:
        """The arguments of the training forward for `ids` as the input `name`; what else it needs comes from the generating call `given`.

        `time_first`: ids are `(T, B)`. Raises LookupError for an argument that cannot be made up.
        """
        if name not in (*self.inputs, *self.targets) or self.strange:
            raise LookupError(
                f"the training forward takes {', '.join(self.strange) or 'other inputs'}, which the generating loop does not give"
            )
        filled: dict[str, Any] = {**self.plain, name: ids}
        for other in (*self.inputs, *self.targets):
            if other == name:
                continue
            if isinstance(given.get(other), Tensor):
                filled[other] = given[other]
            elif other in self.targets:
                filled[other] = ids
            else:
                raise LookupError(f"the training forward takes {other}, which the generating loop does not give")
        for mask, example in self.masks.items():
            filled[mask] = self._mask(example, ids, 0 if time_first else -1)
        return filled

    def _mask(self, example: Tensor, ids: Tensor, axis: int) -> Tensor:
        """`example` for the positions of `ids`. Raises LookupError where it has fewer, or says more than which positions there are."""
        length, trained = ids.shape[axis], self.shape[axis]
        if length > trained:
            raise LookupError(f"the sequence is longer than the {trained} tokens of training")
        rows = ids.numel() // length
        if trained not in example.shape:
            raise LookupError("the training forward takes a tensor that is none of its positions")
        if example.dim() == 2 and example.shape == self.shape == self.shape[::-1]:
            raise LookupError("training has as many rows as positions, so a tensor of both may be either's")
        if example.dim() == 2 and example.shape[1] == trained != example.shape[0]:
            if bool((example[:1] == example).all()) and len(example):
                return example[:1, :length].expand(rows, length)
            if bool((example == example.bool()).all()):
                return torch.ones(rows, length, dtype=example.dtype)
            raise LookupError("the training forward takes numbers per position that differ from row to row")
        return example[tuple(slice(0, length) if size == trained else slice(None) for size in example.shape)]


class GenerationPath:
    """Notes how each module is called in training, and asks when a sequence has grown by some tokens."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, asking: Asking) -> None:
        self.patient, self.record, self.asking = patient, record, asking
        self.forms: weakref.WeakKeyDictionary[nn.Module, Form] = weakref.WeakKeyDictionary()
        self._looks: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._asked: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        for call in self.patient.training_calls():
            module = bare(call.module)
            looks = self._looks[module] = self._looks.get(module, 0) + 1
            form = Form.of(call) if looks <= _LOOKS else None
            if form is not None and math.prod(form.shape) >= (math.prod(self.forms[module].shape) if module in self.forms else 0):
                self.forms[module] = form

    def generating(self, track: Track, call: ForwardCall) -> None:
        module = track.module()
        trained = self._trained(module) if module is not None else None
        if module is None or trained is None or track.logits is None:
            self.record.unobserved("generation_gap", _ENDED)
            return
        reason = self._not_comparable(track, call)
        asked = self._asked.get(module, 0)
        if reason or asked >= MOST_QUESTIONS or (asked and not self.asking.affordable()):
            if reason and not asked:
                self.record.unobserved("generation_gap", reason)
            return
        self._asked[module] = asked + 1
        answer = self.asking.ask(lambda: fork.ask(lambda: compare(trained, self.forms[trained], track, call), TIMEOUT))
        if isinstance(answer, NoAnswer):
            self.record.unobserved("generation_gap", answer.reason.removeprefix("LookupError: "))
        elif "reason" in answer:
            self.record.unobserved("generation_gap", answer["reason"])
        else:
            note = {"kind": track.kind, "tokens": len(track.tokens), **answer["note"]}
            self.record.read("generation_gap", answer["value"], note=note, source=call.source)

    def _trained(self, module: nn.Module) -> nn.Module | None:
        """The module that was trained and holds the weights of `module`: itself, or one around it, or one with the same parameters."""
        if module in self.forms:
            return module
        own = {id(parameter) for parameter in module.parameters()}
        for other in self.forms:
            if own and own <= {id(parameter) for parameter in other.parameters()}:
                return other
        return None

    def _not_comparable(self, track: Track, call: ForwardCall) -> str:
        """ "" if the same numbers may be expected; otherwise why not."""
        if any(part.training for _, part in stochastic_modules(bare(call.module))):
            return "the model generates with dropout on"
        if int(track.settings.get("num_beams") or 1) > 1:
            return "the text is generated by beam search, which changes the order of its rows"
        prompt = None if track.settings else track.prompt
        if track.kind == "cached" and prompt is not None and len(prompt) > 1 and bool((prompt == prompt[:1]).all()):
            history = track.history()
            if not bool((history == history[:1]).all()):
                return "rows that begin alike may be beams, which change places"
        return ""


def compare(trained: nn.Module, form: Form, track: Track, call: ForwardCall) -> dict[str, Any]:
    """`value`: largest difference of the two answers' log-probabilities over the spread of the trained one's; `note` beside it.

    `reason` instead where there is nothing to compare. For use inside a forked copy. Raises LookupError as `Form.fill` does.
    """
    assert track.logits is not None
    given = arguments(call)
    ids = track.ids if track.kind in ("whole", "window", "buffer") else track.history()
    if ids.dim() == 2 and track.kind != "cached":
        ids = ids[:, :ROWS] if track.time_first else ids[:ROWS]
    elif ids.dim() == 2 and track.time_first:
        ids = ids.t()
    got = track.logits
    ids, got = _without_padding(ids, got, track, given)
    known = (*form.inputs, *form.targets)  # a decoder's tokens as long as the source's look like targets, and grow all the same
    name = track.name if track.name in known else known[0]
    rows = len(got)
    again = _Again(trained, form, name, given, rows, track, call)
    position = track.place - max(ids.shape) if track.kind == "buffer" else -1
    want = again(ids, position)
    if want is None:
        return {"reason": "the training forward gives no logits for each position"}
    if got.shape != want.shape:
        return {"reason": "the generating loop has answers for another number of classes or rows"}
    spread = want.std(dim=-1, keepdim=True).clamp(min=1e-6)
    if track.kind == "cached":
        shorter = again(ids[:-1] if track.time_first or ids.dim() == 1 else ids[:, :-1], -1)
        longer = again(ids, -2)
        if shorter is None or longer is None or not torch.isfinite(longer).all():
            return {"reason": "the training forward gives no logits for each position"}
        if float(((shorter - longer).abs() / spread).max()) > _tolerance(call, trained, _CAUSAL):
            return {"reason": "in the training forward earlier positions change with later tokens, so step by step can not give the same"}
    finite = torch.isfinite(want) & torch.isfinite(got)
    difference = torch.where(finite, (got - want).abs(), torch.zeros_like(want)) / spread
    probabilities = torch.where(finite, want.exp() * (want - got), torch.zeros_like(want))
    note = {"kl": round(float(probabilities.sum(-1).max()), 6), "half": _in_half(call, trained), "length": max(ids.shape)}
    return {"value": float(difference.max()), "note": note}


class _Again:
    """The training forward on other ids, without gradient, in the mode and precision of the generating call."""

    def __init__(
        self, trained: nn.Module, form: Form, name: str, given: dict[str, Any], rows: int, track: Track, call: ForwardCall
    ) -> None:
        self._trained, self._form, self._name, self._given, self._rows, self._track, self._call = (
            trained,
            form,
            name,
            given,
            rows,
            track,
            call,
        )
        self._same = bare(call.module) is trained

    def __call__(self, ids: Tensor, position: int) -> Tensor | None:
        filled = self._form.fill(self._name, ids, self._given if self._same else {}, self._track.time_first)
        self._trained.train(self._call.module.training)
        known = forward_parameters(self._trained)
        with torch.no_grad(), autocast_of(self._call):
            placed = [filled.pop(key) for key in sorted(filled) if key.isdigit() or key.startswith("*")] if not known else []
            output = self._trained(*placed, **filled)
        assert self._track.logits is not None
        logits = logits_in(output, self._track.logits.shape[-1], self._rows)
        answer = None if logits is None else at_position(logits, self._rows, position, self._track.time_first)
        return None if answer is None else answer.float().log_softmax(-1)


def _without_padding(ids: Tensor, got: Tensor, track: Track, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One row without the places that the generating call's mask leaves out, and its answer; everything where it leaves out nothing."""
    length = ids.shape[-1]
    for name, mask in given.items():
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length and "mask" in name and not track.time_first
        if fits and ids.dim() == 2 and not bool(mask[: len(ids)].bool().all()):
            row = int(mask[: len(ids)].bool().sum(1).argmin())
            return ids[row : row + 1, mask[row].bool()], got[row : row + 1]
    return ids, got


def _in_half(call: ForwardCall, module: nn.Module) -> bool:
    return call.autocast is not None or any(parameter.dtype in _HALF for parameter in module.parameters())


def _tolerance(call: ForwardCall, module: nn.Module, exact: float) -> float:
    return 0.1 if _in_half(call, module) else exact


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on generation is compared with the training forward."""
    exam = GenerationPath(patient, record, asking)
    loop.on("backward_begin", exam, exam.backward_begin)
    loop.on("generating", exam, exam.generating)
    loop.rests(exam)
    return lambda: None
