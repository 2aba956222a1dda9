"""Calls a command of the program as its command line does, in this process."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType


def call(command: ModuleType, *words: str | Path) -> int:
    """The exit code of `command`, one of sickbay.cli, given `words`."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return int(command.main(parser.parse_args([str(word) for word in words])))
