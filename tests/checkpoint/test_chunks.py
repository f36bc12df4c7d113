"""Strategy: watch the workers from inside their work, with barriers and counters instead of clocks.

What must not depend on the number of threads (order, results, errors, how far ahead items are drawn) is tried with 1,
2 and 4 of them, and with more than are used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift.checkpoint.chunks import CHUNK, MAX_WORKERS, chunks, workers

THREADS = pytest.mark.parametrize("threads", [1, 2, 4, 9])


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(size=st.integers(0, 60), step=st.integers(1, 61))
@settings(max_examples=100, deadline=None, database=None)
def test_chunks_follow_each_other_without_gaps(size, step):
    found = list(chunks(size, step))
    assert [place for start, stop in found for place in range(start, stop)] == list(range(size))
    assert all(stop - start == step for start, stop in found[:-1])
    assert all(stop > start for start, stop in found)


def test_the_default_step():
    assert list(chunks(2 * CHUNK + 1)) == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 1)]


def test_chunks_of_a_vector_that_fits_no_memory_cost_nothing():
    first = next(iter(chunks(10**30)))
    assert first == (0, CHUNK)


@THREADS
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_results_are_in_order(threads, count):
    torch.set_num_threads(threads)

    def work(number: int) -> int:
        time.sleep((number * 7 % 5) / 2000)  # later items are often ready first
        return number**2

    with workers() as in_order:
        assert list(in_order(work, iter(range(count)))) == [number**2 for number in range(count)]


@THREADS
def test_no_more_items_are_drawn_than_are_worked_on(threads):
    """Each waiting result holds a chunk, so a slow consumer must hold up the producer."""
    torch.set_num_threads(threads)
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield number

    with workers() as in_order:
        for given_back, _ in enumerate(in_order(lambda number: number, items())):
            assert drawn - given_back <= min(threads, MAX_WORKERS) + 1
    assert drawn == 100


@pytest.mark.parametrize("threads", [2, 4])
def test_as_many_work_at_once_as_torch_has_threads(threads):
    torch.set_num_threads(threads)
    together = threading.Barrier(threads, timeout=20)
    with workers() as in_order:
        assert len(list(in_order(lambda _: together.wait(), range(threads)))) == threads


@THREADS
def test_never_more_work_at_once_than_allowed(threads):
    torch.set_num_threads(threads)
    lock, at_once, most = threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.001)
        with lock:
            at_once -= 1

    with workers() as in_order:
        list(in_order(work, range(40)))
    assert most <= min(threads, MAX_WORKERS)


@THREADS
def test_torch_has_one_thread_within_and_its_own_number_after(threads):
    torch.set_num_threads(threads)
    with workers() as in_order:
        assert torch.get_num_threads() == 1
        assert set(in_order(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == threads


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which `except Exception` does not see."""


@THREADS
@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("place", ["work", "items", "consumer", "block"])
def test_errors_come_through_and_leave_nothing_behind(threads, error, place):
    torch.set_num_threads(threads)
    running = threading.active_count()
    given_back = []

    def fail_at(number: int, where: str) -> int:
        if number == 5 and where == place:
            raise error(f"in {place}")
        return number

    def run() -> None:
        with workers() as in_order:
            for number in in_order(
                lambda item: fail_at(item, "work"), (fail_at(number, "items") for number in range(20))
            ):
                given_back.append(fail_at(number, "consumer"))
            raise error(f"in {place}")

    with pytest.raises(error, match=f"in {place}"):
        run()
    assert torch.get_num_threads() == threads
    assert threading.active_count() == running
    if place in ("work", "consumer"):
        assert given_back == [0, 1, 2, 3, 4]  # what came before the error is not lost


@THREADS
def test_sums_do_not_depend_on_the_number_of_threads(threads):
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    alone = values.sum()
    torch.set_num_threads(threads)
    with workers() as in_order:
        sums = list(in_order(lambda _: values.sum(), range(4)))
    assert all(torch.equal(one, alone) for one in sums)


def test_workers_may_be_nested():
    torch.set_num_threads(3)
    with workers() as outer, workers() as inner:
        assert list(outer(lambda a: a, inner(lambda b: -b, range(4)))) == [0, -1, -2, -3]
    assert torch.get_num_threads() == 3
