"""Compares the sets of parameters: what the model has, what the loss reaches, what the optimizers hold, what shares memory."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.patient import ForwardCall, Patient, bare, user_line
from sickbay.probes.gradients import named_parameters, parameter_names
from sickbay.probes.graph import leaves_with_distance
from sickbay.probes.loop import Loop

SIGNALS = ("missing_from_optimizer", "stale_in_optimizer", "gradient_absent", "tied_weights")

_Pair = tuple[str, Tensor, str, Tensor]  # an embedding's name and weight, a linear layer's
_LOOK_AT = (0, 1, 2, 5, 20, 100)
_TIED = re.compile(r"(^|_)(tie|tied|tying|share|shared)(_|$)")
_MAX_NAMES = 32
_NEW_MODELS = 8  # that come after the first step: sets are looked at again for each, at steps up to _AGAIN
_AGAIN = 3
_SURE_AFTER = 2  # steps of the optimizer, before what runs without gradients counts as never trained


@dataclass
class Called:
    """The newest step in which a module was an outermost call; `graph`: with gradients enabled in one of that step's calls at least."""

    step: int
    graph: bool
    source: str


class Parameters:
    """Looks at the parameter sets at a few steps of each optimizer; everything is compared by identity."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._distances: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._lasting: set[int] = set()
        self._had_gradient: dict[int, weakref.ref[Tensor]] = {}
        self._steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._created_at: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._ties_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._reported: set[tuple[str, ...]] = set()
        self._graph_looks = 0
        self._called: weakref.WeakKeyDictionary[nn.Module, Called] = weakref.WeakKeyDictionary()
        self._new_models = self._again = 0

    def forward_begin(self, call: ForwardCall) -> None:
        before = self._called.get(call.module)
        if before is None and call.grad_enabled and self.record.step > 0 and self._new_models < _NEW_MODELS:
            self._new_models, self._again, self._graph_looks = self._new_models + 1, _AGAIN, 0
        graph = call.grad_enabled or (before is not None and before.step == self.record.step and before.graph)
        self._called[call.module] = Called(self.record.step, graph, call.source)

    def optimizer_created(self, optimizer: Any) -> None:
        self.patient.optimizers.add(optimizer)
        self._created_at[optimizer] = user_line(4)
        self._graph_looks = 0
        self._distances.clear()  # of a model whose training ended, and its optimizer with it

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        root = self.patient.root
        if root is not None and root not in self._ties_checked:
            self._ties_checked.add(root)
            self._check_ties(bare(root))
        if self._graph_looks < 2 and isinstance(loss, Tensor):
            self._graph_looks += 1
            for leaf, distance in leaves_with_distance(loss):
                known = self._distances.get(id(leaf))
                if isinstance(leaf, nn.Parameter) or (known is not None and known[0]() is leaf):
                    self._lasting.add(id(leaf))  # a plain tensor is a parameter once a second graph reaches it
                self._distances[id(leaf)] = (weakref.ref(leaf), distance)

    def step_begin(self, optimizer: Any, late: bool) -> None:
        count = self._steps.get(optimizer, 0)
        self._steps[optimizer] = count + 1
        if count not in _LOOK_AT and not self._again:
            return
        self._again = max(0, self._again - 1)
        self.patient.optimizers.add(optimizer)
        held = {id(p): p for o in self.patient.optimizers for group in o.param_groups for p in group["params"]}
        model = {id(p): (name, p) for root in self._trained_roots() for name, p in named_parameters(root)}
        for parameter in [*(p for _, p in model.values()), *(p for group in optimizer.param_groups for p in group["params"])]:
            if parameter.grad is not None:
                self._had_gradient[id(parameter)] = weakref.ref(parameter)
        self._find_missing(optimizer, held, model)
        if count >= 1:
            self._find_without_gradient(optimizer, held, model, count)

    def _trained_roots(self) -> list[nn.Module]:
        recent = [call.module for call in self.patient.calls if call.grad_enabled]
        return list(dict.fromkeys(recent)) or [root for root in [self.patient.root] if root is not None]

    def _find_missing(self, optimizer: Any, held: dict[int, Tensor], model: dict[int, tuple[str, nn.Parameter]]) -> None:
        reached = {
            key: (leaf, distance)
            for key, (ref, distance) in self._distances.items()
            if (leaf := ref()) is not None and leaf.grad is not None
        }
        missing = [(key, leaf, distance) for key, (leaf, distance) in reached.items() if key not in held and key in self._lasting]
        used = [distance for key, (_, distance) in reached.items() if key in held]
        own = [p for group in optimizer.param_groups for p in group["params"]]
        stale = [p for p in own if model and id(p) not in model and id(p) not in reached and p.grad is None]
        idle = bool(own) and all(p.grad is None for p in own)  # as where it was built before what is trained, which is frozen since
        if not missing or not (used or stale or idle):
            return
        if stale:
            shapes = [list(p.shape) for p in stale[:_MAX_NAMES]]
            self.record.read("stale_in_optimizer", len(stale), note={"shapes": shapes}, source=self._created_at.get(optimizer, ""))
        names = [model[key][0] if key in model else f"unregistered {tuple(leaf.shape)}" for key, leaf, _ in missing]
        if any(key not in model for key, _, _ in missing):
            kind = "unregistered"
        elif stale:
            kind = "created-later"
        else:
            kind = "upstream" if used and min(distance for _, _, distance in missing) > max(used) else "skipped"
        if tuple(names) in self._reported:
            return
        self._reported.add(tuple(names))
        share = sum(leaf.numel() for _, leaf, _ in missing) / max(1, sum(leaf.numel() for leaf, _ in reached.values()))
        frozen = sum(not p.requires_grad for _, p in model.values())
        note = {"names": names[:_MAX_NAMES], "kind": kind, "share": share, "in_optimizer": len(own), "frozen": frozen}
        self.record.read("missing_from_optimizer", len(missing), where=names[0], note=note, source=self._created_at.get(optimizer, ""))

    def _find_without_gradient(
        self, optimizer: Any, held: dict[int, Tensor], model: dict[int, tuple[str, nn.Parameter]], count: int
    ) -> None:
        if not any(p.grad is not None for p in held.values()):
            return
        cut_off = self._find_cut_off(optimizer, count)
        # What no optimizer holds is meant to stay as it is, whether or not requires_grad says so.
        absent = [name for key, (name, p) in model.items() if key in held and key not in cut_off and self._is_without(p)]
        if absent and tuple(absent) not in self._reported:
            self._reported.add(tuple(absent))
            self.loop.emit("gradient_absent", absent, count + 1)

    def _find_cut_off(self, optimizer: Any, count: int) -> set[int]:
        """The optimizer's parameters in modules that this step ran and no gradient came back to: cut off behind the module, or no_grad."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found: set[int] = set()
        for module, called in tuple(self._called.items()):
            if called.step != self.record.step or (not called.graph and count < _SURE_AFTER):
                continue
            trained = [p for p in module.parameters() if p.requires_grad and id(p) in own]
            without = [p for p in trained if self._is_without(p)]
            if not without or (called.graph and len(without) < len(trained)):
                continue
            found |= {id(p) for p in without}
            known = parameter_names(self.patient)
            names = [known.get(id(p), type(module).__name__) for p in without]
            if ("cut off", *names) in self._reported:
                continue
            self._reported.add(("cut off", *names))
            note = {"names": names[:_MAX_NAMES], "backwards": count + 1, "changes_output": True if called.graph else None}
            note["op"] = "" if called.graph else "torch.no_grad"
            self.record.read("gradient_absent", len(names), where=names[0], note=note, source=called.source)
        return found

    def _is_without(self, parameter: Tensor) -> bool:
        return parameter.requires_grad and parameter.grad is None and not self._ever_had_gradient(parameter)

    def _ever_had_gradient(self, parameter: Tensor) -> bool:
        """By identity: an address that another parameter had before does not count."""
        known = self._had_gradient.get(id(parameter))
        return known is not None and known() is parameter

    # --- tied embeddings ------------------------------------------------------------------------------------------
    def _check_ties(self, root: nn.Module) -> None:
        embeddings = [(name, m.weight) for name, m in root.named_modules() if isinstance(m, nn.Embedding)]
        heads = [(name, m.weight) for name, m in root.named_modules() if isinstance(m, nn.Linear)]
        pairs = [(a, e, b, h) for a, e in embeddings for b, h in heads if e.shape == h.shape and e.shape[0] != e.shape[1]]
        pairs = _named_by_model(root, pairs)
        if not pairs:
            return
        declaring = dict(_declarations(root))
        declared = next((text for place, text in declaring.items() if any(_inside(place, a, b) for a, _, b, _ in pairs)), "")
        shared = [(a, b) for a, e, b, h in pairs if e.data_ptr() == h.data_ptr()]
        note: dict[str, Any] = {
            "declared_by": declared,
            "pair": list(shared[0]) if shared else [pairs[0][0], pairs[0][2]],
            "equal_values": False,
        }
        if shared:
            self.record.read("tied_weights", 1.0, where=shared[0][1] + ".weight", note=note)
            return
        for a, embedding, b, head in pairs:
            if self.record.step == 0 and bool((embedding != embedding[0, 0]).any()) and torch.equal(embedding, head):
                note.update(pair=[a, b], equal_values=True, declared_by=declared or "equal values in separate memory")
                declared = note["declared_by"]
        if declared:
            self.record.read("tied_weights", 0.0, where=f"{note['pair'][1]}.weight", note=note, source=user_line(5))


