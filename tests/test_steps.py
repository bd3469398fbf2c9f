"""Steps: every row of an epoch is learned exactly once, whatever the ranks and micro-batches."""

from __future__ import annotations

from itertools import product

import pytest

from vectorlm.steps import (
    Position,
    Steps,
    micro_batches,
    pad_to_multiple,
    rank_slice,
    warmup_steps,
)

ROWS = (1, 2, 3, 7, 8, 40, 41)
MICRO_BATCHES = (1, 2, 3, 5)
RANKS = (1, 2, 3, 4, 5)
ACCUMULATIONS = (1, 2, 4)
SHARES = (0.05, 0.1, 0.25, 1 / 3, 0.5, 1.0, 3.0)


def walk(steps: Steps, position: Position = Position()) -> list[tuple[Position, Position]]:  # noqa: B008
    """(before, after) of every step from `position` to the end of the run."""
    walked = []
    while position.epoch < steps.epochs:
        walked.append((position, steps.after(position)))
        position = steps.after(position)
    return walked


def saves(steps: Steps, share: float) -> list[int]:
    """The numbers of the steps after which a checkpoint is due."""
    walked = enumerate(walk(steps), start=1)
    return [number for number, pair in walked if steps.save_due(*pair, share)]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_ranks_of_a_step_cover_each_row_once(ranks: int) -> None:
    for rows, micro_batch, accumulation in product(ROWS, MICRO_BATCHES, ACCUMULATIONS):
        steps = Steps(rows, micro_batch * accumulation * ranks, epochs=1)
        for before, _ in walk(steps):
            start, stop = steps.step_rows(before)
            count = micro_batches(stop - start, micro_batch, ranks)
            assert count <= accumulation
            slices = [
                rank_slice(start, stop, index, micro_batch, rank, ranks)
                for rank in range(ranks)
                for index in range(count)
            ]
            covered = [row for part in slices for row in range(rows)[part]]
            assert sorted(covered) == list(range(start, stop))
            assert all(len(range(rows)[part]) <= micro_batch for part in slices)


def test_a_step_needs_all_its_micro_batches() -> None:
    """One fewer on every rank would leave rows out: no micro-batch is run for nothing."""
    for rows, micro_batch, ranks in product(ROWS, MICRO_BATCHES, RANKS):
        count = micro_batches(rows, micro_batch, ranks)
        assert (count - 1) * micro_batch * ranks < rows <= count * micro_batch * ranks


def test_steps_of_an_epoch_follow_each_other() -> None:
    for rows, batch, epochs in product(ROWS, (1, 4, 6, 100), (1, 3)):
        steps = Steps(rows, batch, epochs)
        walked = walk(steps)
        assert len(walked) == steps.per_epoch * epochs
        for epoch in range(epochs):
            slices = [steps.step_rows(before) for before, _ in walked if before.epoch == epoch]
            rows_seen = [row for start, stop in slices for row in range(start, stop)]
            assert rows_seen == list(range(rows))
        assert walked[-1][1] == Position(epochs, 0)


def test_what_remains_is_counted_from_any_position() -> None:
    for rows, batch, epochs in product(ROWS, (1, 4, 6, 100), (1, 3)):
        steps = Steps(rows, batch, epochs)
        walked = walk(steps)
        remaining = [steps.remaining(before) for before, _ in walked]
        assert remaining == list(range(len(walked), 0, -1))
        assert steps.remaining(walked[-1][1]) == 0


def test_what_remains_after_the_batch_was_changed() -> None:
    """A position inside an epoch need not be a multiple of the global batch."""
    steps = Steps(rows=41, global_batch=6, epochs=2)
    position = Position(0, 8)
    assert steps.remaining(position) == len(walk(steps, position)) == 6 + 7


def test_a_position_does_not_know_ranks() -> None:
    """The same global batch on other ranks visits the same positions."""
    ways = {(1, 12): 1, (3, 4): 1, (2, 3): 2, (4, 3): 1}  # (ranks, micro-batch): accumulation
    batches = {ranks * micro * accumulation for (ranks, micro), accumulation in ways.items()}
    assert batches == {12}
    rows_of_steps = [
        [
            sorted(
                row
                for rank, index in product(range(ranks), range(micro_batches(stop, micro, ranks)))
                for row in range(41)[rank_slice(start, stop, index, micro, rank, ranks)]
            )
            for start, stop in (Steps(41, 12, 1).step_rows(p) for p, _ in walk(Steps(41, 12, 1)))
        ]
        for ranks, micro in ways
    ]
    assert all(rows == rows_of_steps[0] for rows in rows_of_steps)


@pytest.mark.parametrize("share", SHARES)
def test_saves_come_at_the_first_step_past_each_share(share: float) -> None:
    for rows, batch, epochs in product((1, 7, 10, 40, 41, 1000), (1, 3, 4), (1, 3)):
        steps = Steps(rows, batch, epochs)
        expected = []
        for number, (before, after) in enumerate(walk(steps), start=1):
            multiples = range(1, int(1 / share) + 2)
            crossed = any(
                before.row + 1e-6 < k * share * rows <= after.row + 1e-6 for k in multiples
            )
            if crossed or after.row == 0:
                expected.append(number)
        assert saves(steps, share) == expected, (rows, batch, epochs)


@pytest.mark.parametrize(
    ("rows", "batch", "share", "expected"),
    [
        (40, 4, 0.1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (40, 4, 0.25, [3, 5, 8, 10]),
        (40, 4, 1.0, [10]),
        (40, 4, 3.0, [10]),
        (41, 4, 0.25, [3, 6, 8, 11]),
        (3, 4, 0.1, [1]),
        (10, 1, 0.3, [3, 6, 9, 10]),
        # 6 / (0.05 * 24) is a little less than 5, and must count as 5.
        (24, 1, 0.05, [n for n in range(2, 25) if n % 6 != 1]),
        (24, 1, 0.25, [6, 12, 18, 24]),
    ],
)
def test_saves_of_an_epoch(rows: int, batch: int, share: float, expected: list[int]) -> None:
    assert saves(Steps(rows, batch, 1), share) == expected


def test_every_epoch_ends_with_a_save() -> None:
    steps = Steps(41, 4, 3)
    assert saves(steps, 1.0) == saves(steps, 3.0) == [11, 22, 33]


def test_epochs_are_counted_in_rows() -> None:
    steps = Steps(40, 4, 3)
    assert steps.epoch_at(Position(1, 10)) == 1.25
    assert steps.epoch_at(Position(3, 0)) == 3.0


def test_warm_up_is_rounded_up() -> None:
    given = [(20, 0.0), (20, 0.1), (21, 0.1), (1, 1.0), (7, 0.5)]
    assert [warmup_steps(total, ratio) for total, ratio in given] == [0, 2, 3, 1, 4]


def test_padding_to_a_multiple() -> None:
    assert [pad_to_multiple(size, 64) for size in (1, 64, 65, 320)] == [64, 64, 128, 320]
    assert pad_to_multiple(321, None) == 321
