"""Three ways to find the tokens that hold a learned character; where each can be taken, they
agree."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chat.models import conversation, finder, model_folder, said, user
from vectorlm.data.chat.marking import (
    Marked,
    Marker,
    Spanned,
    byte_places,
    holding,
    is_byte_level,
    parts,
)
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer

WORDS = ["Hello.", " spaced  out ", "Grüße 你好 🙂🙂", "a\n\nb", "12", "\n\n", "<b>'s", "\t x"]
BOTH = ["bytes", "pieces"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in BOTH}
    for kind, folder in folders.items():
        model_folder(folder, None, pieces=kind == "pieces")
    return {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}


def texts(template: str) -> list[Spanned]:
    rng = random.Random(1)
    one = finder(template)
    found = []
    for turns in (1, 2, 3) * 20:
        words = ["x" + "".join(rng.choices(WORDS, k=3)) for _ in range(2 * turns)]
        messages = [make(w) for make, w in zip((user, said) * turns, words, strict=True)]
        rendered = one.find(conversation(*messages))
        found.append(Spanned(rendered.text, rendered.spans))
    return found


def each(found: Marked) -> list[tuple[Any, Any]]:
    edges = pairwise(found.offsets.tolist())
    return [(found.ids[start:end], found.learned[start:end]) for start, end in edges]


def by_bytes_of(marker: Marker, given: list[Spanned]) -> dict[int, tuple[Any, Any]]:
    """Those that are sure."""
    ids, offsets = marker.tokenizer.encode_flat([one.text for one in given])
    learned, sure = marker.by_bytes(given, ids, offsets)
    found = each(Marked(ids, learned, offsets))
    return {at: one for at, one in enumerate(found) if sure[at]}


def whole(marker: Marker, given: list[Spanned]) -> list[Any]:
    ids, offsets = marker.tokenizer.encode_flat([one.text for one in given])
    return [ids[start:end] for start, end in pairwise(offsets.tolist())]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2", "plain", "qwen3"])
def test_the_ways_agree(kind: str, template: str, tokenizers: dict[str, TextTokenizer]) -> None:
    marker = Marker(tokenizers[kind])
    given = texts(template)
    wholes = whole(marker, given)
    wanted = marker.by_offsets(given, wholes)
    assert all(learned.any() for _, learned in wanted)
    by_bytes = by_bytes_of(marker, given)
    assert len(by_bytes) == (len(given) if kind == "bytes" else 0)
    by_parts = dict(enumerate(marker.by_parts(given, wholes)))
    for found in (by_bytes, {at: one for at, one in by_parts.items() if one is not None}):
        for at, (ids, learned) in found.items():
            assert np.array_equal(ids, wanted[at][0])
            assert np.array_equal(learned, wanted[at][1])
    for (ids, learned), other in zip(each(marker.mark(given)), wanted, strict=True):
        assert np.array_equal(ids, other[0])
        assert np.array_equal(learned, other[1])


def test_parts_are_not_tried_again_where_they_do_not_agree(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    marker = Marker(tokenizers["pieces"])
    marker.mark(texts("llama2"))
    assert marker.parts_agree
    marker.mark(texts("plain"))
    assert not marker.parts_agree
    given = texts("llama2")
    assert marker.by_parts(given, whole(marker, given)) == [None] * len(given)


def test_lengths_that_do_not_add_up_are_not_believed(tmp_path: Path) -> None:
    """A tokenizer that drops something; what tells is the sum."""
    folder = model_folder(tmp_path, None)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "xx"}, "content": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    marker = Marker(load_tokenizer(str(folder)))
    given = [Spanned("a axx b", [(4, 7)]), Spanned("a ax b", [(4, 6)])]
    assert list(by_bytes_of(marker, given)) == [1]
    (first, learned), (_, other) = each(marker.mark(given))
    assert marker.tokenizer.backend.decode(first[learned].tolist()).endswith(" b")
    assert other.tolist() == by_bytes_of(marker, given)[1][1].tolist()


def test_which_are_byte_level(tokenizers: dict[str, TextTokenizer]) -> None:
    kinds = [json.loads(str(tokenizers[kind].resolved.serialized)) for kind in BOTH]
    assert [is_byte_level(content) for content in kinds] == [True, False]
    assert not is_byte_level(kinds[0] | {"decoder": None})


@pytest.mark.parametrize("text", ["", "abc", "aé你🙂b", "\U0010ffff\u07ff\u0800\x7f\x80"])
def test_places_of_bytes(text: str) -> None:
    edges = list(range(0, len(text) // 2 * 2, 1))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    wanted = [len(text[:at].encode()) for at in (*edges, len(text))]
    assert byte_places(Spanned(text, spans)) == wanted
    assert byte_places(Spanned(text, [(0, 0)])) == wanted[-1:]


def test_tokens_at_the_edges_of_texts_and_without_bytes(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    marker = Marker(tokenizers["bytes"])
    assert marker.token_bytes is not None
    a, b, nothing = (int(marker.tokenizer.encode_flat([text])[0][0]) for text in ("a", "b", "c"))
    marker.token_bytes[nothing] = 0
    ids = np.array([a, nothing, b, a, b, nothing, a], np.int32)
    given = [Spanned("ab", [(0, 2)]), Spanned("ab", [(1, 2)]), Spanned("a", []), Spanned("", [])]
    learned, sure = marker.by_bytes(given, ids, np.array([0, 3, 5, 7, 7]))
    assert learned.tolist() == [True, False, True, False, True, False, False]
    assert sure == [True] * 4


def test_parts_are_the_text() -> None:
    assert parts(Spanned("abcdef", [(1, 2), (4, 6)])) == [
        ("a", False),
        ("b", True),
        ("cd", False),
        ("ef", True),
        ("", False),
    ]


def test_a_token_with_a_single_learned_character_is_learned() -> None:
    edges = np.array([0, 3, 3, 5, 9])
    assert holding([(4, 6)], edges[:-1], edges[1:], 9).tolist() == [False, False, True, True]
    assert holding([], edges[:-1], edges[1:], 9).tolist() == [False] * 4
