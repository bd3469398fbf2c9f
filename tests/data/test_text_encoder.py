"""Texts to documents: what is put around them, and which part is learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.data.conftest import TEXTS, changed, ids_of
from vectorlm.data.text_encoder import TextEncoder
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.errors import DataError
from vectorlm.row_batch import BadRow, RowBatch, Where

BOS, EOS, IGNORE = 0, 1, -100


class Document(NamedTuple):
    ids: list[int]
    labels: list[int]
    where: str


def encoder(tokenizer: TextTokenizer, **options: Any) -> TextEncoder:
    defaults = {"add_bos_eos_tokens": True, "pre_pend": None, "separator": None}
    return TextEncoder(tokenizer, **defaults | options, ignore_index=IGNORE)


def encode(
    tokenizer: TextTokenizer, texts: list[str], **options: Any
) -> tuple[list[Document], list[BadRow]]:
    batch = RowBatch(texts, Where("f:", range(1, len(texts) + 1)), [])
    found, bad = encoder(tokenizer, **options).encode(batch)
    spans = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    return [
        Document(found.ids[a:b].tolist(), found.labels[a:b].tolist(), found.where[at])
        for at, (a, b) in enumerate(spans)
    ], bad


def documents(tokenizer: TextTokenizer, texts: list[str], **options: Any) -> list[Document]:
    found, bad = encode(tokenizer, texts, **options)
    assert not bad
    return found


def test_a_document_stands_between_bos_and_eos(tokenizer: TextTokenizer) -> None:
    found = documents(tokenizer, TEXTS)
    assert [document.where for document in found] == ["f:1", "f:2", "f:3", "f:4", "f:5"]
    for text, document in zip(TEXTS, found, strict=True):
        assert document.ids == [BOS, *ids_of(tokenizer, text), EOS]
        assert document.labels == [IGNORE, *ids_of(tokenizer, text), EOS]


def test_without_special_tokens_nothing_is_added(tokenizer: TextTokenizer) -> None:
    for text, document in zip(
        TEXTS, documents(tokenizer, TEXTS, add_bos_eos_tokens=False), strict=True
    ):
        assert document.ids == document.labels == ids_of(tokenizer, text)


def test_a_tokenizer_without_bos_just_has_none(tokenizer: TextTokenizer) -> None:
    (document,) = documents(changed(tokenizer, bos_id=None), ["a b"])
    assert document.ids == document.labels == [*ids_of(tokenizer, "a b"), EOS]


def test_a_tokenizer_without_eos_is_refused_only_where_it_is_needed(
    tokenizer: TextTokenizer,
) -> None:
    without = changed(tokenizer, eos_id=None)
    with pytest.raises(DataError, match="add_bos_eos_tokens: false, or define eos_token"):
        encoder(without)
    assert documents(without, ["a"], add_bos_eos_tokens=False)


@pytest.mark.parametrize("pre_pend", [None, "Q: "])
@pytest.mark.parametrize("special", [True, False])
def test_only_what_follows_the_first_separator_is_learned(
    tokenizer: TextTokenizer, pre_pend: str | None, special: bool
) -> None:
    texts = ["a b##c##d", "longer question##yes"]
    found = documents(
        tokenizer, texts, separator="##", pre_pend=pre_pend, add_bos_eos_tokens=special
    )
    for text, document in zip(texts, found, strict=True):
        before, _, after = text.partition("##")
        prompt = [BOS] * special + ids_of(tokenizer, (pre_pend or "") + before + "##")
        answer = ids_of(tokenizer, after) + [EOS] * special
        assert document.ids == prompt + answer
        assert document.labels == [IGNORE] * len(prompt) + answer


def test_a_separator_may_stand_in_what_is_put_before(tokenizer: TextTokenizer) -> None:
    (document,) = documents(tokenizer, ["a"], separator="##", pre_pend="Q##")
    assert document.labels[-2:] == [*ids_of(tokenizer, "a"), EOS]


def test_a_row_without_the_separator_is_bad_and_others_keep_their_tokens(
    tokenizer: TextTokenizer,
) -> None:
    (first, last), bad = encode(tokenizer, ["a##b", "none", "c##d"], separator="##")
    assert [(row.where, row.reason) for row in bad] == [("f:2", "separator absent")]
    assert (first.where, last.where) == ("f:1", "f:3")
    assert last.labels[-2:] == [*ids_of(tokenizer, "d"), EOS]


@pytest.mark.parametrize("texts", [[], ["none", "none"]])
def test_a_batch_may_hold_nothing(tokenizer: TextTokenizer, texts: list[str]) -> None:
    found, bad = encode(tokenizer, texts, separator="##")
    assert (found, len(bad)) == ([], len(texts))
