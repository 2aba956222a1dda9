"""What scripts do beside training: saving and copying in the middle, hooks, modes, workers, errors that they catch, warnings.

Each habit takes `outcome` (noninterference_trainings.py) and gives the hashes of what it saw and left.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from noninterference_models import STEPS, VOCAB, ByHand, batches, digest, loss_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

Outcome = Callable[..., dict[str, str]]
_BEFORE = torch.nn.functional.cross_entropy  # imported before any watch begins


def _saved(*things: Any) -> list[bytes]:
    """What torch.save and pickle write; nothing in it may tell of sickbay."""
    written = []
    for thing in things:
        saved, pickled = io.BytesIO(), io.BytesIO()
        torch.save(thing, saved)
        _Pickler(pickled).dump(thing)
        written += [saved.getvalue(), pickled.getvalue()]
    assert not any(b"sickbay" in content or b"functools" in content for content in written)
    return written


class _Pickler(pickle.Pickler):
    """Writes hashes for tensors, whose own pickles hold addresses."""

    def persistent_id(self, thing: Any) -> str | None:
        return digest(thing) if type(thing) in (Tensor, nn.Parameter) else None


def saving(outcome: Outcome) -> dict[str, str]:
    """The model is saved and copied before, inside and after the forward, after the backward, after errors; the copy trains on."""
    model: Any = ByHand()
    model.criterion, model.now = _BEFORE, torch.nn.functional.mse_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kept: list[Any] = []
    inside = model.blocks[0].register_forward_hook(_Saver(model, kept))
    for step, (ids, targets) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        logits = model(ids)
        kept += _saved(model, optimizer) if step % 2 else []
        loss = model.criterion(logits.reshape(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        kept += [copy.deepcopy(model).state_dict(), inside.id]
        optimizer.step()
        kept += _saved(model, optimizer)
        if step == 2:
            for failure in (RuntimeError, KeyboardInterrupt):
                stop = model.head.register_forward_pre_hook(_Raiser(failure))
                try:
                    model(ids)
                except failure:
                    kept += _saved(model, copy.deepcopy(model), copy.copy(model))
                stop.remove()
                kept.append(stop.id)
        if step == 4:
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    inside.remove()
    return outcome([], [model], [optimizer], kept, [str(vars(module)) for module in (model.blocks[0].drop,)])


class _Saver:
    def __init__(self, model: nn.Module, kept: list[Any]) -> None:
        self.model, self.kept = model, kept

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept += [*_saved(self.model), len(self.model._forward_hooks), list(self.model._forward_hooks)]

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


class _Raiser:
    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any) -> None:
        raise self.kind("in the forward")


def hooks(outcome: Outcome) -> dict[str, str]:
    """Every kind of hook a user can register, some of which remove themselves or register others in the middle of a call."""
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[Any] = []
    handles: list[Any] = []

    def once(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        first.remove()
        return output * 0.5

    def during(module: nn.Module, args: Any) -> None:
        if len(handles) < 8:
            handles.append(model.register_forward_hook(lambda m, a, o: seen.append(("later", o.sum().item()))))

    first = model.register_forward_hook(once)
    model.blocks[1].register_forward_pre_hook(during)
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    model.register_forward_hook(lambda m, args, output: seen.append(output.sum().item()), always_call=True)
    model.register_full_backward_hook(lambda m, into, out: seen.append([g.sum().item() for g in out]))
    model.register_full_backward_pre_hook(lambda m, out: (out[0] * 0.9,))
    model.head.weight.register_hook(lambda gradient: gradient * 0.7)
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.sum().item()))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((len(args), sorted(kwargs))))
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, args, output: seen.append(type(m).__name__))
    losses = []
    for step, (ids, targets) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        logits = model(ids=ids) if step % 2 else model(ids)
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 4:
            for handle in handles:
                handle.remove()
    everywhere.remove()
    seen.append([handle.id - first.id for handle in (*handles, everywhere)])
    return outcome(losses, [model], [optimizer], seen)


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def modes(outcome: Outcome) -> dict[str, str]:
    """Function modes, dispatch modes and default devices around parts of the loop see the script's own calls only."""
    model = ByHand(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls, operations, losses = _Calls(), Operations(), []
    for step, (ids, targets) in enumerate(batches(STEPS)):
        if step % 2:
            with calls, operations:
                optimizer.zero_grad()
                loss = loss_of(model, ids, targets)
                loss.backward()
                optimizer.step()
        else:
            optimizer.zero_grad()
            with torch.device("cpu"):
                logits = model(ids)
            with calls:
                loss = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
            with torch.device("cpu"), operations:
                loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return outcome(losses, [model], [optimizer], calls.names, operations.names, torch._C._len_torch_function_stack())


class Squares(Dataset[Tensor]):
    """A data set whose workers call a module of their own."""

    def __init__(self) -> None:
        self.layer = nn.Linear(3, 3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return self.layer(torch.rand(3) + index).detach()


def workers(outcome: Outcome) -> dict[str, str]:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        for batch in DataLoader(Squares(), batch_size=6, shuffle=True, num_workers=2):
            optimizer.zero_grad()
            loss = nn.functional.smooth_l1_loss(model(batch), batch.flip(0))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return outcome(losses, [model], [optimizer])


def evaluating(outcome: Outcome) -> dict[str, str]:
    """Evaluations with and without no_grad and under inference_mode, of a module that has a fast path of its own for them."""
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept: list[Any] = []
    for step in range(STEPS):
        x = torch.randn(4, 5, 16)
        model.train(step != 3)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        model.eval()
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                kept += [model(x).detach().clone(), nn.functional.mse_loss(model(x), x).item()]
    return outcome([], [model], [optimizer], kept)


def errors(outcome: Outcome) -> dict[str, str]:
    """Errors in forward, loss, backward, clipping, optimizer and step that the script catches before it trains on."""
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[Any] = []

    def attempt(action: Callable[[], Any], *kinds: type[BaseException]) -> None:
        try:
            action()
        except kinds as problem:
            losses.append((type(problem).__name__, str(problem)))

    for ids, targets in batches(STEPS):
        attempt(lambda ids=ids: model(ids + VOCAB), IndexError)
        attempt(lambda ids=ids: model(ids.float()), RuntimeError)
        attempt(lambda: model(), TypeError)
        attempt(lambda ids=ids: loss_of(model, ids, ids[:, 1:]), ValueError)
        attempt(lambda: torch.zeros(3, requires_grad=True).backward(), RuntimeError)
        attempt(lambda: torch.autograd.backward(5), TypeError)
        attempt(lambda: torch.autograd.grad(torch.ones(()), [torch.ones(3)]), RuntimeError)
        attempt(lambda: nn.utils.clip_grad_norm_(model.parameters()), TypeError)
        attempt(lambda: nn.utils.clip_grad_norm_(3, 1.0), TypeError)
        attempt(lambda: torch.optim.SGD([], lr=0.1), ValueError)
        attempt(lambda: torch.optim.SGD(model.parameters(), lr=-1), ValueError)
        attempt(lambda: optimizer.step(lambda: 1 / 0), ZeroDivisionError)
        attempt(lambda: nn.functional.cross_entropy(torch.zeros(2, 3)), TypeError)
        optimizer.zero_grad()
        loss = loss_of(model, ids, targets)
        torch.autograd.backward(iter([loss]))
        losses.append(float(nn.utils.clip_grad_norm_((p for p in model.parameters()), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return outcome(losses, [model], [optimizer])


def warned(outcome: Outcome) -> dict[str, str]:
    """A warning is shown as often, and for the same line, as without sickbay."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    shown: list[Any] = []
    show = warnings.showwarning
    warnings.showwarning = lambda message, category, file, line, *_: shown.append((str(message), category.__name__, file, line))
    warnings.simplefilter("default", UserWarning)
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(8, 4)
            loss = nn.functional.mse_loss(model(x), x[:, 0]) + nn.MSELoss()(model(x), x[:, 0])
            loss.backward()
            nn.utils.clip_grad_norm_((p for p in []), 1.0)
            warnings.warn("once for this line", UserWarning, stacklevel=1)
            optimizer.step()
    finally:
        warnings.showwarning = show
    assert len(shown) >= 4
    return outcome([], [model], [optimizer], [shown, [str(entry) for entry in warnings.filters]])


def nested(outcome: Outcome) -> dict[str, str]:
    """Backward passes inside a forward, recurrent state handed on, a module that is both outermost and inner."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.energy = nn.GRUCell(4, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.cell(x, state)
            held = state.detach().requires_grad_()
            with torch.enable_grad():
                self.energy(held).sum().backward(inputs=[held])
            return state, self.energy(state - 0.1 * held.grad)

    model = Penalised()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    state, losses = torch.zeros(5, 6), []
    for step in range(3 * STEPS):
        state, energy = model(torch.randn(5, 4), state)
        losses.append(model.energy(state).sum().item())
        if step % 3 == 2:
            optimizer.zero_grad()
            loss = energy.pow(2).mean()
            loss.backward()
            optimizer.step()
            state = state.detach()
            losses.append(loss.item())
    return outcome(losses, [model], [optimizer], digest(state))


def recomputing(outcome: Outcome) -> dict[str, str]:
    """A loss written by hand upon tensors that are computed again, or fetched by the script's own hooks, when someone looks at them."""
    body, fetched, losses = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), [], []
    optimizer = torch.optim.Adam(body.parameters(), lr=1e-2)

    def head(x: Tensor) -> Tensor:
        y = body(x)
        return y / y.pow(2).mean(-1, keepdim=True).add(1e-3).sqrt()

    def fetch(kept: Tensor) -> Tensor:
        fetched.append(tuple(kept.shape))
        return kept

    for step in range(STEPS):
        x = torch.randn(6, 4)
        optimizer.zero_grad()
        if step % 2:
            loss = (checkpoint(head, x, use_reentrant=False).softmax(-1) + 1e-3).log().mean().neg()
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), fetch):
                loss = (head(x) - x[:, :1]).pow(2).mean().sqrt()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return outcome(losses, [body], [optimizer], fetched)


HABITS: dict[str, Callable[[Outcome], dict[str, str]]] = {
    "saving and copying": saving,
    "hooks": hooks,
    "modes": modes,
    "workers": workers,
    "evaluating": evaluating,
    "errors": errors,
    "warnings": warned,
    "nested": nested,
    "recomputing": recomputing,
}
