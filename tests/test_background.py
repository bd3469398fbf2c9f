"""Threads beside the loop: order, errors, limits, and an end in any case."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vectorlm.background import Ahead, Underway
from vectorlm.errors import DataError

LIMIT_S = 20.0
NUMBERS = 50


def late() -> Exception:
    return TimeoutError("too late")


def ahead(items: Iterator[int], depth: int = 2, limit_s: float = LIMIT_S) -> Ahead[int]:
    return Ahead(items, depth, limit_s, late)


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def threads() -> int:
    return sum(thread.name in ("ahead", "underway") for thread in threading.enumerate())


def test_items_come_in_order() -> None:
    with ahead(iter(range(NUMBERS))) as items:
        assert list(items) == list(range(NUMBERS))
        assert list(items) == []  # asked again
    assert threads() == 0


def test_no_more_is_made_than_may_lie_ready() -> None:
    made: list[int] = []
    source = (made.append(n) or n for n in range(NUMBERS))
    with ahead(source, depth=3) as items:
        assert until(lambda: len(made) == 3)
        for asked, _ in enumerate(itertools.islice(items, 4), start=1):
            assert until(lambda n=asked: len(made) == 3 + n)  # type: ignore[misc]
            time.sleep(0.01)
            assert len(made) == 3 + asked
    assert threads() == 0


def test_they_are_made_while_something_else_is_done() -> None:
    """Each takes as long to make as to use: the time is that of one of both, not their sum."""

    def slow() -> Iterator[int]:
        for n in range(10):
            time.sleep(0.05)
            yield n

    with ahead(slow()) as items:
        for n in items:
            time.sleep(0.05)
            if n == 8:
                break
        assert items.waited_s < 0.05 * 5


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    with ahead(slow()) as items:
        assert list(items) == [1]
        assert 0.04 < items.waited_s < LIMIT_S


def test_an_error_comes_in_its_turn() -> None:
    def breaks() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("row 3 is broken")

    with ahead(breaks(), depth=9) as items:
        asked = iter(items)
        assert [next(asked), next(asked)] == [1, 2]
        with pytest.raises(DataError, match="row 3 is broken"):
            next(asked)
    assert threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    with ahead(itertools.count()) as items:
        assert next(iter(items)) == 0
    assert threads() == 0
    with pytest.raises(KeyError), ahead(itertools.count()):
        raise KeyError
    assert threads() == 0


def test_items_that_do_not_come() -> None:
    answer = threading.Event()

    def hangs() -> Iterator[int]:
        answer.wait(LIMIT_S)
        yield 1

    with ahead(hangs(), limit_s=0.05) as items:
        with pytest.raises(TimeoutError, match="too late"):
            next(iter(items))
        answer.set()
    assert until(lambda: threads() == 0)


def test_work_under_way() -> None:
    go = threading.Event()
    work = Underway(lambda: go.wait(LIMIT_S) and "made")
    assert not work.done
    assert not work.failed
    with pytest.raises(TimeoutError):
        work.result(0.01, late)
    go.set()
    assert work.result(LIMIT_S, late) == "made"
    assert work.done
    assert not work.failed


def test_work_that_fails() -> None:
    def fails() -> None:
        raise DataError("no room")

    work = Underway(fails)
    assert until(lambda: work.failed)
    with pytest.raises(DataError, match="no room"):
        work.result(LIMIT_S, late)
