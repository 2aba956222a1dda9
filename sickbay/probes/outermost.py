"""Sees the outermost module calls, and only them: inner modules, compiled code, pickles and copies never meet a hook.

One global pre-hook is present between outermost calls. Inside one it is absent, and the called module's own hook
dictionaries are exchanged for stand-ins that show one more hook to torch's call of that module and to nobody else.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_internals

from sickbay.patient import ForwardCall, has_parameters, user_line

_IDS = itertools.count(-0x51C6, -1)  # torch counts its own hook ids upwards from 0; a pickle shows the ids of the user's hooks
_DICTIONARIES = ("_forward_hooks", "_forward_hooks_always_called")


def hook_id() -> int:
    """An id that no hook of torch's or the user's has."""
    return next(_IDS)


class StandIn(OrderedDict[int, Any]):
    """A module's hook dictionary during one call: all its contents live in `original`; only `items` and `in` know one entry more.

    Torch's call of the module asks `bool`, `items` and `in`; `len` is what decides over fast paths (nn.TransformerEncoderLayer), so it
    says what is true without us. A pickle or copy is `original`'s.
    """

    def __init__(self, original: OrderedDict[int, Any], key: int, entry: Any) -> None:
        super().__init__()
        self.original, self.key, self.entry = original, key, entry
        self.written = False

    def items(self) -> Any:
        return [*self.original.items(), (self.key, self.entry)]

    def __contains__(self, key: object) -> bool:
        return key == self.key or key in self.original

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.original)

    def __iter__(self) -> Iterator[int]:
        return iter(self.original)

    def keys(self) -> Any:
        return self.original.keys()

    def values(self) -> Any:
        return self.original.values()

    def __getitem__(self, key: int) -> Any:
        return self.original[key]

    def __setitem__(self, key: int, value: Any) -> None:
        self.written = True
        self.original[key] = value

    def __delitem__(self, key: int) -> None:
        del self.original[key]

    def move_to_end(self, key: int, last: bool = True) -> None:
        self.original.move_to_end(key, last)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.original.__reduce_ex__(protocol)


class Outermost:
    """Calls `begins(call)` and `ends(call, output)` around each outermost call of a module with parameters.

    `awake`: asked before each; `slept_through(module, args, kwargs)`: True for a call that neither is told of, after which no
    module call is seen until `on`. `failed(event, problem)`: told what went wrong in here, since nothing is raised.
    """

    def __init__(
        self,
        awake: Callable[[], bool],
        slept_through: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], bool],
        begins: Callable[[ForwardCall], None],
        ends: Callable[[ForwardCall, Any], None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._awake, self._slept_through, self._begins, self._ends, self._failed = awake, slept_through, begins, ends, failed
        self._id = hook_id()
        self._watching = True
        self._swapped: list[tuple[nn.Module, str, StandIn]] = []
        self._kept: list[StandIn] = []

    @property
    def present(self) -> bool:
        """True between outermost calls."""
        return self._id in module_internals._global_forward_pre_hooks

    @property
    def inside(self) -> bool:
        """True while an outermost call is in progress, or was cut short by ctrl-C."""
        return bool(self._swapped)

    def on(self) -> None:
        """The next module call is an outermost one."""
        if self._watching:
            module_internals._global_forward_pre_hooks[self._id] = self._on_call

    def off(self) -> None:
        """No module call is seen."""
        module_internals._global_forward_pre_hooks.pop(self._id, None)

    def stop(self) -> None:
        """No module call will be seen any more, and no module has anything of ours."""
        self._watching = False
        self.off()
        self._restore()

    def _on_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        try:
            if not self._awake() or torch._C._get_tracing_state():
                return
            kwargs = dict(sys._getframe(1).f_locals.get("kwargs") or {})
            if self._slept_through(module, args, kwargs):
                self.off()
                return
            if not has_parameters(module):
                return
            self._restore()
            call = ForwardCall(
                module=module,
                args=args,
                kwargs=kwargs,
                grad_enabled=torch.is_grad_enabled(),
                training=module.training,
                rng=torch.get_rng_state(),
                source=user_line(3),
                autocast=_autocast_now(),
            )
            self._stand_in(module, call)
            self.off()
            self._begins(call)
        except Exception as problem:
            self._failed("forward_begin", problem)

    def _on_return(self, call: ForwardCall, module: nn.Module, args: Any, output: Any) -> None:
        try:
            self._restore()
            if output is not None:
                self._ends(call, output)
        except Exception as problem:
            self._failed("forward_end", problem)
        finally:
            self.on()

    def _stand_in(self, module: nn.Module, call: ForwardCall) -> None:
        originals = [module.__dict__[name] for name in _DICTIONARIES]
        entries = (functools.partial(self._on_return, call), True)
        for name, original, entry in zip(_DICTIONARIES, originals, entries):
            stand_in = StandIn(original, self._id, entry)
            self._swapped.append((module, name, stand_in))
            module.__dict__[name] = stand_in

    def _restore(self) -> None:
        """The modules have their own dictionaries again; a call that ctrl-C cut short may have left ours."""
        while self._swapped:
            module, name, stand_in = self._swapped.pop()
            holder = module.__dict__.get(name)
            if holder is stand_in:
                module.__dict__[name] = stand_in.original
            while isinstance(holder, StandIn):  # a second watch put its own on top
                if holder.original is stand_in:
                    holder.original = stand_in.original
                holder = holder.original
            if stand_in.written:  # the handle of a hook registered during the call refers to it weakly
                self._kept.append(stand_in)


def _autocast_now() -> tuple[str, torch.dtype] | None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None
