"""Reads an uncaught exception where it happened: the shapes on the module path, and the mistake they suggest."""

from __future__ import annotations

import itertools
import re
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, is_user_file
from sickbay.probes.gradients import clean
from sickbay.probes.loop import Loop

SIGNALS = ("exception",)

_SHAPE = re.compile(
    r"shapes? cannot be multiplied|must match the size|size of tensor|is invalid for input of size|sizes of tensors must match|"
    r"stack expects each tensor|batch number of|feature number of|must be equal|expected .*(dimension|\bdim\b|batch_size|size|shape)|"
    r"normalized_shape|split_with_sizes|embed_dim|attn_mask|key_padding_mask|not divisible|broadcast|subscript|inconsistent tensor size|"
    r"dimension out of range|shape mismatch|expanded size of the tensor|input and .* must have",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"index out of range in self|Target -?\d+ is out of bounds|index -?\d+ is out of bounds for dimension|device-side assert", re.IGNORECASE
)
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_VALUES = re.compile(r"to satisfy the constraint|invalid values", re.IGNORECASE)  # torch.distributions names the shape of what it refuses
_MAX_SHAPES = 12


def read_exception(exception: BaseException, record: RecordWriter, patient: Patient) -> None:
    """Writes one `exception` reading for `exception`; its note explains shapes as far as the frames tell."""
    frames = list(_frames(exception.__traceback__))
    user = [(f, line) for f, line in frames if is_user_file(f.f_code.co_filename)]
    message = str(exception)[:2000]
    kind = _kind(exception, message)
    path = _module_path(frames, patient)
    innermost = [frame for frame, _ in frames[-4:]] + ([user[-1][0]] if user else [])
    shapes = _shapes(innermost)
    note: dict[str, Any] = {"type": type(exception).__name__, "message": message, "kind": kind, "shapes": shapes, "path": path}
    note["operation"] = frames[-1][0].f_code.co_name if frames else ""
    if kind == "shape":
        note["likely"] = likely_shape_cause(message, shapes, path, user[-1][0] if user else None)
    elif kind == "token-id":
        note["likely"] = _token_cause(message, frames)
    source = f"{user[-1][0].f_code.co_filename}:{user[-1][1]}" if user else ""
    record.read("exception", 1, where=path[-1]["module"] if path else "", note=note, source=source)


def _frames(trace: TracebackType | None) -> Any:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _kind(exception: BaseException, message: str) -> str:
    if isinstance(exception, MemoryError) or _MEMORY.search(message):
        return "out-of-memory"
    if isinstance(exception, (IndexError, RuntimeError)) and _TOKEN.search(message):
        return "token-id"
    if _VALUES.search(message):
        return "other"
    if isinstance(exception, (RuntimeError, ValueError, AssertionError, IndexError)) and _SHAPE.search(message):
        return "shape"
    if isinstance(exception, ValueError) and "values to unpack" in message and _unpacks_a_shape(exception):
        return "shape"
    return "other"


def _unpacks_a_shape(exception: BaseException) -> bool:
    """True if the line that failed takes a tensor's shape apart."""
    last = traceback.extract_tb(exception.__traceback__)[-1].line or ""
    return ".shape" in last or ".size()" in last


def _module_path(frames: list[tuple[FrameType, int]], patient: Patient) -> list[dict[str, Any]]:
    """The modules the call went through, outermost first, each with the shapes of the tensors it was given."""
    names: dict[int, str] = {}
    path: list[dict[str, Any]] = []
    for frame, _ in frames:
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "inner"):
            continue
        if not names:
            names = {id(part): clean(name) or type(module).__name__ for name, part in module.named_modules()}
        name = names.get(id(module), type(module).__name__)
        given = {key: list(value.shape) for key, value in frame.f_locals.items() if isinstance(value, Tensor)}
        if not path or path[-1]["module"] != name:
            path.append({"module": name, "kind": type(module).__name__, "shape_in": dict(itertools.islice(given.items(), 6))})
    return path


def _shapes(frames: list[FrameType]) -> list[dict[str, Any]]:
    seen: dict[str, list[int]] = {}
    for frame in frames:
        for name, value in frame.f_locals.items():
            if isinstance(value, Tensor) and len(seen) < _MAX_SHAPES:
                seen.setdefault(name, list(value.shape))
    return [{"name": name, "shape": shape} for name, shape in seen.items()]


def _inputs(shapes: list[dict[str, Any]], path: list[dict[str, Any]]) -> list[list[int]]:
    given = [shape for step in reversed(path) for shape in step["shape_in"].values()]
    return given + [entry["shape"] for entry in shapes]


