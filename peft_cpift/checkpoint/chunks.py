"""Long vectors worked on a chunk at a time, several chunks at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

CHUNK = 1 << 18
"""Entries worked on together: small enough for a processor's cache, large enough for the overhead to vanish."""
MAX_WORKERS = 4
"""More would wait for the memory, and each holds a chunk."""

Item = TypeVar("Item")
Result = TypeVar("Result")
InOrder = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]


def chunks(size: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """The (start, stop) of every chunk of a vector of `size` entries.

    Example:
        >>> list(chunks(5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    return ((start, min(start + step, size)) for start in range(0, size, step))


@contextmanager
def workers() -> Iterator[InOrder]:
    """Give a `map` that runs in as many threads as torch uses, a few items ahead, with results in the order of items.

    Within the block torch itself uses one thread. Splitting each operation on a chunk over OpenMP's threads costs
    more than it gains, and where another program wants a core, up to eighty times that, for they wait for each other
    by spinning; and sums would depend on the number of threads.

    Example:
        >>> with workers() as in_order:
        ...     list(in_order(lambda number: number**2, range(5)))
        [0, 1, 4, 9, 16]
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MAX_WORKERS)) as pool:

            def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
                ahead: deque[Future[Result]] = deque()
                for item in items:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) > min(threads, MAX_WORKERS):
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()

            yield in_order
    finally:
        torch.set_num_threads(threads)
