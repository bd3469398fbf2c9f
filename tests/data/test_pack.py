"""Packing: what is kept, where pieces start, what is learned; checked on random documents, which
come to the packer in groups of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pytest

from vectorlm.data.documents import Documents, RowBlock, offsets_of
from vectorlm.data.pack import NO_TOKENS, NOTHING_TO_LEARN, Packer, PartialPacker, make_packer
from vectorlm.errors import DataError
from vectorlm.row import Row
from vectorlm.row_batch import Where

IGNORE = -100
KINDS = ["full", "partial", "truncate", "none"]


class Document(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray


def document(length: int, prompt: int = 0, first: int = 1) -> Document:
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = ids.copy()
    labels[:prompt] = IGNORE
    return Document(ids, labels)


def random_documents(seed: int, longest: int, prompts: bool = True) -> list[Document]:
    """Every token has its own id, so that none can stand for another."""
    random = np.random.default_rng(seed)
    made, first = [], 1
    for length in random.integers(1, longest + 1, size=40):
        prompt = int(random.integers(0, length + 1)) if prompts else 0
        made.append(document(int(length), prompt, first))
        first += int(length)
    return made


def together(documents: list[Document]) -> Documents:
    empty = np.empty(0, np.int32)
    return Documents(
        np.concatenate([empty, *(one.ids for one in documents)]),
        np.concatenate([empty, *(one.labels for one in documents)]),
        offsets_of([len(one.ids) for one in documents]),
        Where("file:", range(1, len(documents) + 1)),
    )


def rows_of(blocks: Iterable[RowBlock]) -> list[Row]:
    return [block.row(index) for block in blocks for index in range(block.rows)]


def packed(packer: Packer, documents: list[Document], group: int = 7) -> list[Row]:
    rows: list[Row] = []
    for at in range(0, len(documents), group):
        rows += rows_of(packer.add(together(documents[at : at + group])))
    return rows + rows_of(packer.finish())


def joined(rows: list[Row], name: str) -> list[int]:
    return [int(value) for row in rows for value in getattr(row, name)]


def learned(rows: list[Row]) -> list[int]:
    return [label for label in joined(rows, "labels") if label != IGNORE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_row_obeys_the_format(kind: str, seed: int) -> None:
    for row in packed(make_packer(kind, 16, IGNORE, 0), random_documents(seed, 16)):
        assert 1 <= len(row.input_ids) == len(row.labels) <= 16
        assert all(array.dtype == np.int32 for array in row)
        assert row.boundaries[0] == 0
        assert (np.diff(row.boundaries) > 0).all()
        assert (row.labels[row.boundaries] == IGNORE).all()
        kept = row.labels != IGNORE
        assert (row.labels[kept] == row.input_ids[kept]).all()


@pytest.mark.parametrize("max_seq_len", [2, 7, 16, 1000])
def test_full_loses_nothing_and_keeps_the_order(max_seq_len: int) -> None:
    documents = random_documents(max_seq_len, 50)
    packer = make_packer("full", max_seq_len, IGNORE)
    rows = packed(packer, documents)
    assert joined(rows, "input_ids") == [int(i) for one in documents for i in one.ids]
    assert all(len(row.input_ids) == max_seq_len for row in rows[:-1])
    assert (packer.documents, packer.skipped) == (len(documents), Counter())


@pytest.mark.parametrize("max_seq_len", [2, 7, 16])
def test_full_boundaries_are_the_starts_of_documents_and_rows(max_seq_len: int) -> None:
    documents = random_documents(max_seq_len, 50)
    starts = {int(one.ids[0]) for one in documents}
    for row in packed(make_packer("full", max_seq_len, IGNORE), documents):
        expected = [at for at, token in enumerate(row.input_ids) if at == 0 or token in starts]
        assert row.boundaries.tolist() == expected


def test_full_learns_all_but_prompts_and_boundaries() -> None:
    documents = random_documents(3, 50)
    rows = packed(make_packer("full", 16, IGNORE), documents)
    unlearnable = {int(row.input_ids[at]) for row in rows for at in row.boundaries}
    wanted = [int(i) for one in documents for i in one.labels if i != IGNORE]
    assert learned(rows) == [token for token in wanted if token not in unlearnable]


def test_full_keeps_a_row_with_nothing_to_learn() -> None:
    packer = make_packer("full", 4, IGNORE)
    rows = packed(packer, [document(4, prompt=4), document(4, first=5)])
    assert [len(row.input_ids) for row in rows] == [4, 4]
    assert not packer.skipped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3, 40])
def test_groups_change_nothing_and_documents_are_left_alone(kind: str, group: int) -> None:
    documents = random_documents(group, 16)
    before = [one.labels.copy() for one in documents]
    rows = packed(make_packer(kind, 16, IGNORE), documents, group)
    expected = packed(make_packer(kind, 16, IGNORE), documents)
    assert same(rows, expected)
    whole = together(documents)
    labels = whole.labels.copy()
    make_packer(kind, 16, IGNORE).add(whole)
    assert np.array_equal(labels, whole.labels)
    assert all(np.array_equal(a.labels, b) for a, b in zip(documents, before, strict=True))


def same(rows: list[Row], others: list[Row]) -> bool:
    pairs = zip(rows, others, strict=True)
    return all(
        np.array_equal(a, b) for row, other in pairs for a, b in zip(row, other, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_packer_goes_on_from_its_state(kind: str) -> None:
    documents = random_documents(5, 16)
    packer = make_packer(kind, 16, IGNORE)
    rows = packed(packer, documents)
    for at in (1, 17, 39):
        first, second = make_packer(kind, 16, IGNORE), make_packer(kind, 16, IGNORE)
        begun = rows_of(first.add(together(documents[:at])))
        second.load_state(first.state())
        assert same(begun + packed(second, documents[at:]), rows)
        assert second.state().keys() == packer.state().keys()
        assert (second.documents, second.skipped) == (packer.documents, packer.skipped)


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_partial_gives_each_document_back_and_learns_each_token_once(overlap: int) -> None:
    for one in random_documents(overlap, 90, prompts=False):
        packer = make_packer("partial", 16, IGNORE, overlap)
        rows = packed(packer, [one])
        if len(one.ids) == 1:
            assert packer.skipped == {NOTHING_TO_LEARN: 1}
            continue
        skip = [0] + [overlap] * (len(rows) - 1)
        again = [int(i) for row, n in zip(rows, skip, strict=True) for i in row.input_ids[n:]]
        lost = packer.skipped[NOTHING_TO_LEARN]  # at most a last chunk of one token
        assert again == one.ids[: len(again)].tolist()
        assert len(one.ids) - len(again) == lost <= (overlap == 0)
        first_of_chunk = range(0, len(one.ids), 16) if overlap == 0 else [0]
        expected = [int(i) for at, i in enumerate(one.ids) if at not in first_of_chunk]
        assert learned(rows) == expected


def test_partial_repeats_exactly_the_overlap_as_context() -> None:
    first, second, third = packed(make_packer("partial", 6, IGNORE, 2), [document(13)])
    assert first.labels.tolist() == [IGNORE, 2, 3, 4, 5, 6]
    assert second.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert second.labels.tolist() == [IGNORE, IGNORE, 7, 8, 9, 10]
    assert third.labels.tolist() == [IGNORE, IGNORE, 11, 12, 13]


@pytest.mark.parametrize(("length", "chunks"), [(6, 1), (7, 2), (10, 2), (11, 3)])
def test_partial_makes_no_chunk_of_overlap_only(length: int, chunks: int) -> None:
    assert len(packed(make_packer("partial", 6, IGNORE, 2), [document(length)])) == chunks


def test_partial_refuses_an_overlap_without_progress() -> None:
    with pytest.raises(ValueError, match="overlap 6"):
        PartialPacker(6, IGNORE, 6)


def test_truncate_keeps_the_start_and_counts_the_rest() -> None:
    packer = make_packer("truncate", 6, IGNORE)
    rows = packed(packer, [document(4), document(9, first=10), document(7, first=30)])
    assert joined(rows, "input_ids") == [1, 2, 3, 4, *range(10, 16), *range(30, 36)]
    assert (packer.cut_documents, packer.cut_tokens) == (2, 4)


def test_none_keeps_documents_as_they_are() -> None:
    documents = random_documents(1, 16, prompts=False)
    rows = packed(make_packer("none", 16, IGNORE), documents)
    kept = [one.ids.tolist() for one in documents if len(one.ids) > 1]
    assert [row.input_ids.tolist() for row in rows] == kept


def test_none_refuses_a_longer_document_by_name() -> None:
    with pytest.raises(
        DataError, match=r"file:3: .* 17 tokens.*\(16\)[\s\S]*full .*best_fit .*partial .*trunc"
    ):
        make_packer("none", 16, IGNORE).add(
            together([document(16), document(0), document(17), document(18)])
        )


@pytest.mark.parametrize("kind", ["partial", "truncate", "none"])
def test_a_row_with_nothing_to_learn_is_dropped_and_counted(kind: str) -> None:
    packer = make_packer(kind, 6, IGNORE)
    assert packed(packer, [document(5, prompt=5), document(1)]) == []
    assert (packer.documents, packer.skipped) == (0, {NOTHING_TO_LEARN: 2})


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_without_tokens_is_counted(kind: str) -> None:
    packer = make_packer(kind, 6, IGNORE)
    assert packed(packer, [document(0)]) == []
    assert packer.skipped == {NO_TOKENS: 1}
