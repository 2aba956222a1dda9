"""What the loss asks for and who sees whom, found by changing tokens in a forked copy of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.exams.fork import NoAnswer, ask
from sickbay.exams.influences import View, batch_norm_of, future_and_rows, packing_influence, padding_influence, past
from sickbay.exams.matching import Main, answers_with, best_fit, matching_loss, placed_fit, targets_inside, time_axis_of
from sickbay.exams.padding import Padding, config_value, find_documents, find_padding
from sickbay.exams.perturbation import NOISE, Tokens, change, find_readout
from sickbay.exams.rows import row_influence
from sickbay.exams.scored import scored_targets
from sickbay.exams.sensitivity import Graph, graph_of
from sickbay.exams.sensitivity import mixing as gradient_mixing
from sickbay.exams.sensitivity import padding as padding_sensitivity
from sickbay.exams.sequences import Lookup, Observation, Rerun, layout_of, observe, token_lookups
from sickbay.exams.shortening import cut_influence
from sickbay.exams.targets import Alignment, Targets, align, fit, from_call, from_graph, graded
from sickbay.patient import ForwardCall, Patient

TIMEOUT = 30.0  # seconds for the whole examination
ROWS = 4  # batch rows that are run again: enough for even against odd rows, cheap enough to repeat
MIXED_ROWS = 1e-3  # ratio from which what looks like a leak from the future may come from other rows
SEES_FUTURE = 1e-4  # ratio from which a model is not causal
NEXT_TOKEN = 1
HALF = 0.5

SIGNALS = (
    "target_offset",
    "ignored_targets",
    "padding_counted",
    "eos_targets",
    "future_influence",
    "past_blocked",
    "padding_influence",
    "packing_influence",
    "row_influence",
)


class Findings(list[dict[str, Any]]):
    """Readings as dicts (signal, value, where, source, note); `reasons`: why a signal could not be measured this time."""

    def __init__(self, readings: list[dict[str, Any]], reasons: dict[str, str]) -> None:
        super().__init__(readings)
        self.reasons = reasons


def examine(patient: Patient, loss: Tensor | None, step: int) -> Findings | NoAnswer:
    """What the loss asks for and who sees whom in the model, measured in a forked copy; call it when `loss` is about to be differentiated.

    `loss`: a scalar with its graph, or None where the loss was differentiated by torch.func. NoAnswer if nothing at all could be asked.
    """
    if not patient.training_calls() and getattr(patient, "functional", None) is None and (loss is None or loss.grad_fn is None):
        return NoAnswer("neither a forward pass that could be repeated nor a graph was seen")
    answer = ask(lambda: Examination(patient, loss, step).run(), TIMEOUT)
    return answer if isinstance(answer, NoAnswer) else Findings(answer["readings"], answer["reasons"])


@dataclass
class Examination:
    """One examination; lives inside the forked copy."""

    patient: Patient
    loss: Tensor | None
    step: int
    readings: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """All readings and reasons, JSON-able."""
        self.patient.muted = True
        targets = self._targets()
        found = self._sequences()
        graph = self._graph() if found is None else None
        if found is not None:
            again, seen, groups = found
            self._over_tokens(again, seen, groups, targets or targets_inside(seen))
        elif graph is not None:
            self._over_graph(graph, targets)
        else:
            self._over_numbers()
            self._unmeasured("no look-up of token ids was seen in the forward pass", *SIGNALS)
        return {"readings": self.readings, "reasons": self.reasons}

    def _add(self, signal: str, value: float, place: tuple[str, str], **note: Any) -> None:
        self.readings.append({"signal": signal, "value": float(value), "where": place[0], "source": place[1], "note": note})

    def _unmeasured(self, reason: str, *signals: str) -> None:
        for signal in signals or ("future_influence", "past_blocked", "padding_influence", "packing_influence", "row_influence"):
            self.reasons.setdefault(signal, reason)

    def _targets(self) -> list[Targets]:
        calls = [call for call in self.patient.losses if call.grad_enabled]
        targets = from_graph(self.loss) if self.loss is not None and self.loss.grad_fn is not None else []
        for target in targets:
            for call in calls:
                if call.targets.numel() == target.values.numel():
                    target.source = call.source
        targets = targets or [target for target in map(from_call, calls) if target is not None]
        return targets or (scored_targets(self.loss) if self.loss is not None and self.loss.grad_fn is not None else [])

    def _sequences(self) -> tuple[Rerun, Observation, list[list[Lookup]]] | None:
        """The repeatable forward that looks tokens up: the largest module's call first, the newest among equals."""
        newest_first = list(reversed(self.patient.training_calls()))
        calls = sorted(newest_first, key=lambda call: -_size(call))
        function = getattr(self.patient, "functional", None)
        for again in [*map(Rerun, calls[:4]), *([Rerun(function=function)] if function and not calls else [])]:
            seen = observe(again)
            groups = token_lookups(seen)
            if groups:
                return again, seen, groups
        return None

    def _over_tokens(self, again: Rerun, seen: Observation, groups: list[list[Lookup]], targets: list[Targets]) -> None:
        captured = {call.targets.numel() for call in self.patient.losses}  # those the loss functions' own probe has counted
        for target in targets:
            if target.scored or target.values.numel() in captured or target.values.numel() == 0:
                continue
            ignored = float((~target.counted).float().mean())
            place = ("", target.source or again.source(""))
            self._add("ignored_targets", ignored, place, count=target.values.numel(), ignore_index=target.ignored)
        aligned = [main for target in targets if (main := placed_fit(target, groups, seen))]
        main = max(aligned, key=lambda m: (m[2].offset == NEXT_TOKEN, m[2].offset >= 0, m[0].values.numel()), default=None)
        graph = None if main is None or answers_with(again, seen, main[0]) else self._graph()
        if graph is not None:  # the forward is only a part of the model: what it gives is not what the loss was given
            self._over_graph(graph, targets)
            return
        group = main[1] if main else groups[-1]
        axis = main[2].time_axis if main and main[2].offset >= 0 else time_axis_of(group, seen, targets)
        if axis is None:
            self._unmeasured("the batch axis could not be told from the time axis")
        else:
            if main and main[2].time_axis != axis:
                main = next(((t, g, a) for t, g, _ in [main] if (a := align(t, g[0].ids, axis))), None)
            causal = self._over_axis(again, seen, groups, group, axis, main, targets)
        for target, _, alignment in aligned:
            self._offset(target, alignment, again, causal if axis is not None and main and alignment is main[2] else {})

    def _offset(self, target: Targets, alignment: Alignment, again: Rerun | None, causal: dict[str, Any]) -> None:
        if not alignment.clear:
            self._unmeasured("the tokens repeat so much that several offsets agree", "target_offset")
        elif alignment.match:
            match = {str(offset): share for offset, share in alignment.match.items()}
            place = ("", target.source or (again.source("") if again else ""))
            self._add("target_offset", alignment.offset, place, match=match, counted=alignment.compared, **causal)

    def _over_axis(
        self,
        again: Rerun,
        seen: Observation,
        groups: list[list[Lookup]],
        group: list[Lookup],
        axis: int,
        main: Main | None,
        targets: list[Targets],
    ) -> dict[str, Any]:
        ignored = main[0].ignored if main else None
        padding = _padding_of(again, seen, group, axis, ignored)
        if main and padding:
            self._grading(again, main, padding)
        view, documents_by = self._view(again, seen, group, axis, main, padding, targets)
        if view is None:
            return {}
        causal = self._mixing(view, main[2] if main else None)
        self._padding(view, view.tokens, padding, True)
        for other in groups:
            if other is not group and other[0].ids.shape[1 - axis] == group[0].ids.shape[1 - axis]:
                beside = _padding_of(again, seen, other, axis, None)
                tokens = Tokens.of(other, axis, beside.mask if beside else None)
                self._padding(view, tokens.first(len(view.counted)), beside, False)
        self._packing(view, documents_by)
        return causal

    def _over_numbers(self) -> None:
        """row_influence of a model that reads numbers and is run as a whole."""
        calls = self.patient.training_calls()
        again = Rerun(calls[0]) if len(calls) == 1 else None
        found = row_influence(again, observe(again)) if again else "the model is run in several parts, or is no module"
        if again is None or isinstance(found, str):
            self._unmeasured(str(found), "row_influence")
        else:
            place = (found.where, again.source(found.source))
            self._add("row_influence", found.value, place, rows=found.rows, **batch_norm_of(again))

    def _graph(self) -> Graph | None:
        graph = graph_of(self.loss) if self.loss is not None and self.loss.grad_fn is not None else None
        if graph is not None:
            graph.seen.layout = layout_of(self.patient.root)
        return graph

    def _over_graph(self, graph: Graph, targets: list[Targets]) -> None:
        """The same questions answered from gradients, where nothing can be run again."""
        aligned = [main for target in targets if (main := best_fit(target, graph.tokens(), graph.seen))]
        main = max(aligned, key=lambda m: (m[2].offset == NEXT_TOKEN, m[2].offset >= 0), default=None)
        if main is None:
            self._unmeasured("the targets of the loss do not lie over the tokens")
            return
        target, group, alignment = main
        tokens = Tokens.of(group, alignment.time_axis)
        padding = find_padding(tokens.ids, alignment.time_axis, group, graph.seen, [], None, target.ignored)
        real = torch.ones_like(tokens.padding) if padding is None else ~padding.mask
        mixing, backward = gradient_mixing(graph, group, alignment, real)
        causal = {} if mixing.future is None else {"causal": mixing.future < SEES_FUTURE}
        self._offset(target, alignment, None, causal)
        place = ("", target.source)
        if padding is not None:
            self._grading(None, main, padding)
            value = padding_sensitivity(graph, group, alignment, padding.mask)
            if value is not None:
                self._add("padding_influence", value, place, pad_id=padding.pad_id, known_by=padding.known_by)
        if not mixing.alive or (not mixing.future and not mixing.rows and (backward is None or backward.blocked == 1.0) and self.step == 0):
            self._unmeasured("nothing passes between positions yet", "future_influence", "past_blocked", "row_influence")
            return
        if mixing.rows is not None:
            normed = {"batch_norm": True} if graph.batch_statistics else {}
            self._add("row_influence", mixing.rows, place, rows=len(real), by="gradient", **normed)
        if alignment.offset >= NEXT_TOKEN and (mixing.rows or 0.0) <= MIXED_ROWS:
            if mixing.future is not None:
                self._add("future_influence", mixing.future, place, position=mixing.cut, affected=mixing.affected, by="gradient")
            if backward is not None:
                note = {"pairs": backward.pairs, "span": backward.span, "nearest_blocked": backward.nearest >= HALF}
                self._add("past_blocked", backward.blocked, place, **note, by="gradient")

    def _grading(self, again: Rerun | None, main: Main, padding: Padding) -> None:
        """padding_counted and eos_targets: what the loss counts at and about padding."""
        target, group, aligned = main
        eos = config_value(again.module, "eos_token_id") if again else None
        for signal, value, note in graded(target, group[0].ids, aligned, padding, eos):
            self._add(signal, value, ("", target.source or (again.source("") if again else "")), **note)

    def _view(
        self,
        again: Rerun,
        seen: Observation,
        group: list[Lookup],
        axis: int,
        main: Main | None,
        padding: Padding | None,
        targets: list[Targets],
    ) -> tuple[View | None, str]:
        tokens = Tokens.of(group, axis, padding.mask if padding else None)
        batch, times = tokens.ids.shape
        loss = matching_loss(seen, [main[0]] if main else targets)
        index = main[0].index if main else None
        readout = find_readout(seen, main[2] if main else None, loss, batch, times, index, axis)
        if readout is None:
            self._unmeasured("no output has a row for each sequence of the batch")
            return None, ""
        everywhere = torch.ones(readout.grid, dtype=torch.bool)
        per_position = readout.axes != "pooled"
        next_token = main is not None and main[2].offset >= NEXT_TOKEN
        counted = fit(main[2].counted, readout.grid) if main and per_position and next_token else everywhere
        real = fit(~tokens.padding, readout.grid) if per_position else everywhere
        documents = find_documents(tokens.ids, axis, group, seen, again.arguments, tokens.padding, next_token)
        numbers = fit(documents.numbers, readout.grid) if documents and per_position else None
        if axis == 1 and readout.index is None and again.can_slice(ROWS) and _slices(again, group, tokens):
            tokens, counted, real = tokens.first(ROWS), counted[:ROWS], real[:ROWS]
            numbers = numbers[:ROWS] if numbers is not None else None
        else:
            again.rows = None
        if tokens.others() is None:
            self._unmeasured("the batch holds only one distinct token")
            return None, ""
        baseline = readout.read(again)
        scale = float(torch.nan_to_num(baseline, 0.0, 0.0, 0.0).abs().max())
        if scale == 0.0:
            self._unmeasured("the outputs are all zero or not finite")
            return None, ""
        if float(change(baseline, readout.read(again)).max()) > NOISE * scale:
            self._unmeasured("the forward pass does not repeat exactly")
            return None, ""
        view = View(again, tokens, readout, counted, real, numbers, baseline, self.step, seen.attention)
        return view, documents.known_by if documents else ""

    def _mixing(self, view: View, aligned: Alignment | None) -> dict[str, Any]:
        """future_influence, past_blocked, row_influence; returns what is known of causality for the offset's note."""
        mixing = future_and_rows(view)
        if not mixing.alive:
            self._unmeasured("no output moves when tokens are changed: the output layer may still be zero")
            return {}
        causal_task = aligned is not None and aligned.offset >= NEXT_TOKEN and view.per_position
        backward = past(view) if view.per_position else None
        passes = bool(mixing.future) or bool(mixing.rows) or (backward is not None and backward.blocked < 1.0)
        if view.per_position and not passes and view.may_start_at_zero():
            self._unmeasured(
                "nothing passes between positions yet: a weight is still zero", "future_influence", "past_blocked", "row_influence"
            )
            return {}
        batch = view.tokens.ids.shape[0]
        if mixing.rows is not None and mixing.rows_where is not None:
            odd = torch.ones_like(mixing.rows_where) & (torch.arange(batch) % 2 == 1)[:, None]
            place = view.place(view.tokens, mixing.rows_where, odd, mixing.rows)
            self._add("row_influence", mixing.rows, place, rows=batch, **batch_norm_of(view.again))
        if mixing.rows is not None and mixing.rows > MIXED_ROWS:
            self._unmeasured(
                "rows of the batch influence one another, which hides who sees whom within a row", "future_influence", "past_blocked"
            )
            return {}
        if causal_task and mixing.future is not None and mixing.where is not None:
            kept = ~mixing.where & (torch.arange(mixing.where.shape[1]) < mixing.cut) & (torch.arange(batch) % 2 == 0)[:, None]
            place = view.place(view.tokens, mixing.where, kept, mixing.future)
            self._add("future_influence", mixing.future, place, position=mixing.cut, affected=mixing.affected, **batch_norm_of(view.again))
        if causal_task and backward is not None and not passes and not any(view.attention):
            self._unmeasured("nothing in the model passes between positions, so there is no mask", "past_blocked")
        elif causal_task and backward is not None:
            note = {"pairs": backward.pairs, "span": backward.span, "nearest_blocked": backward.nearest >= HALF}
            place = view.attention if view.attention[1] else ("", view.again.source(""))
            self._add("past_blocked", backward.blocked, place, **note)
        return {} if mixing.future is None else {"causal": mixing.future < SEES_FUTURE}

    def _padding(self, view: View, tokens: Tokens, padding: Padding | None, main: bool) -> None:
        if padding is None:
            return
        if not padding.explicit and config_value(view.again.module, "eos_token_id") == padding.pad_id:
            after_text = tokens.padding & ~torch.cat([torch.zeros_like(tokens.padding[:, :1]), tokens.padding[:, :-1]], 1)
            tokens = Tokens(tokens.group, tokens.ids, tokens.axis, tokens.padding & ~after_text)
        found = padding_influence(view, tokens, main) if tokens.others() is not None else None
        if found is None:
            self._unmeasured("no padded row has an answer that could move", "padding_influence")
            return
        value, where, kept = found
        place = view.place(tokens, where, kept, value)
        note: dict[str, Any] = {"pad_id": padding.pad_id, "known_by": padding.known_by}
        # Attention that is not masked weighs padding; others may only look at how far it goes, and an empty place is none.
        note["attention"] = any(view.attention)
        if value > 0 and (not note["attention"] or _empty(tokens.group, padding.pad_id)):
            note["cut"] = cut_influence(view.again, view.readout, tokens)
        self._add("padding_influence", value, place, **note)

    def _packing(self, view: View, known_by: str) -> None:
        found = packing_influence(view) if known_by else None
        if found is not None:
            value, where, kept, boundaries = found
            self._add("packing_influence", value, view.place(view.tokens, where, kept, value), boundaries=boundaries, known_by=known_by)


def _empty(group: list[Lookup], pad_id: int) -> bool:
    """True where padding is looked up as a vector of zeros."""
    tables = [lookup.table for lookup in group]
    return all(isinstance(table, Tensor) and pad_id < len(table) and not bool(table[pad_id].any()) for table in tables)


def _size(call: ForwardCall) -> int:
    return sum(p.numel() for p in call.module.parameters()) if isinstance(call.module, nn.Module) else 0


def _padding_of(again: Rerun, seen: Observation, group: list[Lookup], axis: int, ignored: int | None) -> Padding | None:
    ids = group[0].ids if axis == 1 else group[0].ids.t()
    return find_padding(ids, axis, group, seen, again.arguments, again.module, ignored)


def _slices(again: Rerun, group: list[Lookup], tokens: Tokens) -> bool:
    """True when the model runs on its first rows alone and sees just those tokens there; leaves `again` set to them."""
    if bool(tokens.padding.any()) and not bool(tokens.padding[:ROWS].any()):
        return False
    again.rows = ROWS
    try:
        lookups = observe(again).lookups
        return all(torch.equal(lookups[lookup.occurrence].ids, lookup.ids[:ROWS]) for lookup in group)
    except Exception:  # a model may insist on its batch size in any way it likes
        return False
