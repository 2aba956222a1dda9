"""Asks, before the first update and a few times after it, how the model is built: initialisation, scale of the data, gradients by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sickbay.core.record import RecordWriter
from sickbay.exams import bounded, fork
from sickbay.exams.anatomy import RESHAPES, Anatomy, Weight, kind
from sickbay.exams.asking import Asking
from sickbay.exams.graph_walk import Graph, saved
from sickbay.patient import Patient, bare, tensors_in
from sickbay.probes.gradients import clean, parameter_names
from sickbay.probes.loop import Loop

SIGNALS = ("initial_loss", "initial_gain", "clone_units", "gradient_by_depth", "input_rms", "target_rms", "loss_floor", "probability_sum")

_LOOKS_AT = (0, 5, 20, 80, 320)  # optimizer steps
_DOUBTS_AT = (1, 2, 4, 8)  # steps at which units that were clones are looked at again
_TIMEOUT = 30.0
_STRUCTURED = 1.5  # x the largest singular value of random entries of the same size
_SAMPLED = 12  # matrices whose entries are tested for having been drawn at random
_NEAR_LOSS = 400  # nodes
_BEGINNINGS = 4  # trainings of one process that are looked at whatever it costs
_FULL_SIZE = 1 << 22  # elements of a matrix looked at in full


class Structure:
    """Asks in a forked copy and writes the answers; looks again while units that were clones may still be."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> None:
        self.patient, self.record, self.loop, self.asking = patient, record, loop, asking
        self._looked: set[int] = set()
        self._doubt = False
        self._beginnings = 0

    def backward_begin(self, loss: Tensor | None, kind: str) -> None:
        if (
            loss is not None
            and kind != "func"
            and loss.numel() == 1
            and loss.grad_fn is not None
            and loss.device.type == "cpu"
            and self._due()
        ):
            calls = self.patient.training_calls()
            self._ask(lambda: examine(self.patient, loss, [(call.args, call.kwargs) for call in calls]))

    def functional(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self._due():
            self._ask(lambda: examine_function(function, args, kwargs))

    def _due(self) -> bool:
        if self.record.step in self._looked:
            return False
        step = self.loop.pace.steps
        first = step == 0 and self._beginnings < _BEGINNINGS
        due = first or (self._doubt and step in _DOUBTS_AT) or (step in _LOOKS_AT and self.asking.affordable())
        if due:
            self._beginnings += first
            self._looked.add(self.record.step)
        return due

    def _ask(self, question: Callable[[], Any]) -> None:
        answer = self.asking.ask(lambda: fork.ask(question, _TIMEOUT))
        if isinstance(answer, fork.NoAnswer):
            if self.record.step == 0:
                for signal in SIGNALS:
                    self.record.unobserved(signal, answer.reason)
            return
        self._doubt = any(reading["signal"] == "clone_units" and reading["value"] > 0 for reading in answer)
        for reading in answer:
            if reading["signal"] not in ("initial_loss", "initial_gain", "input_rms", "target_rms") or self.record.step == 0:
                self.record.read(
                    reading["signal"],
                    reading["value"],
                    where=reading.get("where", ""),
                    note=reading.get("note"),
                    source=reading.get("source", ""),
                )


def examine(patient: Patient, loss: Tensor, batches: list[Any]) -> list[dict[str, Any]]:
    """Readings from the live graph of `loss`, which is used up; `batches`: what the model was called with. For a forked copy only."""
    names = parameter_names(patient)
    captured = [call for call in patient.losses if call.grad_enabled and not call.spent]
    roots = [bare(call.module) for call in patient.training_calls()]
    frozen = any(not p.requires_grad and p.is_floating_point() for root in roots for p in root.parameters())
    source = captured[-1].source if captured else ""
    smoothing = captured[-1].smoothing if captured else 0.0
    given = [tensor for _, tensor in tensors_in(batches)] if roots else None
    return _readings(loss, names, given, frozen, smoothing, source)


def examine_function(function: Callable[..., Any], args: Any, kwargs: Any) -> list[dict[str, Any]]:
    """The same of a function that torch.func differentiates by its first argument. For a forked copy only."""
    names: dict[int, str] = {}
    parameters = _with_gradients(args[0], "", names)
    with torch.enable_grad():
        loss = function(parameters, *args[1:], **kwargs)
    loss = next((tensor for _, tensor in tensors_in(loss) if tensor.numel() == 1 and tensor.grad_fn is not None), None)
    return _readings(loss, names, [tensor for _, tensor in tensors_in(args[1:])], False, 0.0, "") if loss is not None else []


def _with_gradients(value: Any, path: str, names: dict[int, str]) -> Any:
    """`value` with every floating tensor in it a leaf that wants a gradient; `names` is filled with their paths."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        leaf = value.detach().clone().requires_grad_(True)
        names[id(leaf)] = path
        return leaf
    if isinstance(value, dict):
        return type(value)((key, _with_gradients(item, f"{path}.{key}" if path else str(key), names)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_with_gradients(item, f"{path}.{index}" if path else str(index), names) for index, item in enumerate(value))
    return value


def _readings(
    loss: Tensor, names: dict[int, str], given: list[Tensor] | None, frozen: bool, smoothing: float, source: str
) -> list[dict[str, Any]]:
    anatomy = Anatomy(loss)
    named = {id(w): clean(names.get(id(w.tensor), f"matrix {w.depth} {tuple(w.tensor.shape)}")) for w in anatomy.weights}
    known = frozen or _were_trained(anatomy.weights)
    found: list[dict[str, Any]] = [
        *bounded.squashed(anatomy, smoothing, source),
        *bounded.nll_inputs(anatomy, source),
        *bounded.first_losses(anatomy, source),
        *_gains(anatomy.weights, named),
        *_inputs(anatomy, named, given, frozen),
        *_targets(anatomy, source),
    ]
    for reading in found:
        if reading["signal"] in ("initial_loss", "initial_gain"):
            reading["note"]["trained"] = known
    anatomy.differentiate()
    found += [*_clones(anatomy.weights, named), *_by_depth(anatomy.weights, named)]
    return [reading for reading in found if math.isfinite(reading["value"])]


def _were_trained(weights: list[Weight]) -> bool:
    """True where several matrices have a structure that random entries have not: learning leaves a few directions that stand out."""
    matrices = [w.tensor.detach().flatten(1).float() for w in weights if min(w.tensor.shape[0], w.tensor[0].numel()) >= 8]
    step = max(1, len(matrices) // _SAMPLED)
    tested = [matrix for matrix in matrices[::step][:_SAMPLED] if matrix.numel() <= _FULL_SIZE and float(matrix.std()) > 0]
    return 4 * sum(_stands_out(matrix) for matrix in tested) > len(tested) > 0


def _stands_out(matrix: Tensor) -> bool:
    """True if the largest singular value of the centred matrix exceeds what independent entries of its spread give (Marchenko-Pastur)."""
    centred = matrix - matrix.mean()
    vector = torch.ones(centred.shape[1]) + 0.01 * torch.arange(centred.shape[1]) % 0.37
    for _ in range(30):
        vector = centred.T @ (centred @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    largest = float((centred @ vector).norm())
    rows, columns = centred.shape
    return largest > _STRUCTURED * float(centred.std()) * (math.sqrt(rows) + math.sqrt(columns))


def _gains(weights: list[Weight], named: dict[int, str]) -> Iterator[dict[str, Any]]:
    for weight in weights:
        value = weight.tensor.detach().float()
        rms = value.pow(2).mean().sqrt().item()
        if min(value.shape[-2:]) >= 2 or kind(weight.node) == "Convolution":
            note = {"rms": rms, "fan_in": weight.fan_in, "mean": value.mean().item()}
            yield {"signal": "initial_gain", "value": rms * math.sqrt(weight.fan_in), "where": named[id(weight)], "note": note}


def _clones(weights: list[Weight], named: dict[int, str]) -> Iterator[dict[str, Any]]:
    """1 where all units of a matrix are alike and so are their gradients: whatever the optimizer does to one it does to all."""
    for weight in weights:
        value, gradient = weight.tensor.detach(), weight.gradient
        if gradient is None or min(value.shape[-2:]) < 2 or value.dim() != 2:
            continue
        gradient = gradient.detach()
        alike = any(_all_same(value, dim) and _all_same(gradient, dim) for dim in (0, 1))
        zero, constant = not bool(value.any()), bool((value == value[0, 0]).all())
        note: dict[str, Any] = {"entry": value.flatten()[0].item(), "zero": zero, "constant": constant}
        note |= {"no_gradient": not bool(gradient.any()), "shape": list(value.shape)}
        yield {"signal": "clone_units", "value": float(alike), "where": named[id(weight)], "note": note}


def _all_same(matrix: Tensor, dim: int) -> bool:
    first = matrix.narrow(dim, 0, 1)
    return bool((matrix - first).abs().max() <= 1e-5 * matrix.abs().max())


def _by_depth(weights: list[Weight], named: dict[int, str]) -> Iterator[dict[str, Any]]:
    for weight in weights:
        size = weight.tensor.detach().float().norm().item()
        if weight.gradient is not None and size > 0:
            gradient = weight.gradient.detach().float().norm().item()
            note = {"depth": weight.depth, "matrices": len(weights), "size": size}
            yield {"signal": "gradient_by_depth", "value": gradient / size, "where": named[id(weight)], "note": note}


def _inputs(anatomy: Anatomy, named: dict[int, str], given: list[Tensor] | None, frozen: bool) -> Iterator[dict[str, Any]]:
    """What the first layers multiply, where it is the batch itself and not the work of a frozen part."""
    for weight in anatomy.weights:
        data = weight.data
        if data is None or not data.numel() or (given is not None and frozen and not any(_same_data(data, one) for one in given)):
            continue
        value = data.detach().float()
        value = value[torch.isfinite(value)]
        if value.numel() > 1:
            rms = value.pow(2).mean().sqrt().item()
            note = {"mean": value.mean().item(), "std": value.std().item(), "normalised": anatomy.normalised_after(weight.node)}
            note["largest"] = value.abs().max().item()
            yield {"signal": "input_rms", "value": rms, "where": named[id(weight)], "note": note}


def _same_data(operand: Tensor, given: Tensor) -> bool:
    """True if `operand` is `given`, reshaped or cast."""
    if operand.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        return True
    if operand.numel() != given.numel() or given.dtype == torch.bool or given.is_complex():
        return False
    sizes = [tensor.detach().float().norm().item() for tensor in (operand, given)]
    return math.isclose(*sizes, rel_tol=1e-2)


def _targets(anatomy: Anatomy, source: str) -> Iterator[dict[str, Any]]:
    """What a regression is to hit, beside what the model gives before it has learned anything."""
    graph = Graph(anatomy.loss)
    for node in anatomy.nodes[:_NEAR_LOSS]:
        name = kind(node)
        output: Tensor | None = None
        target: Tensor | None = None
        if name in ("MseLoss", "SmoothL1Loss", "HuberLoss"):
            output, target = saved(node, "self"), saved(node, "target")
        elif name in ("Pow", "Abs") and node.next_functions[0][0] is not None:
            target, output = _difference(graph, node)
        if output is None or target is None or not target.is_floating_point() or target.numel() < 2:
            continue
        wanted, made = target.detach().float(), output.detach().float()
        note = {"output_rms": made.pow(2).mean().sqrt().item(), "mean": wanted.mean().item(), "std": wanted.std().item()}
        yield {"signal": "target_rms", "value": wanted.pow(2).mean().sqrt().item(), "note": note, "source": source}


def _difference(graph: Graph, node: Any) -> tuple[Tensor | None, Tensor | None]:
    """(target, output) of a square or absolute value of output - target, in either order, that the loss is a mean or sum of."""
    below = node.next_functions[0][0]
    while kind(below) in RESHAPES and len(below.next_functions) == 1 and below.next_functions[0][0] is not None:
        below = below.next_functions[0][0]
    if kind(below) != "Sub" or [child is None for child, _ in below.next_functions].count(True) != 1:
        return None, None
    if any(kind(user) not in ("Mean", "Sum", *RESHAPES, "Mul", "Div") for user in _above(graph, node)):
        return None, None
    sign = 1.0 if below.next_functions[0][0] is not None else -1.0
    child, output_nr = next((child, nr) for child, nr in below.next_functions if child is not None)
    residual, output = saved(node, "self"), graph.value(child, output_nr)
    if residual is None or output is None or residual.numel() != output.numel():
        return None, None
    return output - sign * residual.reshape(output.shape), output


def _above(graph: Graph, node: Any) -> list[Any]:
    return [user for (child, _), users in graph._consumers.items() if child is node for user, _ in users]


def attach(patient: Patient, record: RecordWriter, loop: Loop, asking: Asking) -> Callable[[], None]:
    """From now on the model's structure is asked for when it is due."""
    exam = Structure(patient, record, loop, asking)
    loop.on("backward_begin", exam, exam.backward_begin)
    loop.on("functional", exam, exam.functional)
    loop.rests(exam)
    return lambda: None
