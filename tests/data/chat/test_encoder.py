"""Tokens and labels of conversations, for byte-level tokenizers and for those like
SentencePiece's: what is learned are the tokens that hold a learned character."""

from __future__ import annotations

import random
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat.models import (
    NAMED,
    SOUND,
    finder,
    model_folder,
    path_of,
    said,
    source,
    system,
    user,
)
from tests.data.conftest import options_of
from vectorlm.chat.formats import Conversation
from vectorlm.chat.problem import RowProblem
from vectorlm.data.chat.detection import RowsAre
from vectorlm.data.chat.encoder import ChatEncoder, make_encoder
from vectorlm.data.documents import Documents
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer
from vectorlm.data.workers import Workers
from vectorlm.errors import DataError
from vectorlm.row_batch import RowBatch, Where

IGNORE = -100
ANSWERS = ["Hello.", " spaced  out ", "Grüße 你好 🙂🙂", "a\n\nb", "12 and 30", "x", "<b>'s"]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return load_tokenizer(str(model_folder(folder, None, request.param == "pieces")))


def encoder_of(
    tokenizer: TextTokenizer, template: str | None, row_format: str = "messages", **options: Any
) -> ChatEncoder:
    if template is not None:
        options["chat_template"] = str(path_of(template))
    rows = RowsAre(row_format, None, "")
    return make_encoder(options_of("-", **options), rows, tokenizer, "nowhere", "jsonl")


def encode(encoder: ChatEncoder, *rows: Any) -> tuple[Documents, list[Any]]:
    batch = RowBatch(list(rows), Where("c.jsonl:", range(1, len(rows) + 1)), [])
    (ready,) = encoder.ready([batch], Workers(1, 300))
    return encoder.encode(ready)


def documents(found: Documents) -> list[tuple[list[int], list[int]]]:
    edges = found.offsets.tolist()
    return [
        (found.ids[start:end].tolist(), found.labels[start:end].tolist())
        for start, end in pairwise(edges)
    ]


def runs(ids: list[int], labels: list[int]) -> list[list[int]]:
    """What is learned, each stretch by itself."""
    pairs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE)
    return [[label for _, label in group] for learned, group in pairs if learned]


@pytest.mark.parametrize("name", SOUND)
def test_tokens_are_those_of_the_whole_and_learned_where_they_hold_a_learned_character(
    name: str, tokenizer: TextTokenizer
) -> None:
    rng = random.Random(3)
    rows = [
        {"messages": [make(rng.choice(ANSWERS)) for _ in range(turns) for make in (user, said)]}
        for turns in (1, 2, 3) * 8
    ]
    found, bad = encode(encoder_of(tokenizer, name), *rows)
    assert not bad
    for row, (ids, labels) in zip(rows, documents(found), strict=True):
        wanted = finder(name).find(
            Conversation(row["messages"], [None] * len(row["messages"]), None)
        )
        learned = {at for start, end in wanted.spans for at in range(start, end)}
        whole = tokenizer.backend.encode(wanted.text, add_special_tokens=False)
        after = [tokenizer.eos_id] if name == "plain" else []
        assert ids == whole.ids + after
        flags = [covers(whole, at) & learned != set() for at in range(len(whole.ids))]
        assert [label != IGNORE for label in labels] == flags + [True] * len(after)
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def covers(whole: Any, at: int) -> set[int]:
    """A token's characters: from where the one before ended, as the tokenizer leaves out blanks."""
    end = whole.offsets[at][1]
    before = max((stop for _, stop in whole.offsets[:at]), default=0)
    return set(range(min(whole.offsets[at][0], before), max(end, whole.offsets[at][0])))


def test_learned_tokens_read_as_the_answers(tokenizer: TextTokenizer) -> None:
    answers = ["Hello.", "Grüße 你好 🙂", "a\n\nb"]
    rows = [{"messages": [user("Hi"), said(one), user("More"), said("Sure.")]} for one in answers]
    found, _ = encode(encoder_of(tokenizer, "llama3"), *rows)
    for answer, (ids, labels) in zip(answers, documents(found), strict=True):
        assert ids.count(tokenizer.bos_id) == 1
        read = [
            tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs(ids, labels)
        ]
        assert [one.strip() for one in read] == [f"{answer}<|eot_id|>", "Sure.<|eot_id|>"]


