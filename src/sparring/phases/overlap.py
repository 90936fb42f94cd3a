"""Work beside the models': the next inputs are made, and the last results written, while a device (or a CPU) computes.

Both take milliseconds where a forward of many texts takes a second; a fast device would stand still meanwhile. One
thread each, in order, and never more than one piece ahead or behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from sparring.models.memory import Budget

Key = TypeVar("Key")
Made = TypeVar("Made")


@contextmanager
def ahead(
    make: Callable[[Key, int], Made], keys: Sequence[Key], budget: Budget
) -> Iterator[Iterator[Callable[[int], Made]]]:
    """For each key in order a function of a budget of tokens that gives ``make(key, tokens)``, or raises what that
    raised. While one is used, the next is being made for the budget as it is then.

    A function's first call takes what was made before, if it was made for this many tokens; otherwise it is made then,
    by the caller, perhaps while the other thread makes the next: ``make`` must bear two at once. What is still being
    made at the end is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:

        def begin(number: int) -> list[tuple[int, Future[Made]]]:
            tokens = budget.tokens
            return [(tokens, pool.submit(make, keys[number], tokens))] if number < len(keys) else []

        def made() -> Iterator[Callable[[int], Made]]:
            begun = begin(0)
            for number, key in enumerate(keys):
                ready = begun
                wait([one for _, one in ready])  # the next is not begun before
                begun = begin(number + 1)

                def of(tokens: int, key: Key = key, ready: list[tuple[int, Future[Made]]] = ready) -> Made:
                    if ready:
                        made_for, one = ready.pop()
                        if made_for == tokens:
                            return one.result()
                        del one  # its memory goes before more is taken
                    return make(key, tokens)

                yield of

        yield made()


@contextmanager
def behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """What takes work to do while the caller goes on. It waits for the work before; errors are raised there, or at the
    end. Work that was taken is done also when the caller fails, whose error is then the one that is raised."""
    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:
        last: list[Future[None]] = []

        def take(work: Callable[[], None]) -> None:
            if last:
                last.pop().result()
            last.append(pool.submit(work))

        yield take
        if last:
            last.pop().result()