def _named_by_model(root: nn.Module, pairs: list[_Pair]) -> list[_Pair]:
    """`pairs` without layers of a model that names its output layer and names another: a classifier has an embedding's shape by chance."""
    outputs, others = set(), set()
    with contextlib.suppress(Exception):  # another library's method
        for module in root.modules():
            if callable(ask := getattr(module, "get_output_embeddings", None)):
                others |= {id(weight) for weight in module.parameters()}
                outputs.add(id(getattr(ask(), "weight", None)))
    return [pair for pair in pairs if id(pair[3]) in outputs or id(pair[3]) not in others]


def _inside(place: str, *names: str) -> bool:
    """True if all modules of these names are inside the one at `place`: a body's configuration says nothing of a head beside it."""
    return not place or all(name.startswith(f"{place}.") for name in names)


def _declarations(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Which modules' own configurations say that embeddings are shared, and where."""
    for name, module in root.named_modules():
        for label, config in vars(module).items():
            if label.startswith("_") or isinstance(config, (Tensor, nn.Module, int, float, str, list, tuple)):
                continue
            fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
            if isinstance(fields, dict):
                for key, value in fields.items():
                    if value is True and isinstance(key, str) and _TIED.search(key) and ("emb" in key or "weight" in key or "head" in key):
                        yield name, f"{name + '.' if name else ''}{label}.{key}"


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on parameter sets are compared."""
    probe = Parameters(patient, record, loop)
    for event in ("forward_begin", "optimizer_created", "backward_begin", "step_begin"):
        loop.on(event, probe, getattr(probe, event))
    loop.rests(probe)
    return lambda: None
