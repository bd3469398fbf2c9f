"""Tokenizing: ids as transformers gives them, what is learned, and what a tokenizer's hash sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import TEXTS
from vectorlm.data.pack import Document
from vectorlm.data.readers import BadRow, TextRow
from vectorlm.data.tokenize import (
    BATCH_CHARACTERS,
    DocumentEncoder,
    TextTokenizer,
    batches,
    load_tokenizer,
    tokenizer_sha256,
)
from vectorlm.errors import DataError, ModelError

BOS, EOS, IGNORE = 0, 1, -100


def encoder(tokenizer: TextTokenizer, **options: Any) -> DocumentEncoder:
    defaults = {"add_bos_eos_tokens": True, "pre_pend": None, "separator": None}
    return DocumentEncoder(tokenizer, **defaults | options, ignore_index=IGNORE)


def documents(tokenizer: TextTokenizer, texts: list[str], **options: Any) -> list[Document]:
    rows = [TextRow(text, f"f:{n}") for n, text in enumerate(texts, start=1)]
    found = encoder(tokenizer, **options).encode(rows)
    return [item for item in found if isinstance(item, Document)]


def plain(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0].tolist()


def test_ids_are_those_of_transformers(tokenizer: TextTokenizer, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == whole(text, add_special_tokens=False)["input_ids"]


def test_a_slow_tokenizer_gives_the_same_ids(
    tokenizer: TextTokenizer, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tokenizer_folder)
    slow = replace(tokenizer, backend=whole, fast=False)
    for ours, theirs in zip(slow.encode(TEXTS), tokenizer.encode(TEXTS), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_document_stands_between_bos_and_eos(tokenizer: TextTokenizer) -> None:
    for text, document in zip(TEXTS, documents(tokenizer, TEXTS), strict=True):
        assert document.ids.tolist() == [BOS, *plain(tokenizer, text), EOS]
        assert document.labels.tolist() == [IGNORE, *plain(tokenizer, text), EOS]


def test_without_special_tokens_nothing_is_added(tokenizer: TextTokenizer) -> None:
    (document,) = documents(tokenizer, ["a b"], add_bos_eos_tokens=False)
    assert document.ids.tolist() == document.labels.tolist() == plain(tokenizer, "a b")


def test_a_tokenizer_without_bos_just_has_none(tokenizer: TextTokenizer) -> None:
    (document,) = documents(replace(tokenizer, bos_id=None), ["a b"])
    assert document.ids.tolist() == [*plain(tokenizer, "a b"), EOS]


def test_a_tokenizer_without_eos_is_refused_only_where_it_is_needed(
    tokenizer: TextTokenizer,
) -> None:
    without = replace(tokenizer, eos_id=None)
    with pytest.raises(DataError, match="add_bos_eos_tokens: false, or define eos_token"):
        encoder(without)
    assert documents(without, ["a"], add_bos_eos_tokens=False)


@pytest.mark.parametrize("pre_pend", [None, "Q: "])
def test_only_what_follows_the_first_separator_is_learned(
    tokenizer: TextTokenizer, pre_pend: str | None
) -> None:
    (document,) = documents(tokenizer, ["a b##c##d"], separator="##", pre_pend=pre_pend)
    prompt = [BOS, *plain(tokenizer, (pre_pend or "") + "a b##")]
    answer = [*plain(tokenizer, "c##d"), EOS]
    assert document.ids.tolist() == prompt + answer
    assert document.labels.tolist() == [IGNORE] * len(prompt) + answer


def test_a_separator_may_stand_in_what_is_put_before(tokenizer: TextTokenizer) -> None:
    (document,) = documents(tokenizer, ["a"], separator="##", pre_pend="Q##")
    assert document.labels.tolist()[-2:] == [*plain(tokenizer, "a"), EOS]


def test_a_row_without_the_separator_is_bad_and_others_keep_their_tokens(
    tokenizer: TextTokenizer,
) -> None:
    rows = [TextRow("a##b", "f:1"), TextRow("none", "f:2"), TextRow("c##d", "f:3")]
    first, bad, last = encoder(tokenizer, separator="##").encode(rows)
    assert isinstance(bad, BadRow)
    assert (bad.where, bad.reason) == ("f:2", "separator absent")
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert last.labels.tolist()[-2:] == [*plain(tokenizer, "d"), EOS]


def test_batches_keep_order_and_are_bounded() -> None:
    rows = [TextRow("x" * (1 + n * 50_000), str(n)) for n in range(30)]
    groups = list(batches(rows))
    assert [row for group in groups for row in group] == rows
    assert len(groups) > 10
    for group in groups:
        assert sum(len(row.text) for row in group[:-1]) < BATCH_CHARACTERS


# --- loading and hashing ------------------------------------------------------------


Change = Callable[[Path], None]


def edit(name: str, change: Callable[[Any], None]) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def swap_two_words(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


CHANGES: dict[str, Change] = {
    "vocabulary": edit("tokenizer.json", swap_two_words),
    "merges": edit("tokenizer.json", lambda content: content["model"]["merges"].pop()),
    "normalizer": edit("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})),
    "eos": edit("tokenizer_config.json", lambda content: content.update(eos_token="<s>")),
}


@pytest.fixture
def copy(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_hash_sees_every_change_of_contents(
    change: Change, copy: Path, tokenizer: TextTokenizer
) -> None:
    assert load_tokenizer(str(copy)).sha256 == tokenizer.sha256
    change(copy)
    assert load_tokenizer(str(copy)).sha256 != tokenizer.sha256


def test_the_hash_does_not_see_truncation(copy: Path, tokenizer: TextTokenizer) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit("tokenizer.json", lambda content: content.update(truncation=cut))(copy)
    found = load_tokenizer(str(copy))
    assert found.sha256 == tokenizer.sha256
    assert [len(ids) for ids in found.encode(TEXTS)] == [
        len(ids) for ids in tokenizer.encode(TEXTS)
    ]


def test_the_hash_does_not_see_what_a_caller_set(
    tokenizer: TextTokenizer, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tokenizer_folder)
    whole.backend_tokenizer.enable_truncation(4)
    assert tokenizer_sha256(whole) == tokenizer.sha256


class SlowTokenizer:
    """The part of a slow tokenizer that is hashed."""

    is_fast = False
    bos_token_id, eos_token_id = 1, 2
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, model: bytes) -> None:
        self.model = model

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}

    def save_vocabulary(self, folder: str) -> tuple[str]:
        path = Path(folder) / "sentencepiece.model"
        path.write_bytes(self.model)
        return (str(path),)


def test_the_hash_of_a_slow_tokenizer_is_of_its_files() -> None:
    assert tokenizer_sha256(SlowTokenizer(b"x")) == tokenizer_sha256(SlowTokenizer(b"x"))
    assert tokenizer_sha256(SlowTokenizer(b"x")) != tokenizer_sha256(SlowTokenizer(b"y"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("nobody/nothing", "no folder nobody/nothing here, and its tokenizer cannot be had"),
    ],
)
def test_a_missing_model_is_said(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded[\s\S]*needs tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_said(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(copy))
