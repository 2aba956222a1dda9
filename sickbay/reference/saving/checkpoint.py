"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON, complete or absent.

<run>/step-000500/
  model.safetensors       weights, tied ones once
  average.safetensors     their average, where the recipe asks for one
  optimizer.safetensors   "<parameter's name>.<what is kept of it>"
  random.safetensors      random states of Python, NumPy and torch (with several processes: random-<rank>.safetensors)
  tokenizer.json
  state.json              step (which is the position in the data too), config, recipe, source of the data, checksums of all files

Dealt out over several processes, weights and moments are one file a process and an index (shards.py); any number can read them.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sickbay.reference.models import lora
from sickbay.reference.models.config import Config
from sickbay.reference.models.kinds import DECODER, KINDS, Model, kind_of
from sickbay.reference.models.model import Transformer
from sickbay.reference.processes.world import ALONE, World
from sickbay.reference.saving import durable, random_states, shards
from sickbay.reference.settings.recipe import listed
from sickbay.reference.text.tokenizer import Tokenizer
from sickbay.reference.text.tokenizer import load as load_tokenizer

FORMAT = 2
PREFIX = "step-"
KEEP = 2  # checkpoints of a run: should the newest turn out damaged, there is one before it
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # what torch.compile and activation checkpointing put into names
OF_THE_MACHINE = ("fused", "foreach", "capturable", "stack")  # settings of an optimizer that say how, not what

Json = Any


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself.

    `step`: optimizer steps taken. `source`: sha256 of the text. `recipe`: the Recipe's fields. `scaler`: of torch.amp.GradScaler.
    `progress`: what the loop itself remembers. `groups`: the optimizer's settings, group by group. `kind`: of model, a key of KINDS.
    """

    step: int
    config: Config
    recipe: dict[str, Any]
    source: str
    tokenizer: Tokenizer
    folder: Path
    scaler: dict[str, Any] | None = None
    progress: dict[str, Json] = dataclasses.field(default_factory=dict)
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kind: str = DECODER


def save(
    run: Path,
    *,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    recipe: Mapping[str, Any],
    source: str,
    tokenizer: Tokenizer,
    average: Mapping[str, Tensor] | None = None,
    scaler: Mapping[str, Any] | None = None,
    progress: Mapping[str, Json] | None = None,
    keep: int = KEEP,
    world: World = ALONE,
) -> Path:
    """The checkpoint of `step` is in `run`, complete, with the `keep` - 1 before it. Every process of `world` calls this.

    Raises OSError in every process where one of them could not write; the older checkpoints are then as they were.
    """
    target = run / f"{PREFIX}{step:06d}"
    partial = durable.partial_of(target)
    config, kind_of_model = model.config, kind_of(model)

    def order(name: str) -> list[int] | None:
        return world.row_order(name, config)

    def begin() -> None:
        durable.begin(target)

    def write() -> None:
        shards.write(partial, "model", named_weights(model), world, order)
        if average is not None:
            shards.write(partial, "average", average, world, order)
        shards.write(partial, "optimizer", _moments(model, optimizer), world, order)
        file = partial / _random_file(world.rank, world.size)
        durable.as_os_error(lambda: save_file(random_states.capture(), file), file)

    def publish() -> None:
        for kind in ("model", "average", "optimizer"):
            shards.write_index(partial, kind)
        tokenizer.save(partial / "tokenizer.json")
        state = {
            "format": FORMAT,
            "step": step,
            "kind": kind_of_model,
            "config": dataclasses.asdict(config),
            "recipe": dict(recipe),
            "source": source,
            "scaler": None if scaler is None else dict(scaler),
            "progress": dict(progress or {}),
            "groups": _settings(model, optimizer),
        }
        durable.publish(partial, target, state)

    try:
        _everywhere(begin, world, here=world.first)
        _everywhere(write, world)
        _everywhere(publish, world, here=world.first)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # gives its space back to a full disk
        raise
    if world.first:
        _forget(run, step, keep)
    return target


def find(path: Path) -> Path:
    """The checkpoint `path` is, or the newest in the run's folder `path`, damaged or not. Raises FileNotFoundError."""
    if _is_checkpoint(path):
        return path
    found = _all(path)
    if not found:
        raise FileNotFoundError(f"{path} is no checkpoint and holds none")
    return found[-1]


