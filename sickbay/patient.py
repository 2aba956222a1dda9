"""The live handles of a training run: models, optimizers, the last forward and its loss. Filled by probes, read by exams."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sickbay.core.ngrams import NGrams

OWN_FOLDER = __file__.rsplit("/", 1)[0] + "/"
_LIBRARY_MARKS = ("/site-packages/", "/dist-packages/", "/lib/python3", "<frozen ", "<string>", "/importlib/")
GRAPH_MARK = "sickbay"  # the key, in a graph node's metadata, of the object that tells whether the graph is alive
_MAX_CALLS = 32  # forwards kept until a backward uses them
_MAX_LOSSES = 32
_MAX_HELD = 2  # losses whose logits are kept until then
_MAX_LOGITS = 16 << 20  # bytes of one loss's logits


@dataclass
class ForwardCall:
    """One call of an outermost module: enough to run it again exactly.

    `args`, `kwargs`: references, not copies. `rng`: torch's CPU generator state before the call. `spent`: its backward has run.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_enabled: bool
    training: bool
    rng: Tensor
    source: str
    autocast: tuple[str, torch.dtype] | None = None
    finished: bool = False
    spent: bool = False
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)


CLASSIFYING = ("cross_entropy", "nll_loss")  # losses over classes: their targets are numbers of classes, or shares of them


@dataclass
class LossCall:
    """One call of a loss function: `logits` as given, `targets` as given; `name` is the functional's name.

    Nothing here holds on to a graph; `nodes`: sequence numbers of the autograd nodes that made logits and value, -1 = none.
    Where `logits` are large, or `spent` (their backward has run), they are a meta tensor: shape and dtype only.
    `evaluating`: the module called last was in evaluation mode.
    """

    name: str
    logits: Tensor
    targets: Tensor
    ignore_index: int
    reduction: str
    value: Tensor
    source: str
    grad_enabled: bool
    smoothing: float = 0.0
    spent: bool = False
    evaluating: bool = False
    nodes: tuple[int, int] = (-1, -1)

    def __post_init__(self) -> None:
        first, last = self.logits.grad_fn, self.value.grad_fn
        self.nodes = (first._sequence_nr() if first is not None else -1, last._sequence_nr() if last is not None else -1)
        self.logits, self.value = self.logits.detach(), self.value.detach()
        if self.logits.nbytes > _MAX_LOGITS:
            self.let_go()

    @property
    def classifies(self) -> bool:
        """True for a loss over classes."""
        return self.name in CLASSIFYING

    @property
    def by_class(self) -> bool:
        """True for a loss over classes whose targets are their numbers."""
        return self.classifies and not self.targets.is_floating_point()

    def let_go(self) -> None:
        """The logits' memory is held no more: only shape and dtype are known."""
        self.logits = torch.empty_like(self.logits, device="meta")


class Patient:
    """What is known about the run being watched; everything is held weakly or only until the next step.

    `given`: the model and optimizers handed to `watch`, if any. `muted`: True while an exam runs, so that probes stay silent.
    """

    def __init__(self) -> None:
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.calls: list[ForwardCall] = []
        self.losses: list[LossCall] = []
        self.muted = False
        self.without_gradient = False  # the newest forward ran under no_grad
        self.distributed = False
        self.scale = 1.0
        self.norm_at_step = 0.0
        self.exam_seconds = 0.0
        self.compute_share: Callable[[], float] = lambda: 1.0  # of a step's time, in forward and backward
        self.functional: Callable[[], Any] | None = None
        self.corpus: NGrams | None = None  # counts of the tokens trained on, once next tokens were seen
        self.dead_units: dict[str, set[int]] = {}

    @property
    def root(self) -> nn.Module | None:
        """The outermost module of the newest training forward; otherwise the largest one seen."""
        for call in reversed(self.calls):
            if call.grad_enabled:
                return call.module
        return max(self.roots, key=lambda module: sum(p.numel() for p in module.parameters()), default=None)

    def training_calls(self) -> list[ForwardCall]:
        """The finished forwards with gradient since the last backward."""
        return [call for call in self.calls if call.grad_enabled and call.finished]

    def admit(self, call: ForwardCall) -> None:
        """`call` is the newest. What an evaluation leaves behind, with or without no_grad, keeps no batch and no graph alive."""
        self.roots.add(call.module)
        self.without_gradient = not call.grad_enabled
        if not call.grad_enabled:
            return
        self.losses = [loss for loss in self.losses if loss.spent or not loss.evaluating]
        if not call.training:
            self.calls = [known for known in self.calls if known.training or known.module is not call.module]
        self.calls.append(call)
        del self.calls[:-_MAX_CALLS]

    def add_loss(self, call: LossCall) -> None:
        """`call` is the newest; of those that no backward has used yet only the newest few hold their logits."""
        call.evaluating = bool(self.calls) and not self.calls[-1].training
        self.losses.append(call)
        del self.losses[:-_MAX_LOSSES]
        waiting = [known for known in self.losses if known.grad_enabled and not known.spent]
        for known in waiting[:-_MAX_HELD]:
            known.let_go()

    def spend(self) -> None:
        """After a backward: keep the newest forward and loss for replay, and let go of everything that holds activations."""
        self.calls = [call for call in self.calls if call.grad_enabled][-1:]
        self.losses = [call for call in self.losses if call.grad_enabled][-1:]
        for call in self.calls:
            call.spent = True
        for loss in self.losses:
            if not loss.spent:
                loss.let_go()
                loss.spent = True

    def forget_step(self) -> None:
        """Drop every reference to this step's tensors."""
        self.calls.clear()
        self.losses.clear()


