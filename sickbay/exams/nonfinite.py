"""From NaN to the line: which operation made the first non-finite value of a step, from which operands, where in the user's code.

Asked in a forked copy of the process. The suspects in order: the model's inputs, its weights, its forward pass (run
again with every operation watched), the loss between output and backward (its autograd graph is walked), and the
backward pass (differentiated again under the same watch).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sickbay.exams import bad_step
from sickbay.exams.fork import NoAnswer, ask, can_fork
from sickbay.exams.graph_walk import Culprit, Graph
from sickbay.exams.operand import bad_row, count_nonfinite, describe, familiar, fully_masked_rows, kinds, node_operation
from sickbay.exams.origin import Origin, OriginWatch, differentiate, operands_of, replay
from sickbay.exams.rebuild import rebuilt_loss
from sickbay.exams.stretch import Fault, Stretch
from sickbay.exams.ungraded import Birth, Ungraded
from sickbay.patient import ForwardCall, Patient, bare, tensors_in, user_line

# Operations that make no NaN out of finite operands.
_PASS_ON = frozenset({"add", "sub", "rsub", "mul", "neg", "sum", "mean", "cat", "stack", "where", "masked_fill"})
_SUMS = frozenset({"add", "sub", "rsub"})

_Operation = tuple[dict[str, Any], list[tuple[str, Tensor]]]


@dataclass
class Finding:
    """The first non-finite value. `value`: elements that are not finite; `where`: module or parameter; `source`: the user's `file:line`.

    `note`: op, phase (input, weight, forward, backward, update), dtype, operands, result, chain, sample, traced, saved.
    """

    value: int
    where: str
    source: str
    note: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Traced:
    """A finding before it is put in words, and what repro.py would run."""

    finding: Finding
    call: ForwardCall | None
    operation: _Operation | None


def locate(
    patient: Patient,
    what: Literal["loss", "gradient"],
    loss: Tensor | None,
    stretch: Stretch,
    folder: str | None,
    timeout: float = 60,
    ungraded: Ungraded | None = None,
) -> Finding | NoAnswer:
    """The first non-finite value of this step; `folder`/first-bad-step holds what repeats it. NoAnswer says why it could not be traced.

    "loss": called where backward begins, the graph alive. "gradient": called after backward, the weights still those of the forward.
    The run's tensors, gradients, buffers and RNG are as before.
    """
    here = user_line(2)

    def question() -> dict[str, Any] | None:
        patient.muted = True
        traced = _trace_loss(patient, loss, stretch, here, ungraded) if what == "loss" else _trace_gradient(patient, stretch)
        if traced is None:
            return None
        finding = traced.finding
        if folder is not None:
            fields = {"phase": finding.note["phase"], "op": finding.note["op"], "where": finding.where, "source": finding.source}
            finding.note["saved"] = bad_step.save(folder, patient, traced.call, fields, traced.operation)
        return asdict(finding)

    if can_fork() == "":
        answer = ask(question, timeout)
    else:
        with _untouched(patient):
            try:
                answer = question()
            except Exception as problem:
                answer = NoAnswer(f"{type(problem).__name__}: {problem}"[:500])
    if isinstance(answer, NoAnswer):
        return answer
    return Finding(**answer) if answer is not None else NoAnswer(f"the step was run again and its {what} was finite")


def locate_overflow(patient: Patient, scale: float) -> Finding | NoAnswer:
    """The first operation whose gradient leaves float16 when the step's loss is differentiated at the loss scale `scale`.

    For the moment before a step that a GradScaler leaves out is over. NoAnswer where the loss cannot be had again, or its gradient fits.
    """

    def question() -> dict[str, Any] | None:
        patient.muted, patient.scale = True, scale
        for call in reversed(patient.training_calls()):
            output, watch = replay(call, keep=True)
            result, cotangent, how = rebuilt_loss(patient, output, watch)
            origin = _earliest(differentiate(result, cotangent, watch, bare(call.module))) if result.dim() == 0 else None
            if origin is not None and origin.kind == "operation" and origin.result.dtype == torch.float16:
                finding = _from_origin(origin, watch, call, "backward").finding
                finding.note |= {"loss_scale": scale, "traced": f"{finding.note['traced']}; {how}"}
                return asdict(finding)
        return None

    answer = ask(question, 60)
    if isinstance(answer, NoAnswer):
        return answer
    return Finding(**answer) if answer is not None else NoAnswer("the step was run again and its gradient fitted float16")


@contextlib.contextmanager
def _untouched(patient: Patient) -> Iterator[None]:
    """After it, RNG and buffers are as before; gradients are never written by a question."""
    muted, cpu = patient.muted, torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    buffers = [(buffer, buffer.clone()) for call in patient.training_calls() for buffer in bare(call.module).buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        patient.muted = muted


def _trace_loss(patient: Patient, loss: Tensor | None, stretch: Stretch, here: str, ungraded: Ungraded | None) -> _Traced | None:
    problems: list[str] = []
    for call in patient.training_calls():
        try:
            output, watch = replay(call)
        except Exception as problem:
            problems.append(f"{type(problem).__name__}: {problem}")
            continue
        origin = _earliest(_origins(output, watch))
        if origin is not None:
            return _from_origin(origin, watch, call, "forward")
    if loss is not None and loss.grad_fn is not None:
        graph = Graph(loss)
        culprit = graph.culprit()
        if culprit is not None:
            hidden = _met_what_is_not_kept(culprit)
            birth = _birth_behind(culprit, hidden, ungraded) if ungraded is not None else None
            if birth is not None:
                return _from_birth(birth, patient)
            traced = _from_culprit(culprit, graph, patient, stretch, here)
            traced.finding.note["ungraded"] = hidden
            return traced
    if problems:
        raise RuntimeError(f"the forward pass could not be run again: {problems[0]}")
    return None


def _birth_behind(culprit: Culprit, hidden: bool, ungraded: Ungraded) -> Birth | None:
    """The held operation behind a value that came into the graph, or behind the one that `culprit` met and autograd does not keep."""
    if culprit.phase == "input" and culprit.result is not None:
        return ungraded.birth(culprit.result)
    return ungraded.newest() if hidden else None


def _met_what_is_not_kept(culprit: Culprit) -> bool:
    """True where finite operands cannot have given the result: the one that autograd does not keep was NaN or infinite before."""
    result, name = culprit.result, familiar(culprit.operation)
    if culprit.phase != "forward" or result is None or name not in _PASS_ON or any(kinds(tensor) for _, tensor in culprit.operands):
        return False
    if bool(result.isnan().any()):
        return True
    limits = torch.finfo(result.dtype)  # what is smaller than half a step of the largest number takes no finite number beyond it
    return name in _SUMS and all(bool((tensor.abs() < limits.max * limits.eps / 4).all()) for _, tensor in culprit.operands)


def _trace_gradient(patient: Patient, stretch: Stretch) -> _Traced | None:
    fault, call = stretch.fault(), None
    problems: list[str] = []
    for call in reversed(patient.training_calls()):
        try:
            output, watch = replay(call, keep=True)
            result, cotangent, how = rebuilt_loss(patient, output, watch)
            origin = _earliest(differentiate(result, cotangent, watch, bare(call.module)))
        except Exception as problem:
            problems.append(f"{type(problem).__name__}: {problem}")
            continue
        # An operation that the model has too is judged by the model's own re-run, which also sees what masks a gradient.
        if origin is not None and (fault is None or any(seen.name.rstrip("_") == fault.name for seen in watch.by_sequence.values())):
            traced = _from_origin(origin, watch, call, "backward")
            traced.finding.note["traced"] += f"; {how}"
            return traced
    if fault is not None:
        return _from_fault(fault, call)
    if problems:
        raise RuntimeError(f"the step could not be run again: {problems[0]}")
    return None


def _origins(output: Any, watch: OriginWatch) -> list[Origin]:
    """The origins of what is not finite in the root's output; of its loss alone where it returns one."""
    tensors = [tensor for _, tensor in tensors_in(output) if tensor.is_floating_point()]
    scalars = [tensor for tensor in tensors if tensor.dim() == 0 and kinds(tensor)]
    return [origin for tensor in scalars or tensors for origin in watch.of(tensor)]


