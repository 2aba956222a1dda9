"""Runs of this process's own functions, each in a forked copy, so that none sees what another left behind; many at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Result = TypeVar("Result")
_FORK = multiprocessing.get_context("fork")


def each(
    function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[tuple[Any, ...], Result | None]]:
    """Yields (arguments, `function(*arguments)`) as they are done, `jobs` at a time; None where the copy died without a result.

    `function` stands in a module, arguments and results can be pickled.
    """
    with ProcessPoolExecutor(jobs, mp_context=_FORK) as pool:
        asked = {pool.submit(_in_a_copy, function, each_of): each_of for each_of in arguments}
        for future in as_completed(asked):
            yield asked[future], future.result()


def _in_a_copy(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result | None:
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result: Result = receiver.recv()
        return result
    except EOFError:
        return None
    finally:
        process.join()


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))
