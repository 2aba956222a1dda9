"""The `sickbay` command: finds the subcommand's file, loads that one alone and hands over."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

import sickbay
from sickbay.core.errors import SickbayError, UsageError

# name -> module; a command whose file is not there is not offered.
COMMANDS = {
    name: f"sickbay.cli.{name}"
    for name in ("run", "checkup", "diagnose", "report", "train", "generate", "demo", "explain", "list", "plan", "vocab")
}
USAGE_EXIT = 2
INTRODUCTION = (
    "Runs a PyTorch training script unchanged, watches it, and names what is wrong with the evidence, the source line and the cure."
)


class Command(Protocol):
    """What a file in this folder offers. `split`, if there, divides the words into the command's own and those it must not touch."""

    NAME: str
    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def main(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a UsageError: one line, with the way out."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word = unknown.group(1)
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.6) if word.startswith("-") else []
            kind = "option" if word.startswith("-") else "argument"
            message = f"unknown {kind} {word}" + (f": did you mean {near[0]}?" if near else "")
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command that `argv` (default: this process's) names. Errors are one line on stderr and 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SickbayError as problem:
        name = f" {words[0]}" if words and words[0] in COMMANDS else ""
        _say(f"sickbay{name}: {problem}")
        return USAGE_EXIT
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain about that once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        import signal

        from sickbay.supervisor import die_by

        die_by(signal.SIGINT)
        return 128 + signal.SIGINT


def commands() -> dict[str, str]:
    """The commands whose files are there: name -> module."""
    return {name: module for name, module in COMMANDS.items() if _file(name).is_file()}


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else USAGE_EXIT
    if words[0] in ("-V", "--version"):
        print(f"sickbay {sickbay.__version__}")
        return 0
    name, rest = words[0], words[1:]
    there = commands()
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
        script = f"to run a script: `sickbay run {name}`" if name.endswith(".py") else "`sickbay --help` shows the commands"
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name!r}: " + (f"did you mean {near[0]}?" if near and not name.endswith(".py") else script))
    command = cast(Command, importlib.import_module(there[name]))
    parser = Parser(
        prog=f"sickbay {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    split = getattr(command, "split", None)
    own, untouched = split(parser, rest) if split else (rest, None)
    args = parser.parse_args(own)
    if split:
        args.untouched = untouched
    return command.main(args)


def _help() -> str:
    lines = [f"usage: sickbay COMMAND ...\n\n{INTRODUCTION}\n\ncommands:"]
    lines += [f"  {name:<10} {_summary(name)}" for name in commands()]
    lines += ["", "`sickbay COMMAND --help` says more about one; `sickbay --version` names the version."]
    return "\n".join(lines)


def _summary(name: str) -> str:
    """The first sentence of the command's docstring, read without loading the command."""
    with _file(name).open(encoding="utf-8") as source:
        line = source.readline().strip().strip('"')
    return line[:1].upper() + line[1:]


def _file(name: str) -> Path:
    return Path(__file__).with_name(f"{COMMANDS[name].rpartition('.')[2]}.py")


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)