def test_bad_rows_are_told_in_their_places(tokenizer: TextTokenizer) -> None:
    rows = [
        {"messages": [user("a"), said("b")]},
        {"messages": [user("a")]},
        {"messages": [system("a"), user("a"), said("b")]},
        {"messages": [user("a"), said("\ud800")]},
        {"messages": [user("a"), said("c")]},
    ]
    found, bad = encode(encoder_of(tokenizer, "gemma"), *rows)
    assert len(found.offsets) == 3
    assert [found.where[at] for at in range(2)] == ["c.jsonl:1", "c.jsonl:5"]
    assert [(one.where, one.reason) for one in bad] == [
        ("c.jsonl:2", "nothing to learn"),
        ("c.jsonl:3", "refused by the template"),
        ("c.jsonl:4", "not UTF-8"),
    ]
    nothing, bad = encode(encoder_of(tokenizer, "gemma"), rows[1])
    assert (len(nothing.offsets), len(bad)) == (1, 1)


def test_prompts_and_completions_are_texts(tokenizer: TextTokenizer) -> None:
    row = {"prompt": "How much is 12 plus 30?", "completion": " 42"}
    found, _ = encode(encoder_of(tokenizer, None, "prompt_completion"), row)
    ((ids, labels),) = documents(found)
    text = row["prompt"] + row["completion"]
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert ids == [tokenizer.bos_id, *whole, tokenizer.eos_id]
    (learned,) = runs(ids, labels)
    assert learned[-1] == tokenizer.eos_id
    assert tokenizer.backend.decode(learned[:-1]).strip() == "42"
    bare = encoder_of(tokenizer, None, "prompt_completion", add_bos_eos_tokens=False, learn="all")
    ((ids, labels),) = documents(encode(bare, row)[0])
    assert ids == labels == whole


def test_prompts_and_completions_of_messages(tokenizer: TextTokenizer) -> None:
    row = {"prompt": [user("a"), said("b"), user("c")], "completion": [said("d")]}
    ((ids, labels),) = documents(
        encode(encoder_of(tokenizer, "chatml", "prompt_completion"), row)[0]
    )
    (learned,) = runs(ids, labels)
    assert tokenizer.backend.decode(learned, skip_special_tokens=False).strip() == "d<|im_end|>"


def test_ready_tokens_stay_as_they_are(tokenizer: TextTokenizer) -> None:
    encoder = encoder_of(tokenizer, None, "tokenized")
    far = encoder.ids_end
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [5, far]},
        {"input_ids": [-1]},
        {"input_ids": [5], "labels": [-100]},
        {"input_ids": []},
    ]
    found, bad = encode(encoder, *rows)
    assert documents(found) == [([5, 6, 7], [5, 6, 7]), ([5, 6, 7], [IGNORE, IGNORE, 7])]
    assert [one.reason for one in bad] == ["broken tokens"] * 2 + ["nothing to learn"] * 2
    assert f"input_ids has {far}, and the tokenizer's ids end at {far - 1}" in bad[0].detail


def test_keys_for_texts_are_refused(tokenizer: TextTokenizer) -> None:
    for name in ("pre_pend", "separator"):
        with pytest.raises(DataError, match=f"{name} is only for texts, and the rows are messages"):
            encoder_of(tokenizer, "chatml", **{name: "x"})


def test_a_hopeless_template_is_refused_before_any_row(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="cannot be trained with"):
        encoder_of(tokenizer, "hopeless")


def test_rendering_is_equal_to_transformers_tokens(tmp_path: Path) -> None:
    """The whole walk against `apply_chat_template(tokenize=True)`."""
    from transformers import AutoTokenizer

    folder = model_folder(tmp_path, "qwen3")
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.special_tokens_map.items() >= NAMED.items()
    rows = RowsAre("messages", None, "")
    ours = make_encoder(options_of("-"), rows, load_tokenizer(str(folder)), str(folder), "jsonl")
    messages = [user("Hi"), said("Hello.", "easy"), user("More"), said("Sure.", "hard")]
    ((ids, _),) = documents(encode(ours, {"messages": messages})[0])
    wanted = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == wanted
    assert ours.renderer.finder.template.source == source("qwen3")


def test_contents_are_compared_without_what_is_beside_them(tokenizer: TextTokenizer) -> None:
    encoder = encoder_of(tokenizer, "chatml")
    messages = [user("a"), said("b")]
    one = encoder.content({"messages": messages, "id": 1})
    assert one == encoder.content({"id": 2, "messages": messages})
    assert one != encoder.content({"messages": [user("a"), said("c")]})
    assert encoder.content({"messages": 3}) is None
    with pytest.raises(RowProblem):
        encoder.renderer.parsed({"messages": 3})
