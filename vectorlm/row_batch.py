"""Rows as they are read, with the names of their places. Floor 1, numpy only; shared by the readers
and by what makes documents of rows in `vectorlm.data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class BadRow(NamedTuple):
    """`reason` is what rows are counted by, `detail` the sentence for this one."""

    where: str
    reason: str
    detail: str


class Where:
    """The names of rows, `file:line` or `file: row N`; made only when asked for."""

    def __init__(self, prefix: str, numbers: Sequence[int] | NDArray[np.int64]) -> None:
        self.prefix = prefix
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return f"{self.prefix}{self.numbers[index]}"

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Where:
        return Where(self.prefix, np.asarray(self.numbers, np.int64)[indices])


class Position(NamedTuple):
    """How far a source is read: the file's number, the place in it as its reader counts, and the
    number of lines or rows before that place."""

    file: int = 0
    place: int = 0
    number: int = 0


class RowBatch(NamedTuple):
    """`values`: texts, or whole records as dicts. `bad`: the rows of this batch that could not be
    read, in order. `after`: where reading goes on behind it."""

    values: list[Any]
    where: Where
    bad: list[BadRow]
    after: Position = Position()
    source: int = 0  # which of several
    again: bool = False  # whether its rows have been counted in an earlier pass
    held_out: int = 0  # rows for the other side
    passed_over: int = 0  # rows that a weight left out
