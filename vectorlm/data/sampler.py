"""The order of rows in an epoch. Floor 2, used by `dataset`. Legend: R rows, G rows of a step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
WINDOW_STEPS = 64  # among whose rows those of a length are looked for


def epoch_order(rows: int, seed: int, epoch: int) -> Numbers:
    """A permutation of the rows, another one each epoch, the same on every rank."""
    return torch.randperm(rows, generator=_generator(seed, epoch)).numpy()


def longest_first(order: Numbers, sizes: Numbers, step_rows: int) -> Numbers:
    """The same order, but with the G largest rows before the others, the largest first."""
    first = np.lexsort((np.arange(len(order)), -sizes[order]))[:step_rows]
    return np.concatenate([order[first], np.delete(order, first)])


def grouped_by_length(
    order: Numbers, lengths: Numbers, step_rows: int, seed: int, epoch: int
) -> Numbers:
    """Steps of rows about as long as one another, in random order.

    The order is cut into windows; the rows of each are sorted, cut into steps, and these shuffled.
    A last step with fewer rows stays the last. It does not depend on the number of ranks.
    """
    whole = len(order) - len(order) % step_rows
    generator = _generator(seed, epoch)
    parts = []
    for start in range(0, whole, WINDOW_STEPS * step_rows):
        window = order[start : min(start + WINDOW_STEPS * step_rows, whole)]
        steps = _sorted(window, lengths).reshape(-1, step_rows)
        parts.append(steps[torch.randperm(len(steps), generator=generator).numpy()].ravel())
    return np.concatenate([*parts, _sorted(order[whole:], lengths)])


def _sorted(rows: Numbers, lengths: Numbers) -> Numbers:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