def likely_shape_cause(message: str, shapes: list[dict[str, Any]], path: list[dict[str, Any]], frame: FrameType | None) -> str:
    """One sentence on the mistake that these shapes suggest; "" when they suggest none."""
    tensors = _inputs(shapes, path)
    product = re.search(r"\((\d+)x(\d+) and (\d+)x(\d+)\)", message)
    if product:
        rows, got, wanted, _ = map(int, product.groups())
        for shape in tensors:
            if shape and shape[-1] == got and wanted in shape[:-1]:
                axis = len(shape) - 1 - shape[::-1].index(wanted)
                return (
                    f"the input is {shape}: its axis {axis} has the {wanted} features the layer expects on the last axis, "
                    f"so axes are swapped: transpose({axis}, -1)"
                )
        heads = _integers(frame)
        for name, count in heads.items():
            if count > 1 and got * count == wanted:
                merged = f"transpose(1, 2).reshape(batch, time, {wanted})"
                return f"the last axis has {got} = {wanted} / {name} elements: the {count} heads were not merged back ({merged})"
            if count > 1 and wanted * count == got:
                split = f"view(..., {count}, {wanted})"
                return f"the last axis has {got} = {wanted} * {name} elements: the heads (or parts) must be split first, {split}"
        if got == rows or any(len(shape) == 1 for shape in tensors[:1]):
            return f"the layer expects {wanted} features on the last axis and got {got}: a batch or time axis is missing, unsqueeze(0)"
        return f"the layer was built for {wanted} input features and got {got}"
    if "batch number of src and tgt" in message:
        found = {entry["name"]: entry["shape"] for entry in shapes}
        for step in path:
            found.update(step["shape_in"])
        src, tgt = found.get("src", []), found.get("tgt", [])
        if len(src) == 3 and len(tgt) == 3 and (src[0] == tgt[1] or src[1] == tgt[0]):
            layout = "nn.Transformer expects (time, batch, features) unless batch_first=True"
            return f"src is {src} and tgt is {tgt}: one is batch-first, the other sequence-first; {layout}"
        return f"src is {src} and tgt is {tgt}: their batch axes differ; check batch_first"
    sizes = re.search(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)", message)
    if sizes:
        a, b, axis = map(int, sizes.groups())
        if abs(a - b) == 1:
            return f"the two sides differ by one at axis {axis} ({a} against {b}): one was shifted or got an end token, the other did not"
        for shape in tensors:
            if a in shape and b in shape and len(shape) >= 2:
                return f"a tensor of shape {shape} carries both {a} and {b}: two axes are swapped (batch and time, or time and features)"
        return f"the two sides have {a} and {b} elements at axis {axis}: one lacks an axis (unsqueeze) or was cut to another length"
    expanded = re.search(r"expanded size of the tensor \((\d+)\) must match the existing size \((\d+)\) .*dimension (\d+)", message)
    if expanded:
        wanted, there, along = map(int, expanded.groups())
        reason = "the input is longer than the model was built for" if wanted > there else "two lengths that must agree differ"
        return f"axis {along} is to have {wanted} elements and {there} are there: {reason}"
    view = re.search(r"shape '\[([^\]]*)\]' is invalid for input of size (\d+)", message)
    if view:
        asked, size = [int(part) for part in view.group(1).split(",")], int(view.group(2))
        return f"view({asked}) does not hold the {size} elements there are: check heads against width, and the batch axis"
    pair = re.search(r"Expected input batch_size \((\d+)\) to match target batch_size \((\d+)\)", message)
    if pair:
        a, b = map(int, pair.groups())
        return f"logits have {a} rows and targets {b}: only one of them was shifted by a token or flattened"
    unpacked = re.search(r"values to unpack \(expected (\d+)(?:, got (\d+))?\)", message)
    if unpacked:
        return f"the code takes a shape of {unpacked.group(1)} axes apart and the tensor has {unpacked.group(2) or 'more'}"
    if re.search(r"must match|must be equal|same size|equal size", message, re.IGNORECASE):
        return "rows of different length meet: pad them to one length, or check which axis is the batch"
    return ""


def _integers(frame: FrameType | None) -> dict[str, int]:
    """Small integers in reach of the failing line: head counts and the like, with how they are called there."""
    found: dict[str, int] = {}
    if frame is not None:
        owner = frame.f_locals.get("self")
        for name, value in [*frame.f_locals.items(), *(vars(owner).items() if hasattr(owner, "__dict__") else ())]:
            if isinstance(value, int) and not isinstance(value, bool) and 1 < value <= 256:
                found[name] = value
    return found


def _token_cause(message: str, frames: list[tuple[FrameType, int]]) -> str:
    for frame, _ in reversed(frames):
        ids, table = frame.f_locals.get("input"), frame.f_locals.get("weight")
        if isinstance(ids, Tensor) and isinstance(table, Tensor) and not ids.is_floating_point() and table.dim() == 2 and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            return f"token ids run from {low} to {high}, the embedding has rows 0 to {table.shape[0] - 1}"
    target = re.search(r"Target (-?\d+) is out of bounds", message)
    if target:
        return f"target id {target.group(1)} is not one of the classes the logits cover"
    return "an index exceeds the table it looks up"


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on an exception that ends the script is read before it is shown."""
    loop.on("failed", read_exception, lambda exception: read_exception(exception, record, patient))
    return lambda: None