def _earliest(origins: list[Origin]) -> Origin | None:
    """The first suspect: inputs before weights before operations in their order."""
    ranks = {"input": 0, "weight": 1, "operation": 2}
    return min(origins, key=lambda origin: (ranks[origin.kind], origin.seen.index if origin.seen else 0), default=None)


def _name_of(origin: Origin) -> str:
    if origin.forward is not None:
        return familiar(origin.forward.name)
    if origin.node:
        return familiar(node_operation(origin.node))
    return familiar(origin.name)


def _from_origin(origin: Origin, watch: OriginWatch, call: ForwardCall, phase: str) -> _Traced:
    seen = origin.forward or origin.seen
    if seen is None or origin.seen is None:
        note = _note("", origin.kind, [(origin.name, origin.result)], origin.result, [])
        note["traced"] = "the root module's inputs and weights were looked at"
        note["sample"] = bad_row(origin.result) if origin.kind == "input" else None
        where = origin.name if origin.kind == "weight" else ""
        return _Traced(
            Finding(count_nonfinite(origin.result), where, call.source, note), call, bad_step.value_of(origin.name, origin.result)
        )
    operands = operands_of(origin)
    note = _note(_name_of(origin), phase, operands, origin.result, [familiar(name) for name in watch.chain(seen)])
    note["traced"] = f"the {'step' if phase == 'backward' else 'forward pass'} was run again with every operation watched"
    schema = seen.func._schema
    given = origin.args if origin.forward is None else seen.args or ()
    _special(note, operands, {argument.name: value for argument, value in zip(schema.arguments, given)})
    operation = None
    if phase == "backward" and seen.args is not None and bad_step.repeats(seen.func, seen.args, seen.kwargs, "gradient"):
        operation = bad_step.operation_of(seen.func, seen.args, seen.kwargs, "gradient")
    elif bad_step.repeats(origin.seen.func, origin.args, origin.kwargs, "forward"):
        operation = bad_step.operation_of(origin.seen.func, origin.args, origin.kwargs, "forward")
    return _Traced(Finding(count_nonfinite(origin.result), seen.module, seen.source or call.source, note), call, operation)


