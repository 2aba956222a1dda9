"""`sickbay generate --interactive`: the model goes on from each line, and remembers what was said."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sickbay.reference.generation.complete import Writer
    from sickbay.reference.generation.decoding import Decoding

MARK = "> "
NEW = "/new"
HINT = f"The model goes on from each line; \\n in it is a line end, {NEW} forgets what was said, ctrl-C ends an answer, ctrl-D the program."


def converse(writer: Writer, count: int, decoding: Decoding, seed: int, stop: Sequence[str]) -> int:
    """0 at the end of the lines. Answer number n is drawn with `seed` + n; a line that has no ids is refused and asked for again.

    What answers a source and does not go on from it remembers nothing.
    """
    said = ""
    for number, line in enumerate(_lines()):
        if line.strip() == NEW:
            said = ""
            continue
        text = said + ("\n" if said and not said.endswith("\n") else "") + line.replace("\\n", "\n")
        answer = ""
        try:
            for piece in writer.write([text], count, decoding, seed + number, stop):
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                answer += piece.text
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        except ValueError as problem:
            print(problem, file=sys.stderr)
            continue
        said = text + answer if writer.goes_on else ""
        print()
    return 0


def _lines() -> Iterator[str]:
    """What is typed, or what is piped in, line by line."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    try:
        import readline  # noqa: F401  # lines can then be edited and called back
    except ImportError:
        pass
    print(HINT, file=sys.stderr)
    while True:
        try:
            yield input(MARK)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
