"""The random states of this process as tensors: Python's, NumPy's and torch's, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MERSENNE_WORDS = 624  # of its state (Matsumoto and Nishimura 1998); Python appends the position


def capture() -> dict[str, Tensor]:
    """The states of `random`, `numpy.random` and torch on the CPU, and on the GPU in use if there is one."""
    _, words, gauss = random.getstate()
    kind, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state()
    assert kind == "MT19937" and len(words) == MERSENNE_WORDS + 1
    states = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(numpy_words, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor(numpy_gauss, dtype=torch.float64),
        "cpu": torch.get_rng_state(),
    }
    if gauss is not None:
        states["python.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_initialized():  # asking a GPU that this process does not use would open it
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """The random states are those that `capture` gave."""
    words: tuple[Any, ...] = tuple(states["python"].tolist())
    random.setstate((3, words, states["python.gauss"].item() if "python.gauss" in states else None))
    position, has_gauss = states["numpy.position"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), position, has_gauss, states["numpy.gauss"].item()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed(number: int) -> None:
    """The random states of Python, NumPy and torch depend on `number` alone."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def draw_anew(*key: int) -> None:
    """The random states depend on `key` alone: for a process that was not there when the run was saved."""
    seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
