"""Follows a training state from the file it was loaded from to the first step taken with it: what of it did the run really go on with?

A checkpoint is taken up as a run's continuation only where the script's code reads the file's step or epoch count for further use;
loading weights to fine-tune, to evaluate or to average them is nobody's business. What counts then is the state itself, at that step.
"""

from __future__ import annotations

import dis
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from sickbay.core.record import RecordWriter
from sickbay.patient import Patient, bare_optimizer, is_user_file, user_line
from sickbay.probes.loop import Loop
from sickbay.probes.unseen import unseen

SIGNALS = ("restored_state",)

_COUNTER = re.compile(r"step|iter|epoch|update", re.IGNORECASE)
_FRAMES = 8  # of the script above a load, in which the count may be read
_STEP = ("step_begin", "step_end")
_FILES = 8  # loaded ones that are remembered
_MARKS = 4  # tensors by which a file's weights are recognised
_AFTER = 10  # instructions in which what was read goes into a variable or a call
_KEEPS = ("STORE_FAST", "STORE_NAME", "STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "GET_ITER", "RETURN_VALUE")
_ENDS = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RETURN_", "RAISE_VARARGS", "RERAISE")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_DROPS = ("POP_TOP", "FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "BUILD_STRING", "CONVERT_VALUE")


@dataclass
class Loaded:
    """What one file held: `count` is the newest step or epoch in it that the script reads, under `key`; `schedule` the scheduler's own."""

    name: str
    key: str
    count: int
    optimizer: bool = False
    schedule: int = 0
    marks: list[weakref.ref[Tensor]] = field(default_factory=list)


@dataclass
class Resumed:
    """A module that has got a file's weights and has not been trained since."""

    file: Loaded
    module: weakref.ref[nn.Module]
    source: str
    began_fresh: bool | None = None
    schedule_fresh: bool = False


