"""Examines a model before money is spent on it: the debugging checklist, each exam bounded in time.

TARGET is one of
    module:function, file.py:function   a function without arguments that returns (model, batches, loss) or (model, batches, loss,
                                        optimizer), as a tuple, a dict or an object with these names. `batches`: an iterable, of which at
                                        most 24 are taken; `loss`: a function of (outputs, targets) or (model, batch), or None where the
                                        model gives its own loss
    FOLDER or config.json               a transformers model, with --text FILE for its batches
    train.py [ARGS ...]                 a training script: it is started as by `sickbay run`, stopped after --max-steps steps, and judged
                                        by these; what needs the model in hand is left out

Prints a table of exams with their verdicts and the findings, root causes first.
Exit code: 0 if nothing was found, 1 if a critical or a warning was, 2 if there was nothing that could be examined.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sickbay.core.errors import SickbayError, UsageError

if TYPE_CHECKING:
    from sickbay.checklist.result import Checklist
    from sickbay.checklist.target import Target

NAME = "checkup"
FINDINGS_EXIT = 1
INTERRUPTED_EXIT = 130
MAX_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sickbay checkup`."""
    parser.usage = "sickbay checkup [options] TARGET [ARGS ...]"
    parser.add_argument("--only", metavar="EXAMS", action="append", default=[], help="only these exams, comma-separated")
    parser.add_argument("--skip", metavar="EXAMS", action="append", default=[], help="not these exams, comma-separated")
    parser.add_argument("--seconds", metavar="S", type=float, default=30.0, help="at most for one exam (30)")
    parser.add_argument("--text", metavar="FILE", type=Path, help="a UTF-8 text for the batches of a transformers model")
    parser.add_argument(
        "--max-steps", metavar="N", type=int, default=MAX_STEPS, help=f"steps after which a script is stopped ({MAX_STEPS})"
    )
    parser.add_argument("--json", action="store_true", help="the whole as JSON on stdout")


def split(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """`words` divided into sickbay's options and the rest: TARGET and, where it is a script, the script's own words."""
    with_value = {option for action in parser._actions if action.nargs != 0 for option in action.option_strings}
    place = 0
    while place < len(words) and words[place].startswith("-"):
        place += 2 if words[place] in with_value else 1
    target, after = words[place : place + 1], words[place + 1 :]
    if target and _is_script(target[0]):
        return words[:place], [*target, *after]
    return [*words[:place], *after], target


def main(args: argparse.Namespace) -> int:
    """0 if clean, 1 if something was found, 2 after a failure of sickbay's own. Raises UsageError where there is nothing to examine."""
    try:
        return _main(args)
    except SickbayError:
        raise
    except Exception as problem:
        if os.environ.get("SICKBAY_DEBUG", "") == "1":
            raise
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise SickbayError(f"a failure of sickbay's own: {text} (SICKBAY_DEBUG=1 shows where)") from problem


def _main(args: argparse.Namespace) -> int:
    if not args.untouched:
        raise UsageError("no target given: `sickbay checkup module:function`, `checkup FOLDER --text FILE` or `checkup train.py`")
    from sickbay.checklist.conduct import asked

    only, skip = _names(args.only), _names(args.skip)
    asked(only, skip)
    text = args.untouched[0]
    with _talk_on_stderr() as stdout:
        if _is_script(text):
            from sickbay.cli.checkup_script import examine_script

            result = examine_script(args.untouched, args.max_steps, only, skip)
        else:
            result = _examine(text, args, only, skip)
    if args.json:
        import json

        stdout(json.dumps(result.as_data(), indent=2, allow_nan=False) + "\n")
    else:
        from sickbay.checklist.show import show

        show(result)
    if result.verdict == "sick":
        return FINDINGS_EXIT
    if result.stopped:
        return INTERRUPTED_EXIT
    return 2 if result.verdict == "unexamined" else 0


def _examine(text: str, args: argparse.Namespace, only: list[str], skip: list[str]) -> Checklist:
    import torch

    from sickbay.checklist.conduct import conduct

    threads = torch.get_num_threads()
    # A process that has computed with several threads cannot be forked into copies that do: all computing is left to the copies.
    torch.set_num_threads(1)
    target = _target(text, args.text)
    threads = threads if torch.get_num_threads() == 1 else 1
    return conduct(target, only, skip, args.seconds, threads, _teller(), keep_interrupted=True)


def _target(text: str, corpus: Path | None) -> Target:
    if Path(text).is_dir() or text.endswith(".json"):
        from sickbay.checklist.transformers_model import of_folder

        return of_folder(Path(text), corpus)
    if corpus is not None:
        raise UsageError(f"--text goes with a transformers model's folder or config.json; {text} is none")
    if ":" not in text:
        near = f": write {text}:FUNCTION" if not Path(text).exists() else ""
        raise UsageError(f"{text!r} is neither module:function, nor a model's folder, nor a script{near}")
    from sickbay.checklist.target import named

    return named(text)


def _is_script(text: str) -> bool:
    return text.endswith((".py", ".pyw"))


def _names(lists: list[str]) -> list[str]:
    return [name.strip() for names in lists for name in names.split(",") if name.strip()]


def _teller() -> Callable[[str], None] | None:
    if sys.stderr is None or not sys.stderr.isatty():
        return None

    def tell(exam: str) -> None:
        sys.stderr.write(f"\r\x1b[Ksickbay checkup: {exam} ...\r\x1b[K" if exam == "overfit" else f"\r\x1b[Ksickbay checkup: {exam} ...")
        sys.stderr.flush()

    return tell


@contextlib.contextmanager
def _talk_on_stderr() -> Iterator[Callable[[str], None]]:
    """Inside, what the target prints goes to stderr; gives a function that writes to the real stdout."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        yield write
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
