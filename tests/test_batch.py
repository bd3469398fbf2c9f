"""Batch: rows end to end, documents kept apart, every supervised token once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import joined
from vectorlm.batch import Batch, Row

IGNORE = -100


def row(*documents: list[int], ignore_index: int = IGNORE) -> Row:
    made = joined(documents, ignore_index)
    return Row(made.input_ids, made.labels, made.boundaries)


@pytest.fixture
def batch() -> Batch:
    """Two rows of two documents each; one document of a single token."""
    return Batch.from_rows([row([5, 6, 7], [8]), row([9, 10], [11, 12, 13, 14])], IGNORE)


def test_rows_are_laid_end_to_end(batch: Batch) -> None:
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.input_ids.dtype == batch.targets.dtype == batch.position_ids.dtype == torch.int64
    assert batch.tokens == 10


def test_documents_are_known_by_their_starts(batch: Batch) -> None:
    assert batch.bounds == (0, 3, 4, 6, 10)
    assert batch.starts.tolist() == list(batch.bounds)
    assert batch.starts.dtype == torch.int32  # as the variable-length kernels take it
    assert batch.longest == 4


def test_positions_restart_at_each_document(batch: Batch) -> None:
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2, 3]]


def test_a_target_is_the_next_token_of_the_same_document(batch: Batch) -> None:
    none = IGNORE
    assert batch.targets.tolist() == [[6, 7, none, none, 10, none, 12, 13, 14, none]]
    assert batch.supervised_tokens == 6


def test_labels_decide_what_is_learned() -> None:
    given = Row(
        np.array([5, 6, 7, 8], np.int32),
        np.array([IGNORE, IGNORE, 7, 8], np.int32),
        np.array([0], np.int32),
    )
    made = Batch.from_rows([given], IGNORE)
    assert made.targets.tolist() == [[IGNORE, 7, 8, IGNORE]]
    assert made.supervised_tokens == 2


def test_a_label_at_the_start_of_a_document_is_never_a_target() -> None:
    """Even where a folder labels it, the token before belongs to another document."""
    given = Row(
        np.array([5, 6, 7, 8], np.int32),
        np.array([5, 6, 7, 8], np.int32),
        np.array([0, 2], np.int32),
    )
    made = Batch.from_rows([given, given], IGNORE)
    assert made.targets.tolist() == [[6, IGNORE, 8, IGNORE, 6, IGNORE, 8, IGNORE]]


def test_another_ignore_index() -> None:
    made = Batch.from_rows([row([5, 6], [7, 8], ignore_index=-1)], -1)
    assert made.targets.tolist() == [[6, -1, 8, -1]]
    assert made.padded()[1].tolist() == [0, 2]
    assert made.learned_targets.tolist() == [6, 8]
    assert made.supervised_tokens == 2


def test_a_batch_without_rows_learns_nothing() -> None:
    empty = Batch.from_rows([], IGNORE)
    assert empty.input_ids.shape == (1, 1)
    assert empty.targets.tolist() == [[IGNORE]]
    assert empty.bounds == (0, 1)
    assert (empty.supervised_tokens, empty.tokens, empty.longest) == (0, 0, 1)
    assert empty.padded()[1].tolist() == empty.learned.tolist() == []


def test_padded_documents(batch: Batch) -> None:
    input_ids, learned = batch.padded()
    assert input_ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0], [11, 12, 13, 14]]
    assert learned.tolist() == [0, 1, 8, 12, 13, 14]
    assert batch.learned_targets.tolist() == [6, 7, 10, 12, 13, 14]


def test_learned_are_the_places_of_targets(batch: Batch) -> None:
    flat = batch.targets[0]
    assert batch.learned.tolist() == [i for i, target in enumerate(flat) if target != IGNORE]
    assert batch.supervised_tokens == len(batch.learned_targets) == 6


def test_moving_keeps_everything(batch: Batch) -> None:
    moved = batch.to(torch.device("cpu"))
    for name in ("input_ids", "targets", "position_ids", "starts", "learned"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.bounds, moved.longest, moved.tokens) == (batch.bounds, batch.longest, 10)


def test_rows_are_not_changed() -> None:
    given = row([5, 6, 7], [8, 9])
    before = [array.copy() for array in (given.input_ids, given.labels, given.boundaries)]
    Batch.from_rows([given, given], IGNORE)
    after = (given.input_ids, given.labels, given.boundaries)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