class Checkpoints:
    """Writes, for each run taken up again, how many parts of the training state its first step did without."""

    SIGNALS = SIGNALS

    def __init__(self, patient: Patient, record: RecordWriter, loop: Loop) -> None:
        self.patient, self.record, self.loop = patient, record, loop
        self._files: list[Loaded] = []
        self._resumed: list[Resumed] = []
        self._schedulers: weakref.WeakSet[Any] = weakref.WeakSet()

    def loaded(self, content: Any, path: Any) -> None:
        """The script has loaded `content`."""
        if not isinstance(content, dict):
            return
        counters = {key: value for key, value in content.items() if isinstance(key, str) and _COUNTER.search(key) and _is_count(value)}
        read = [key for key in counters if any(reads(code, key, at) for code, at in _running())] if counters else []
        if not read:
            return
        key = max(read, key=lambda name: counters[name])
        name = os.path.basename(str(path)) if isinstance(path, (str, os.PathLike)) else "a file"
        file = Loaded(name, key, int(counters[key]))
        tensors: list[Tensor] = []
        for part in _dicts(content):
            if "param_groups" in part and "state" in part:
                file.optimizer = file.optimizer or bool(part["state"])
            elif isinstance(part.get("last_epoch"), int):
                file.schedule = max(file.schedule, part["last_epoch"])
            else:
                tensors += [value for value in part.values() if isinstance(value, Tensor)]
        file.marks = [weakref.ref(tensor) for tensor in tensors[:: max(1, len(tensors) // _MARKS)]]
        self._files = [*self._files[-_FILES + 1 :], file]

    def restored(self, module: nn.Module, state: Any) -> None:
        """`module` has been given `state`."""
        values = {id(value) for value in state.values()} if hasattr(state, "values") else set()
        for file in self._files:
            if any((tensor := mark()) is not None and id(tensor) in values for mark in file.marks):
                self._resumed = [*self._resumed[-_FILES + 1 :], Resumed(file, weakref.ref(module), user_line())]
        if self._resumed:  # the optimizers' steps are heard only while a run that was taken up again waits for its first
            for event in _STEP:
                self.loop.on(event, self, getattr(self, event))

    def step_begin(self, optimizer: Any, late: bool) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for resumed in self._resumed:
            module = resumed.module()
            if module is not None and any(id(parameter) in held for parameter in module.parameters()):
                resumed.began_fresh = not optimizer.state and not late
                mine = [s for s in tuple(self._schedulers) if bare_optimizer(getattr(s, "optimizer", None)) is optimizer]
                before = max(resumed.file.schedule, 0 if resumed.file.schedule else resumed.file.count)
                resumed.schedule_fresh = bool(mine) and before > 1 and all(s.last_epoch <= 1 for s in mine)

    def step_end(self, optimizer: Any) -> None:
        taken = [resumed for resumed in self._resumed if resumed.began_fresh is not None]
        for resumed in taken:
            missing = ["optimizer"] if resumed.began_fresh and _remembers(optimizer) else []
            missing += ["scheduler"] if resumed.schedule_fresh else []
            file = resumed.file
            saved = [name for name, there in (("optimizer", file.optimizer), ("scheduler", file.schedule > 0)) if there]
            note = {"missing": missing, "saved": saved, "file": file.name, "key": file.key, "count": file.count}
            self.record.read("restored_state", len(missing), where=type(optimizer).__name__, note=note, source=resumed.source)
        self._resumed = [resumed for resumed in self._resumed if resumed.began_fresh is None]
        if not self._resumed:
            for event in _STEP:
                self.loop.off(event, self)

    # --- what is put around torch's own ------------------------------------------------------------------------------
    def around_load(self, original: Any) -> Any:
        @unseen
        def load(*args: Any, **kwargs: Any) -> Any:
            content = original(*args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("load", self):
                    self.loaded(content, args[0] if args else kwargs.get("f"))
            return content

        return load

    def around_restore(self, original: Any) -> Any:
        @unseen
        def load_state_dict(module: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(module, *args, **kwargs)
            if self._files and self.loop.awake():
                with self.loop.sheltered("load_state_dict", self):
                    self.restored(module, args[0] if args else kwargs.get("state_dict"))
            return answer

        return load_state_dict

    def around_scheduler(self, original: Any) -> Any:
        @unseen
        def __init__(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            original(scheduler, *args, **kwargs)
            if self.loop.awake():
                with self.loop.sheltered("scheduler", self):
                    self._schedulers.add(scheduler)

        return __init__


def reads(code: CodeType, key: str, after: int = -1) -> bool:
    """True if `code` can go on, from the instruction at offset `after`, to take `x[key]`, `x.get(key)` or `x.pop(key)` into a variable,
    a loop or a result; printing it is no use of it, nor is what stands in another branch or in the next turn of a loop.
    """
    if key not in code.co_consts:
        return False
    instructions = [one for one in dis.get_instructions(code) if one.opname not in ("PRECALL", "CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for place in _reachable(instructions, after):
        one = instructions[place]
        if not one.opname.startswith("LOAD_CONST") or one.argval != key:
            continue
        following = instructions[place + 1 : place + 3]
        taken = following and (following[0].opname == "BINARY_SUBSCR" or following[0].argrepr == "[]")
        before = instructions[place - 1] if place else None
        called = before is not None and before.opname in ("LOAD_METHOD", "LOAD_ATTR") and str(before.argval) in ("get", "pop")
        if (taken or called) and _is_kept(instructions[place + 1 : place + 1 + _AFTER]):
            return True
    return False


def _reachable(instructions: list[dis.Instruction], after: int) -> list[int]:
    """The places in `instructions` that execution may come to from offset `after` without going back."""
    at = {one.offset: place for place, one in enumerate(instructions)}
    offsets = [one.offset for one in instructions]
    start = next((place for place, offset in enumerate(offsets) if offset > after), len(instructions))
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        place = waiting.pop()
        while place < len(instructions) and place not in seen:
            seen.add(place)
            one = instructions[place]
            if one.opcode in _JUMPS and isinstance(one.argval, int) and one.argval > one.offset:
                # A target may be one of the instructions left out above: what follows it is meant.
                waiting.append(at.get(one.argval, next((p for p, offset in enumerate(offsets) if offset >= one.argval), len(offsets))))
            if one.opname.startswith(_ENDS):
                break
            place += 1
    return sorted(seen)


def _is_kept(instructions: list[dis.Instruction]) -> bool:
    for one in instructions:
        if one.opname.startswith(_KEEPS):
            return True
        if one.opname.startswith(_DROPS):
            return False
    return False


def _running() -> list[tuple[CodeType, int]]:
    """The script's functions that are running, the innermost first: their code, and the offset they have come to."""
    found: list[tuple[CodeType, int]] = []
    frame: Any = sys._getframe(1)
    while frame is not None and len(found) < _FRAMES:
        if is_user_file(frame.f_code.co_filename):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _dicts(content: Any, depth: int = 0) -> Iterator[dict[Any, Any]]:
    """The dictionaries in `content`, a few levels down; those of an optimizer or of weights are not looked into."""
    if isinstance(content, dict):
        yield content
        if depth < 2 and "param_groups" not in content:
            for value in content.values():
                yield from _dicts(value, depth + 1)
    elif isinstance(content, (list, tuple)) and depth < 2:
        for value in content[:8]:
            yield from _dicts(value, depth + 1)


def _remembers(optimizer: Any) -> bool:
    """True if the optimizer keeps something as large as a parameter from step to step: momentum, second moments."""
    return any(
        isinstance(value, Tensor) and value.numel() > 1 and value.shape == parameter.shape
        for parameter, state in list(optimizer.state.items())[:4]
        if isinstance(state, dict)
        for value in state.values()
    )


def attach(patient: Patient, record: RecordWriter, loop: Loop) -> Callable[[], None]:
    """From now on what is loaded is followed until it is trained on."""
    probe = Checkpoints(patient, record, loop)
    for module in (torch, torch.serialization):
        loop.replace(module, "load", probe.around_load)
    loop.replace(nn.Module, "load_state_dict", probe.around_restore)
    loop.replace(LRScheduler, "__init__", probe.around_scheduler)
    return lambda: None
