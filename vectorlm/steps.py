"""From rows to micro-batches, steps, warm-up and saves: plain arithmetic, on floor 0.

A position is (epoch, rows of it done). It knows nothing of ranks, so a run can go on with another
number of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Steps:
    """The steps of a run: `rows` a pass, `global_batch` rows an optimizer step, `epochs` passes."""

    rows: int
    global_batch: int
    epochs: int

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.rows / self.global_batch)

    def remaining(self, position: Position) -> int:
        if position.epoch >= self.epochs:
            return 0
        here = math.ceil((self.rows - position.row) / self.global_batch)
        return here + (self.epochs - position.epoch - 1) * self.per_epoch

    def step_rows(self, position: Position) -> tuple[int, int]:
        """The slice of the epoch's order that the step at `position` learns."""
        return position.row, min(position.row + self.global_batch, self.rows)

    def after(self, position: Position) -> Position:
        stop = self.step_rows(position)[1]
        if stop == self.rows:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, stop)

    def epoch_at(self, position: Position) -> float:
        return position.epoch + position.row / self.rows

    def save_due(self, before: Position, after: Position, share: float) -> bool:
        """Whether the step crossed a multiple of `share` of an epoch, or ended the epoch."""
        if after.epoch != before.epoch:
            return True
        every = share * self.rows
        # The small term keeps 0.1 * 10 * 3 / 10 style rounding from delaying a save by a step.
        return math.floor(after.row / every + 1e-9) > math.floor(before.row / every + 1e-9)


def micro_batches(rows: int, micro_batch: int, ranks: int) -> int:
    """How many micro-batches every rank runs so that `rows` rows are learned."""
    return math.ceil(rows / (micro_batch * ranks))


def rank_slice(start: int, stop: int, index: int, micro_batch: int, rank: int, ranks: int) -> slice:
    """The rows (as a slice, perhaps empty) of micro-batch `index` on `rank` in the step `[start,
    stop)`.
    """
    first = start + (index * ranks + rank) * micro_batch
    return slice(min(first, stop), min(first + micro_batch, stop))


def warmup_steps(total_steps: int, ratio: float) -> int:
    return math.ceil(total_steps * ratio)


def pad_to_multiple(size: int, multiple: int | None) -> int:
    return size if not multiple else math.ceil(size / multiple) * multiple
