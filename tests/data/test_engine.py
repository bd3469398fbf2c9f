"""The engine: fastokens only where it gives the ids of `tokenizers`, and what is said otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import fastokens
import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.data.conftest import TEXTS
from tests.tiny import SENTENCES
from vectorlm.data import engine
from vectorlm.data.engine import Engine, choose, encode_plain, make_sample

SPECIAL = ["<s>", "</s>", "<|im_start|>"]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer, initial_alphabet=alphabet)


def like_llama_2() -> Tokenizer:
    """As converted from SentencePiece: a mark for spaces, and bytes for what is unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bytes_known = ["<unk>", *SPECIAL, *(f"<0x{n:02X}>" for n in range(256))]
    return trained(made, trainers.BpeTrainer, special_tokens=bytes_known)


def like_qwen() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("lazy", single_word=True)])
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(made, trainers.UnigramTrainer, unk_token="<unk>", special_tokens=["<unk>"])


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer, special_tokens=["[UNK]", "[CLS]"])


def trained(made: Tokenizer, trainer: Any, **options: Any) -> Tokenizer:
    options = {"special_tokens": SPECIAL, "vocab_size": 500, "show_progress": False} | options
    made.train_from_iterator(SENTENCES * 4, trainer(**options))
    return made


def chosen(made: Tokenizer, texts: list[str]) -> Engine:
    return choose(made.to_str(), lambda: made, texts)


@pytest.mark.parametrize("make", [byte_level, like_llama_2, like_qwen, unigram, word_piece])
def test_whatever_is_chosen_gives_the_same_ids(make: Callable[[], Tokenizer]) -> None:
    made = make()
    found = chosen(made, TEXTS)
    assert found.name in ("fastokens", "tokenizers")
    assert found.reason
    hard = make_sample(TEXTS * 3, SPECIAL)
    ids, offsets = found.encode(hard)
    expected = [e.ids for e in made.encode_batch(hard, add_special_tokens=False)]
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == expected


@pytest.mark.parametrize("make", [byte_level, like_llama_2])
def test_the_common_kinds_are_encoded_by_fastokens(make: Callable[[], Tokenizer]) -> None:
    found = chosen(make(), TEXTS)
    assert found.name == "fastokens"
    assert found.reason.startswith("ids equal to those of tokenizers on a sample of ")


def test_fastokens_that_differs_in_one_text_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    true = engine.encode_fast

    def wrong(fast: Any, texts: list[str]) -> engine.Flat:
        ids, offsets = true(fast, texts)
        ids = ids.copy()
        if TEXTS[2] in texts:
            ids[offsets[texts.index(TEXTS[2])]] += 1
        return ids, offsets

    monkeypatch.setattr(engine, "encode_fast", wrong)
    found = chosen(byte_level(), TEXTS)
    assert found.name == "tokenizers"
    assert found.reason == f"fastokens gives other ids for {TEXTS[2][:40]!r}"
    assert chosen(byte_level(), TEXTS[:2]).name == "fastokens"


def test_what_fastokens_cannot_load_is_left_to_tokenizers() -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    found = chosen(made, ["a"])
    assert found.name == "tokenizers"
    assert found.reason.startswith("fastokens ")
    assert found.encode(["a", "b"])[0].tolist() == [0, 1]


def test_without_fastokens_there_is_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert chosen(byte_level(), TEXTS).reason.startswith("fastokens cannot be imported")


def test_a_text_that_fastokens_fails_on_is_left_to_tokenizers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = engine.encode_fast

    def fail(fast: Any, texts: list[str]) -> engine.Flat:
        if any("hard" in text for text in texts):
            raise RuntimeError("match limit exceeded")
        return true(fast, texts)

    monkeypatch.setattr(engine, "encode_fast", fail)
    found = chosen(byte_level(), ["hard"])
    reason = "fastokens fails on a sample: match limit exceeded"
    assert (found.name, found.reason) == ("tokenizers", reason)
    later = chosen(byte_level(), TEXTS)
    assert later.name == "fastokens"
    assert later.encode(["hard"])[0].tolist() == byte_level().encode("hard").ids


def test_the_sample_is_from_all_over_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SAMPLE_CHARACTERS", 1000)
    monkeypatch.setattr(engine, "LONGEST_SAMPLE", 50)
    texts = [f"{n:>20}" + "x" * (n % 100) for n in range(1000)]
    own = make_sample(texts, [])[: -len(engine.NASTY) - 1]
    numbers = [int(text[:20]) for text in own]
    assert sum(map(len, own)) < 1100
    assert numbers[0] == 0
    assert numbers[-1] > 800
    assert make_sample([], ["<a>"])[-2:] == [" <a> \n<a>", "<a>"]


def test_plain_ids_are_flat() -> None:
    made = byte_level()
    ids, offsets = encode_plain(made, ["a", "", "a b"])
    assert offsets[1] == offsets[2]
    assert len(ids) == offsets[3]
    assert json.loads(made.to_str())["model"]["type"] == "BPE"
    assert fastokens.Tokenizer.from_json_str(made.to_str())