def read(path: Path, tell: Callable[[str], None] | None = None) -> State:
    """What the checkpoint `path`, or the newest undamaged one in the run's folder `path`, says of itself.

    `tell`: is given one line for each damaged checkpoint passed over, None = on stderr. Raises FileNotFoundError where there is none;
    ValueError where all are damaged or of another format.
    """
    newest = find(path)
    candidates = [path] if newest == path else list(reversed(_all(path)))
    problems: list[str] = []
    for folder in candidates:
        try:
            state = _read(folder)
        except ValueError as problem:
            problems.append(f"{folder} is not a readable checkpoint: {problem}")
            continue
        for text in problems:
            (tell or _to_stderr)(f"{text}; taking {folder.name}, the one before")
        return state
    raise ValueError("; ".join(problems))


def load_weights(state: State, device: str = "cpu", *, averaged: bool = False) -> Transformer:
    """The decoder as it was saved, whole, on `device`, adapters merged; `averaged`: with the average of its weights.

    Raises ValueError where the files do not belong to the config, or the model is no decoder.
    """
    if state.kind != DECODER:
        raise ValueError(
            f"the model in {state.folder} is of kind {state.kind}, which writes no text by itself; checkpoint.load_model reads it"
        )
    model = load_model(state, device, averaged=averaged)
    assert isinstance(model, Transformer)
    return model


def load_model(state: State, device: str = "cpu", *, averaged: bool = False) -> Model:
    """As `load_weights`, a model of any kind."""
    model: Model = KINDS[state.kind](state.config)
    rank = state.recipe.get("lora_rank")
    if rank is not None:
        lora.apply(model, rank, state.recipe["lora_alpha"], listed(state.recipe["lora_targets"]))
    restore_weights(state, model, averaged=averaged)
    if rank is not None:
        lora.merge(model)
        model.requires_grad_(True)
    return model.to(device)


def restore_weights(state: State, model: nn.Module, *, averaged: bool = False, world: World = ALONE) -> None:
    """`model`, already dealt out over `world`, has the saved weights. Raises ValueError where files and model do not belong together."""
    if isinstance(model, Model) and kind_of(model) != state.kind:
        raise ValueError(f"the model in {state.folder} is of kind {state.kind}; this one is of kind {kind_of(model)}")
    restore_tensors(state, "average" if averaged else "model", named_weights(model), world)


