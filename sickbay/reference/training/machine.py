"""Settings of the process around a run, put back at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def processor(threads: int | None, flush_denormal: bool) -> Iterator[None]:
    """torch computes with `threads` threads (None = as it was) and takes denormal numbers for 0 if `flush_denormal`."""
    before = torch.get_num_threads()
    # First: threads that torch starts later take this setting from the one that starts them.
    torch.set_flush_denormal(flush_denormal)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def demand_compiler(device: str) -> None:
    """Raises ValueError where torch.compile has no C++ compiler to work with."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if torch.device(device).type == "cpu" and not any(shutil.which(name) for name in names):
        raise ValueError(f"compile is True; torch.compile needs a C++ compiler ({' or '.join(names)}): install one, or leave compile out")