def _from_culprit(culprit: Culprit, graph: Graph, patient: Patient, stretch: Stretch, here: str) -> _Traced:
    calls = patient.training_calls()
    source, how = _line_of(culprit.node, graph, patient, stretch), "the loss's autograd graph was walked"
    if not source and culprit.phase != "weight":
        source, how = here, f"{how}; its line is not known, the one given is backward's"
    result = culprit.result
    note = _note(familiar(culprit.operation), culprit.phase, culprit.operands, result, [familiar(name) for name in culprit.chain])
    note["traced"] = how
    where, operation = "", None
    if culprit.phase == "weight" and result is not None:
        where = _parameter_name(patient, result)
        operation = bad_step.value_of(where, result)
    elif culprit.phase == "input" and result is not None:
        note["sample"] = bad_row(result)
        operation = bad_step.value_of(culprit.operands[0][0], result)
    else:
        given: dict[str, Any] = dict(culprit.operands)
        if culprit.call is not None:
            function, args = culprit.call
            given = {argument.name: value for argument, value in zip(function._schema.arguments, args)}
            if bad_step.repeats(function, args, {}, "forward"):
                operation = bad_step.operation_of(function, args, {}, "forward")
        _special(note, culprit.operands, given)
    value = count_nonfinite(result) if result is not None else 1
    return _Traced(Finding(value, where, source, note), calls[-1] if calls else None, operation)


def _from_birth(birth: Birth, patient: Patient) -> _Traced:
    calls = patient.training_calls()
    finding = born(birth, "loss", "the operations without gradient before the loss were held")
    return _Traced(finding, calls[-1] if calls else None, bad_step.value_of(birth.op, birth.result))


def born(birth: Birth, phase: str, traced: str) -> Finding:
    """`birth` as a finding of `phase`; `traced`: how it was come by."""
    note = _note(familiar(birth.op), phase, birth.operands, birth.result, [])
    note["traced"] = traced
    return Finding(count_nonfinite(birth.result), "", birth.source, note)


