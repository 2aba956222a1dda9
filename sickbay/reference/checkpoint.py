"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON, complete or absent.

<run>/step-000500/
  model.safetensors       weights, tied ones once
  optimizer.safetensors   "<parameter's number>.<name>"
  random.safetensors      torch's random states
  tokenizer.json
  state.json              step (which is the position in the data too), config, recipe, source of the data
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from sickbay.reference.config import Config
from sickbay.reference.data import CharTokenizer
from sickbay.reference.model import Transformer

FORMAT = 1
PREFIX = "step-"


@dataclass(frozen=True)
class State:
    """`step`: optimizer steps taken. `source`: sha256 of the text. `recipe`: the Recipe's fields."""

    step: int
    config: Config
    recipe: dict[str, Any]
    source: str
    tokenizer: CharTokenizer
    folder: Path


def save(
    run: Path,
    *,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    source: str,
    tokenizer: CharTokenizer,
) -> Path:
    """The checkpoint of `step` is in `run`, complete, and the older ones are gone; cut short, the older ones stay. Raises OSError."""
    target = run / f"{PREFIX}{step:06d}"
    partial = run / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    held = optimizer.state_dict()
    moments = {f"{number}.{name}": value for number, values in held["state"].items() for name, value in values.items()}
    save_model(model, str(partial / "model.safetensors"))
    save_file(moments, partial / "optimizer.safetensors")
    save_file(_random_states(), partial / "random.safetensors")
    tokenizer.save(partial / "tokenizer.json")
    state = {
        "format": FORMAT,
        "step": step,
        "config": dataclasses.asdict(model.config),
        "recipe": recipe,
        "source": source,
        "groups": held["param_groups"],
    }
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for older in _all(run):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def find(path: Path) -> Path:
    """The checkpoint `path` is, or the newest in the run's folder `path`. Raises FileNotFoundError."""
    if (path / "state.json").is_file():
        return path
    found = _all(path)
    if not found:
        raise FileNotFoundError(f"{path} is no checkpoint and holds none")
    return found[-1]


def read(path: Path) -> State:
    """What the checkpoint at or in `path` says of itself. Raises FileNotFoundError; ValueError if damaged or of another format."""
    folder = find(path)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}; this version reads format {FORMAT}")
        tokenizer = CharTokenizer.load(folder / "tokenizer.json")
        return State(state["step"], Config(**state["config"]), state["recipe"], state["source"], tokenizer, folder)
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{folder} is not a readable checkpoint: {problem}") from problem


def load_weights(state: State, device: str = "cpu") -> Transformer:
    """The model as it was saved, on `device`. Raises ValueError where the weights do not belong to the config."""
    model = Transformer(state.config)
    try:
        load_model(model, str(state.folder / "model.safetensors"))
    except Exception as problem:  # safetensors and torch raise half a dozen kinds for a damaged file
        raise ValueError(f"{state.folder / 'model.safetensors'} cannot be loaded: {problem}") from problem
    return model.to(device)


def restore(state: State, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer and torch's random states are as they were when `state` was saved."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(state.folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = value
    groups = json.loads((state.folder / "state.json").read_text(encoding="utf-8"))["groups"]
    for group in groups:
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    random = load_file(state.folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda.0" in random:
        torch.cuda.set_rng_state_all(
            [random[f"cuda.{number}"] for number in range(torch.cuda.device_count()) if f"cuda.{number}" in random]
        )


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda.{number}": value for number, value in enumerate(torch.cuda.get_rng_state_all())})
    return states


def _all(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        folder for folder in run.glob(f"{PREFIX}*") if (folder / "state.json").is_file() and folder.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(PREFIX)))


def _flush(file: Path) -> None:
    """The file's bytes have reached the disk, so that the rename cannot overtake them."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