def restore_tensors(state: State, kind: str, into: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Each tensor of `into` has the values saved as `kind` under its name. Raises ValueError where names or shapes differ."""
    try:
        with shards.Stored(state.folder, kind) as stored, torch.no_grad():
            if set(stored.names()) != set(into):
                differ = sorted(set(stored.names()) ^ set(into))
                raise ValueError(f"{', '.join(differ[:3])} in only one of file and model")
            for name, tensor in into.items():
                stored.read_into(name, tensor, world, world.row_order(name, state.config))
    except Exception as problem:  # safetensors raises half a dozen kinds for a damaged file
        raise ValueError(f"{state.folder / kind}.safetensors cannot be loaded: {problem}") from problem


def has_average(state: State) -> bool:
    """Whether an average of the weights was saved too."""
    return any((state.folder / name).is_file() for name in ("average.safetensors", "average.index.json"))


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE) -> None:
    """The optimizer of `model`'s weights, and this process's random states, are as they were when `state` was saved.

    A process that was not there draws its random states anew from the step and its number.
    """
    names = _parameter_names(model)
    held: dict[int, dict[str, Tensor]] = {}
    number = 0
    with shards.Stored(state.folder, "optimizer") as stored:
        saved: dict[str, list[str]] = {}
        for name in stored.names():
            owner, _, quantity = name.rpartition(".")
            saved.setdefault(owner, []).append(quantity)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner = names[id(parameter)]
                for quantity in saved.pop(owner, []):
                    full = f"{owner}.{quantity}"
                    if stored.shape(full) == tuple(parameter.shape):
                        value = torch.empty_like(parameter, requires_grad=False)
                        stored.read_into(full, value, world, world.row_order(full, state.config))
                    else:
                        value = stored.whole(full)
                    held.setdefault(number, {})[quantity] = value
                number += 1
        if saved:
            raise ValueError(f"{state.folder} holds an optimizer's state of {sorted(saved)[0]}, which this optimizer does not train")
    groups = optimizer.state_dict()["param_groups"]
    for group, trained in zip(groups, optimizer.param_groups):
        # Matched by name: on another number of processes the same weights may stand in more groups or fewer.
        settings = next((saved for saved in state.groups if names[id(trained["params"][0])] in saved["parameters"]), {})
        for key, value in settings.items():
            if key in group and key not in OF_THE_MACHINE:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    optimizer.load_state_dict({"state": held, "param_groups": groups})
    random = state.folder / _random_file(world.rank, world.size)
    if random.is_file():
        random_states.restore(load_file(random))
    else:
        random_states.draw_anew(state.step, world.shard)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and persistent buffers by name, tied ones once, the same names however it is compiled or wrapped."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[_plain(name)] = tensor
    return named


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model)
    return {
        f"{names[id(parameter)]}.{quantity}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, kept in optimizer.state.items()
        for quantity, value in kept.items()
        if value is not None
    }


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups, their parameters by name, as JSON can say it."""
    names = _parameter_names(model)
    return [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items() if key not in ("params", "param_names")}
        | {"parameters": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): _plain(name) for name, parameter in model.named_parameters()}


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _everywhere(do: Callable[[], None], world: World, here: bool = True) -> None:
    """`do` has been done in every process where `here`, and all are here; where one failed, all raise OSError."""
    failure: OSError | None = None
    if here:
        try:
            do()
        except OSError as problem:
            failure = problem
    number = world.most(0 if failure is None else failure.errno or errno.EIO)
    if failure is not None:
        raise failure
    if number:
        raise OSError(number, f"{os.strerror(number)} (in another process)")


def _forget(run: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` the newest `keep` stay; of later ones, which a run resumed from before them makes void, none."""
    numbered = {folder: int(folder.name.removeprefix(PREFIX)) for folder in _all(run)}
    reached = [folder for folder, number in numbered.items() if number <= step]
    for folder in [*reached[:-keep], *(folder for folder, number in numbered.items() if number > step)]:
        shutil.rmtree(folder, ignore_errors=True)
    # A run killed in a save may have gone on with other steps to save at. A run's folder is its own.
    for folder in run.glob(f"{durable.PARTIAL}{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> State:
    """Raises ValueError."""
    state = durable.read(folder)
    try:
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}; this version reads format {FORMAT}")
        return State(
            step=state["step"],
            config=Config(**state["config"]),
            recipe=state["recipe"],
            source=state["source"],
            tokenizer=load_tokenizer(folder / "tokenizer.json"),
            folder=folder,
            scaler=state["scaler"],
            progress=state["progress"],
            groups=state["groups"],
            kind=state.get("kind", DECODER),
        )
    except (KeyError, TypeError, OSError) as problem:
        raise ValueError(f"{type(problem).__name__}: {problem}") from problem


def _random_file(rank: int, size: int) -> str:
    return "random.safetensors" if size == 1 else f"random-{rank + 1:05d}.safetensors"


def _is_checkpoint(path: Path) -> bool:
    return (path / durable.STATE).is_file() or (path.is_dir() and _has_number(path))


def _has_number(path: Path) -> bool:
    return path.name.startswith(PREFIX) and path.name.removeprefix(PREFIX).isdigit()


def _all(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, damaged ones too."""
    found = [folder for folder in run.glob(f"{PREFIX}*") if folder.is_dir() and _has_number(folder)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(PREFIX)))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