def _from_fault(fault: Fault, call: ForwardCall | None) -> _Traced:
    names = [argument.name for argument in fault.func._schema.arguments]
    operands = [(name, value) for name, value in zip(names, fault.args) if isinstance(value, Tensor)]
    note = _note(familiar(fault.name), "backward", operands, fault.gradient, [familiar(name) for name in fault.chain])
    note["traced"] = "the operands that the loss saved were differentiated again"
    operation = (
        bad_step.operation_of(fault.func, fault.args, {}, "gradient") if bad_step.repeats(fault.func, fault.args, {}, "gradient") else None
    )
    return _Traced(Finding(count_nonfinite(fault.gradient), "", fault.source, note), call, operation)


def _note(op: str, phase: str, operands: list[tuple[str, Tensor]], result: Tensor | None, chain: list[str]) -> dict[str, Any]:
    described = describe("result", result) if result is not None else {}
    return {
        "op": op,
        "phase": phase,
        "dtype": described.get("dtype", ""),
        "operands": [describe(name, tensor) for name, tensor in operands],
        "result": {key: described[key] for key in ("shape", "dtype", "nonfinite", "nan", "absmax") if key in described},
        "chain": chain,
        "sample": None,
    }


def _special(note: dict[str, Any], operands: list[tuple[str, Tensor]], given: dict[str, Any]) -> None:
    """Rows that may attend nowhere, and losses that count no target, are said in the note."""
    if note["op"] in ("softmax", "log_softmax", "scaled_dot_product_attention"):
        masks = [tensor for name, tensor in operands if name in ("self", "attn_mask", "attn_bias")]
        over = given.get("dim", -1) if isinstance(given.get("dim", -1), int) else -1
        note["fully_masked_rows"] = sum(fully_masked_rows(mask, over) for mask in masks if mask.is_floating_point())
    target = given.get("target")
    if note["op"] == "nll_loss" and isinstance(target, Tensor):
        ignored = given.get("ignore_index", -100)
        note["counted_targets"] = int((target != ignored).sum())


def _line_of(node: Any, graph: Graph, patient: Patient, stretch: Stretch) -> str:
    """The user's line that made `node`: a captured loss call's, or the one that the recorded stretch agrees on."""
    if node.name().endswith("AccumulateGrad"):
        return ""
    for call in patient.losses:
        first, last = call.nodes
        if first < node._sequence_nr() <= last:
            return call.source
    return stretch.line_of(node, graph.nodes)


def _parameter_name(patient: Patient, parameter: Tensor) -> str:
    """The parameter's name in a root module, or its place in its optimizer."""
    for root in patient.roots:
        for name, own in root.named_parameters():
            if own.data_ptr() == parameter.data_ptr() and own.shape == parameter.shape:
                return name
    places = bad_step.optimizer_parameters(patient)
    return next((name for name, own in places if own.data_ptr() == parameter.data_ptr() and own.shape == parameter.shape), "")


def locate_update(optimizer: Any, names: Mapping[int, str]) -> Finding | NoAnswer:
    """The first parameter that the optimizer's update made non-finite although its gradient was finite, with the state that overflowed.

    `names`: parameter names by `id(parameter)`. Reads only; for the moment after `optimizer.step()`.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not kinds(parameter) or (parameter.grad is not None and kinds(parameter.grad)):
                continue
            state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
            overflowed = [key for key, value in state.items() if kinds(value)]
            operands = [("gradient", parameter.grad)] if parameter.grad is not None else []
            note = _note(type(optimizer).__name__, "update", [*operands, *state.items()], parameter, [])
            chosen = {key: value for key, value in group.items() if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)}
            note |= {
                "lr": float(group["lr"]),
                "state": overflowed,
                "settings": chosen,
                "traced": "gradient, weight and state after the update",
            }
            return Finding(count_nonfinite(parameter), names.get(id(parameter), ""), user_line(2), note)
    return NoAnswer("no parameter is non-finite beside a finite gradient")
