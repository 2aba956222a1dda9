"""Trains in many styles and prints, as JSON, the hashes of everything that each training leaves behind.

    python noninterference_trainings.py [--watch FOLDER [--sleepy]] [NAME...]

It knows of sickbay only what `--watch` asks for: `with sickbay.watch()` around each training; `--sleepy`: which sleeps through
steps as early as it can.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import noninterference_habits as habits
import torch
from noninterference_models import BATCH, MODELS, STEPS, TIME, VOCAB, ByHand, batches, digest, loss_of, random_states, seed
from torch import Tensor, nn


def outcome(losses: list[Any], modules: list[nn.Module], optimizers: list[Any], *more: Any) -> dict[str, str]:
    """What a training left: each part hashed by itself, so that a difference says where it is."""
    return {
        "losses": digest(losses),
        "weights": digest([module.state_dict() for module in modules]),
        "gradients": digest([parameter.grad for module in modules for parameter in module.parameters()]),
        "optimizer": digest([optimizer.state_dict() for optimizer in optimizers]),
        "random": random_states(),
        "more": digest(list(more)),
    }


def plain(model: nn.Module, autocast: bool = False, accumulate: int = 1, call: nn.Module | None = None) -> dict[str, str]:
    """The usual loop: AdamW, a schedule, clipping, an evaluation in the middle."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for ids, targets in batches(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model if call is None else call, ids, targets) / accumulate
            loss.backward()
            losses.append(loss.item())
        losses.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        if step % 3 == 2:
            model.eval()
            with torch.no_grad():
                losses.extend(loss_of(model if call is None else call, *batch).item() for batch in batches(2))
            model.train()
    return outcome(losses, [model], [optimizer])


def compiled(build: Callable[..., nn.Module], backend: str) -> dict[str, str]:
    torch._dynamo.reset()
    model = build()
    return plain(model, call=torch.compile(model, backend=backend))


def compiled_step() -> dict[str, str]:
    """The whole step is one compiled function, and the optimizer's step another."""
    torch._dynamo.reset()
    model = ByHand()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    forward = torch.compile(loss_of, backend="eager")
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    losses = []
    for ids, targets in batches(STEPS):
        optimizer.zero_grad()
        loss = forward(model, ids, targets)
        loss.backward()
        step()
        losses.append(loss.item())
    return outcome(losses, [model], [optimizer])


def data_parallel() -> dict[str, str]:
    """Two processes (RANK, INIT_FILE in the environment), dropout, accumulation under no_sync."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="file://" + os.environ["INIT_FILE"], rank=int(os.environ["RANK"]), world_size=2)
    seed(int(os.environ["RANK"]) + 1)
    model = ByHand(dropout=0.1)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for index, (ids, targets) in enumerate(batches(2)):
            with parallel.no_sync() if index == 0 else contextlib.nullcontext():
                loss = loss_of(parallel, ids, targets) / 2
                loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
    found = outcome(losses, [model], [optimizer])
    dist.destroy_process_group()
    return found


def scaled() -> dict[str, str]:
    """float16 autocast with a GradScaler that has to skip a step."""
    model = ByHand(dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    losses = []
    for step, (ids, targets) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, ids, targets)
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return outcome(losses, [model], [optimizer], scaler.state_dict())


def closures() -> dict[str, str]:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
    x, losses = torch.randn(32, 5), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(4):
        optimizer.step(closure)
    return outcome(losses, [model], [optimizer])


def adversaries() -> dict[str, str]:
    """Two models, two optimizers, a gradient penalty by torch.autograd.grad with a graph of its own."""
    maker, judge = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2, betas=(0.5, 0.9)) for module in (maker, judge)]
    criterion, losses = nn.BCEWithLogitsLoss(), []
    for _ in range(STEPS):
        real, fake = torch.randn(8, 3), maker(torch.randn(8, 4))
        optimizers[1].zero_grad()
        between = real.clone().requires_grad_()
        (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        loss = criterion(judge(real), torch.ones(8, 1)) + criterion(judge(fake.detach()), torch.zeros(8, 1)) + slope.pow(2).mean()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        other = criterion(judge(fake), torch.ones(8, 1))
        other.backward()
        optimizers[0].step()
        losses += [loss.item(), other.item()]
    return outcome(losses, [maker, judge], optimizers)


def functional() -> dict[str, str]:
    model = MODELS["reference"]()
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (values, buffers), (ids,))
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))

    losses = []
    for ids, targets in batches(STEPS):
        gradients, value = torch.func.grad_and_value(loss)(parameters, ids, targets)
        parameters = {name: parameters[name] - 0.1 * gradients[name] for name in parameters}
        losses.append(value.item())
    return outcome(losses, [model], [], parameters)


TRAININGS: dict[str, Callable[[], dict[str, str]]] = {}
for (_name, _build), _variant in itertools.product(
    MODELS.items(), ("fp32", "bf16", "dropout", "accumulation", "reentrant", "checkpoint", "compile")
):
    TRAININGS[f"{_name}/{_variant}"] = {
        "fp32": lambda build=_build: plain(build()),
        "bf16": lambda build=_build: plain(build(dropout=0.1), autocast=True),
        "dropout": lambda build=_build: plain(build(dropout=0.3)),
        "accumulation": lambda build=_build: plain(build(dropout=0.1), accumulate=3),
        "reentrant": lambda build=_build: plain(build(dropout=0.2, checkpointed="reentrant")),
        "checkpoint": lambda build=_build: plain(build(dropout=0.2, checkpointed="plain")),
        "compile": lambda build=_build: compiled(build, "aot_eager" if build is MODELS["reference"] else "eager"),
    }[_variant]
TRAININGS |= {
    "compiled step": compiled_step,
    "float16 with a scaler": scaled,
    "LBFGS": closures,
    "two optimizers": adversaries,
    "torch.func": functional,
    **{name: functools.partial(habit, outcome) for name, habit in habits.HABITS.items()},
}
ALONE = {"data parallel": data_parallel}


def sleepy() -> list[Any]:
    """From now on plain steps are slept through from the third on; the naps taken."""
    from early_naps import sleep_after

    from sickbay.probes import nap

    sleep_after(2, setattr)
    taken: list[Any] = []
    forward = nap.Nap.forward

    def noted(self: Any, *args: Any) -> bool:
        taken.append(self)
        return forward(self, *args)

    nap.Nap.forward = noted  # type: ignore[method-assign]
    return taken


def main(arguments: list[str]) -> None:
    naps = sleepy() if "--sleepy" in arguments else []
    arguments = [word for word in arguments if word != "--sleepy"]
    folder = arguments.pop(1) if arguments[:1] == ["--watch"] else None
    names = arguments[1:] if folder else arguments
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
    found = {}
    for index, name in enumerate(names or TRAININGS):
        seed()
        if folder is None:
            found[name] = {**TRAININGS, **ALONE}[name]()
            continue
        import sickbay

        with sickbay.watch(out=f"{folder}/{index}") as doctor:
            found[name] = {**TRAININGS, **ALONE}[name]()
        found[name]["problems"] = doctor.chart().facts.get("problems", [])
        found[name]["steps"] = doctor.chart().facts["steps"]
        found[name]["slept"] = sum(nap.stage == "backward" for nap in naps)
        naps.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    assert (BATCH, TIME) == (6, 10)
    main(sys.argv[1:])