def has_parameters(module: nn.Module) -> bool:
    """True if `module` or a part of it has a parameter."""
    # Not next(module.parameters()): it is asked at every step, and the walk through generators takes five times as long.
    if any(parameter is not None for parameter in module._parameters.values()):
        return True
    return any(has_parameters(part) for part in module._modules.values() if part is not None)


def bare(module: nn.Module) -> nn.Module:
    """`module` without DistributedDataParallel or torch.compile around it."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer that steps, where `optimizer` is a wrapper around it (accelerate's)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def user_line(skip: int = 1) -> str:
    """`file:line` of the innermost frame of the user's own code, `skip` frames out or further; "" if there is none."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and skip:  # not sys._getframe(skip): it raises where the stack is not as deep
        frame, skip = frame.f_back, skip - 1
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_user_file(filename):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_user_files: dict[str, bool] = {}


def is_user_file(filename: str) -> bool:
    """True unless `filename` belongs to Python, an installed package or sickbay's own rooms.

    The reference counts as a user's, and so do the conditions: the only part of theirs that runs beneath a hook is a planted fault.
    """
    known = _user_files.get(filename)
    if known is None:
        own = filename.startswith(OWN_FOLDER) and not filename.startswith((OWN_FOLDER + "reference/", OWN_FOLDER + "conditions/"))
        known = not own and not any(mark in filename for mark in _LIBRARY_MARKS)
        _user_files[filename] = known
    return known


def stochastic_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The sub-modules whose train/eval mode changes the result: batch-norm, and dropout with p > 0 in whatever form."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if (isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0)
        or isinstance(part, nn.modules.batchnorm._BatchNorm)
        or (isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) and part.dropout > 0)
        or _drops_by_function(part)
    ]


def _drops_by_function(module: nn.Module) -> bool:
    """True for a module whose own forward calls a dropout function under `self.training`, with a probability above 0.

    A library's has to hold the probability itself: a constant of its code may stand for anything.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "training" not in code.co_names:
        return False
    keywords = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant if isinstance(name, str)]
    if not any("dropout" in name for name in (*code.co_names, *keywords)):
        return False
    own = [value for name, value in vars(module).items() if isinstance(value, float) and ("drop" in name.lower() or name == "p")]
    constants = [constant for constant in code.co_consts if isinstance(constant, float)] if is_user_file(code.co_filename) else []
    return any(0 < value < 1 for value in own or constants)


def tensors_in(value: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside nested tuples, lists, dicts and dataclass-like outputs, with a path each."""
    if isinstance(value, Tensor):
        yield "", value
    elif depth < 4:
        items: Any = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif hasattr(value, "__dataclass_fields__"):
            items = [(name, getattr(value, name, None)) for name in value.__dataclass_fields__]
        for key, item in items:
            for path, tensor in tensors_in(item, depth + 1):
                yield (f"{key}.{path}" if path else str(key)), tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` made to each tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: mapped(item, change) for key, item in value.items()}
        return changed if type(value) is dict else _rebuilt(value, changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    return value


def _rebuilt(value: Any, changed: dict[Any, Any]) -> Any:
    """A mapping of the same class (transformers' BatchEncoding among them), a dict where that cannot be built."""
    with contextlib.suppress(Exception):
        return type(value)(changed)
    return changed


@contextlib.contextmanager
def autocast_of(call: ForwardCall) -> Iterator[None]:
    """Inside, autocast is as it was when `call` was made."""
    if call.autocast is None:
        yield
    else:
        device, dtype = call.autocast
        with torch.autocast(device, dtype=dtype):
            yield
