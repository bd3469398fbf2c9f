"""Work in threads: items in order, errors where they happen, and an end when nobody asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vectorlm.data.ahead import Ahead, Later


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("ahead", "later")]


def test_items_come_in_order() -> None:
    with Ahead(range(100), 2) as items:
        assert list(items) == list(range(100))
    assert not alive()


def test_it_is_only_so_far_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with Ahead(numbers(), 2) as items:
        assert next(items) == 0
    assert len(made) <= 5


def test_an_error_comes_behind_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("here")

    with Ahead(failing(), 2) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="here"):
            next(items)
    assert not alive()


def test_leaving_early_ends_a_chain() -> None:
    with (
        Ahead(iter(range(10**9)), 1) as numbers,
        Ahead((number * 2 for number in numbers), 1) as doubled,
    ):
        assert [next(doubled) for _ in range(3)] == [0, 2, 4]
    assert not alive()


def test_an_error_goes_through_a_chain() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("first")

    with Ahead(failing(), 1) as numbers, Ahead((n for n in numbers), 1) as again:
        with pytest.raises(KeyError, match="first"):
            list(again)


def test_a_value_is_worked_out_meanwhile() -> None:
    gate = threading.Event()
    later = Later(lambda: gate.wait(10) and "value")
    assert not later.done
    gate.set()
    assert later.value() == "value"
    assert later.done


def test_the_error_of_a_value_comes_when_it_is_asked_for() -> None:
    def fail() -> str:
        raise ValueError("no value")

    later = Later(fail)
    with pytest.raises(ValueError, match="no value"):
        later.value()
    assert not later.done
