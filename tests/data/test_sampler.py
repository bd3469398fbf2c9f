"""The order of rows: always a permutation, the longest at the front, steps of like lengths."""

from __future__ import annotations

import numpy as np
import pytest

from vectorlm.data.sampler import WINDOW_STEPS, Numbers, epoch_order, grouped_by_length
from vectorlm.data.sampler import longest_first as put_first

ROWS, STEP = 10_007, 16


@pytest.fixture
def lengths() -> Numbers:
    drawn = np.random.default_rng(0).lognormal(5.1, 0.8, ROWS)
    return np.clip(drawn, 4, 2048).astype(np.int64)


def steps(order: Numbers, of: Numbers) -> list[Numbers]:
    return [of[order[start : start + STEP]] for start in range(0, len(order), STEP)]


def is_permutation(order: Numbers) -> bool:
    return bool((np.sort(order) == np.arange(ROWS)).all())


def test_the_longest_come_first_and_the_rest_stays_in_order(lengths: Numbers) -> None:
    order = epoch_order(ROWS, seed=1, epoch=0)
    made = put_first(order, lengths, STEP)
    assert is_permutation(made)
    assert lengths[made[:STEP]].tolist() == sorted(lengths, reverse=True)[:STEP]
    assert made[STEP:].tolist() == [row for row in order if row not in set(made[:STEP])]


def test_of_rows_alike_the_first_in_order_come_first() -> None:
    order = epoch_order(9, seed=1, epoch=0)
    assert put_first(order, np.full(9, 7), 4).tolist() == order.tolist()


def test_fewer_rows_than_a_step() -> None:
    order = epoch_order(3, seed=1, epoch=0)
    assert put_first(order, np.array([5, 9, 7]), 8).tolist() == [1, 2, 0]
    assert sorted(grouped_by_length(order, np.array([5, 9, 7]), 8, 1, 0)) == [0, 1, 2]


def test_steps_hold_rows_alike(lengths: Numbers) -> None:
    order = epoch_order(ROWS, seed=1, epoch=0)
    made = grouped_by_length(order, lengths, STEP, seed=1, epoch=0)
    assert is_permutation(made)

    def fill(order: Numbers) -> float:
        """Tokens by what ranks of one row each wait for, or what padding would make of them."""
        return float(lengths.sum() / sum(len(step) * step.max() for step in steps(order, lengths)))

    assert fill(order) < 0.45
    assert fill(made) > 0.9


def test_steps_of_lengths_come_in_random_order(lengths: Numbers) -> None:
    order = epoch_order(ROWS, seed=1, epoch=0)
    made = grouped_by_length(order, lengths, STEP, seed=1, epoch=0)
    means = np.array([step.mean() for step in steps(made, lengths)][:WINDOW_STEPS])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    assert len(made) % STEP == len(steps(made, lengths)[-1])  # the smaller step stays the last


def test_the_order_follows_from_seed_and_epoch(lengths: Numbers) -> None:
    def made(seed: int, epoch: int) -> list[int]:
        order = epoch_order(ROWS, seed, epoch)
        return grouped_by_length(order, lengths, STEP, seed, epoch).tolist()

    assert made(1, 0) == made(1, 0)
    assert made(1, 0) != made(1, 1)
    assert made(1, 0) != made(2, 0)
