"""Best fit: hardly anything is left empty, nothing is lost, only long documents are cut."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.data.test_pack import IGNORE, document, packed, random_documents, rows_of, same, together
from vectorlm.data.best_fit import BestFitPacker, best_fit, shuffled, window_tokens
from vectorlm.data.documents import Documents, Offsets, offsets_of
from vectorlm.row_batch import Where


def packer(max_seq_len: int = 16, seed: int = 1, window: int = 100) -> BestFitPacker:
    return BestFitPacker(max_seq_len, IGNORE, seed=seed, window_tokens=window)


@pytest.mark.parametrize("longest", [9, 16, 50])
@pytest.mark.parametrize("window", [1, 100, 10_000])
def test_every_token_is_kept_and_rows_obey_the_format(longest: int, window: int) -> None:
    documents = random_documents(longest, longest)
    one = packer(window=window)
    rows = packed(one, documents)
    kept = sorted(int(token) for row in rows for token in row.input_ids)
    assert kept == sorted(int(token) for document in documents for token in document.ids)
    assert (one.documents, one.skipped) == (len(documents), {})
    for row in rows:
        assert all(array.dtype == np.int32 for array in row)
        assert 1 <= len(row.input_ids) == len(row.labels) <= 16
        assert row.boundaries[0] == 0
        assert (np.diff(row.boundaries) > 0).all()
        assert (row.labels[row.boundaries] == IGNORE).all()


def test_labels_are_the_documents_own_but_at_the_starts_of_pieces() -> None:
    documents = random_documents(3, 50)
    label_of = {
        int(i): int(label)
        for one in documents
        for i, label in zip(one.ids, one.labels, strict=True)
    }
    for row in packed(packer(), documents):
        for at, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
            assert label == (IGNORE if at in row.boundaries else label_of[int(token)])


def test_only_documents_longer_than_a_row_are_cut_into_full_rows_and_a_rest() -> None:
    documents = random_documents(4, 50)
    length_of = {int(one.ids[0]): len(one.ids) for one in documents}
    for row in packed(packer(), documents):
        pieces = np.split(row.input_ids, row.boundaries[1:])
        for piece in pieces:
            start = int(piece[0])
            if start in length_of and length_of[start] <= 16:
                assert len(piece) == length_of.pop(start)
            elif start in length_of:
                assert len(piece) == 16
                length_of.pop(start)
    assert not length_of


LENGTHS = {
    "short": lambda random: random.lognormal(4.5, 1.0, 20_000),
    "web": lambda random: random.lognormal(6.2, 1.1, 4000),
    "long": lambda random: random.lognormal(8.0, 1.0, 700),
    "mixture": lambda random: np.concatenate(
        [random.lognormal(8.0, 1.0, 400), random.integers(20, 300, 4000)]
    ),
}


def of_lengths(lengths: Offsets) -> Documents:
    ids = np.ones(lengths.sum(), np.int32)
    return Documents(ids, ids.copy(), offsets_of(lengths), Where("", range(len(lengths))))


def fill(lengths: Offsets, max_seq_len: int, window: int) -> float:
    one = packer(max_seq_len, window=window)
    blocks = [b for part in np.array_split(lengths, 20) for b in one.add(of_lengths(part))]
    blocks += one.finish()
    tokens = sum(len(block.ids) for block in blocks)
    return tokens / (sum(block.rows for block in blocks) * max_seq_len)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("max_seq_len", [512, 2048])
def test_rows_are_full(name: str, max_seq_len: int) -> None:
    random = np.random.default_rng(0)
    lengths = np.maximum(LENGTHS[name](random).astype(np.int64), 1)
    random.shuffle(lengths)
    assert fill(lengths, max_seq_len, window=max_seq_len * 400) >= 0.995


def test_what_cannot_be_filled_is_left_empty_and_comes_to_an_end() -> None:
    half = np.full(200, 9, np.int64)
    assert fill(half, 16, window=100) == pytest.approx(9 / 16)


def test_each_document_goes_into_the_fullest_row_that_takes_it() -> None:
    lengths = np.array([6, 9, 4, 7, 1, 3])
    row_of, fills = best_fit(lengths, 10)
    groups = sorted(sorted(lengths[row_of == row].tolist()) for row in range(len(fills)))
    assert groups == [[1, 9], [3, 7], [4, 6]]
    assert sorted(fills.tolist()) == [10, 10, 10]


def one_by_one(lengths: list[int], max_seq_len: int) -> list[int]:
    """The rooms that best fit leaves, found in the plain way."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else max_seq_len
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_one_length_are_packed_as_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, [8, 20, 33, 64, 64][seed] + 1, 300)
    row_of, fills = best_fit(lengths, 64)
    assert np.array_equal(np.bincount(row_of, weights=lengths), fills)
    assert sorted((64 - fills).tolist()) == one_by_one(lengths.tolist(), 64)


def test_the_order_of_rows_is_shuffled_by_seed_and_documents_keep_theirs() -> None:
    documents = random_documents(1, 16)
    first, again, other = (packed(packer(seed=seed, window=300), documents) for seed in (1, 1, 2))
    assert same(first, again)
    contents = [sorted(row.input_ids.tolist() for row in rows) for rows in (first, other)]
    assert contents[0] == contents[1]
    assert [row.input_ids.tolist() for row in first] != [row.input_ids.tolist() for row in other]
    for row in first:
        starts = row.input_ids[row.boundaries]
        assert (np.diff(starts) > 0).all()


def test_the_shuffle_stays_what_it_is() -> None:
    """Prepared data must come out the same with every version of numpy."""
    assert shuffled(8, 42, 0).tolist() == [4, 1, 6, 2, 0, 7, 3, 5]
    assert sorted(shuffled(1000, 1, 2).tolist()) == list(range(1000))


def test_it_goes_on_from_its_state() -> None:
    documents = random_documents(5, 30)
    rows = packed(packer(), documents, group=5)
    for at in (5, 20, 35):
        first, second = packer(), packer()
        begun = [
            row
            for n in range(0, at, 5)
            for row in rows_of(first.add(together(documents[n : n + 5])))
        ]
        second.load_state(first.state())
        assert same(begun + packed(second, documents[at:], group=5), rows)


def test_a_document_without_tokens_is_counted() -> None:
    one = packer()
    assert packed(one, [document(0), document(3)])[0].input_ids.tolist() == [1, 2, 3]
    assert one.skipped == {"no tokens": 1}


def test_more_memory_makes_a_larger_window() -> None:
    assert 0 < window_tokens(64) < window_tokens(300) < window_tokens(3000)
    assert window_tokens(300) * 12 < 300 << 20


def test_a_million_documents_take_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 0.8, 1_000_000).astype(np.int64) + 1
    start = time.process_time()
    _, fills = best_fit(np.minimum(lengths, 4096), 4096)
    assert time.process_time() - start < 5
    assert fills.sum() / (len(fills) * 4096) > 0.999
