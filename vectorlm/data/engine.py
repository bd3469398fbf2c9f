"""Which library turns texts into ids: fastokens where it gives the same ids as `tokenizers` on the
user's own texts, else `tokenizers`. Floor 2; called by `data.tokenize`.

`tokenizers` is the measure: its ids are what transformers gives. fastokens encodes byte-level and
SentencePiece-like BPE many times faster; it has to prove itself on the first texts of each run, and
on later ones now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vectorlm.data.documents import Offsets, offsets_of
from vectorlm.row import Tokens

FAST, PLAIN, SLOW = "fastokens", "tokenizers", "transformers"
Flat = tuple[Tokens, Offsets]
Encode = Callable[[list[str]], Flat]

SAMPLE_CHARACTERS = 1 << 17
LONGEST_SAMPLE = 1 << 14
# What has made tokenizers differ: white space in runs and at ends, marks that join, scripts without
# spaces, contractions, digits, controls, and lengths at which implementations change their method.
NASTY = (
    "",
    " ",
    "\n",
    "\r\n \t\t  \n\n\n",
    "  two  spaces   three    four     ",
    " leading",
    "trailing ",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u2028\u2029\x85\x0b\x0c",
    "It's we're I'LL THEY'VE don't'd ''s",
    "1 12 123 1234 12345 3.14159 1,000,000 ٣٤ ² ½ ⅷ 一二三",
    "naïve nai\u0308ve Å A\u030a \u1e9b\u0323 ﬁ ﬀ Ⅻ ㎏ Straße İstanbul ΌΣΟΣ",
    "你好\uff0c世界。こんにちは カタカナ 한국어 ไทยไม่มีช่องว่าง हिन्दी العربية עברית",
    "🙂🙃 👩‍👩‍👧‍👦 🇨🇦 👍🏽 \U0001f9ff\U00020000\U0010ffff \ue000 \ufffd",
    "\x00\x01\x1f\x7f\x80 \u0301\u0301a",
    "▁ ▁▁ Ġ Ċ <0x0A> <unk> [UNK]",
    "https://example.org/a?b=c&d=%20#e foo_bar FooBar fooBAR __init__ a.b.c();{}[]<>//**",
    "a" * 5000,
    " " * 5000,
    "\n" * 700,
    "ab " * 3000,
    "é" * 3000,
    "好" * 3000,
    "=-" * 2500,
)


class Engine(NamedTuple):
    """`fast` is what has to prove itself again, if anything."""

    name: str
    reason: str
    encode: Encode
    fast: Any = None


class IdsDiffer(Exception):
    """What was encoded so far may be wrong; the tokenizer has changed to the sure way since."""


def choose(serialized: str, backend: Callable[[], Any], texts: list[str]) -> Engine:
    """`backend` gives the one of `tokenizers` that `serialized` describes; `texts` are the first of
    those to be encoded."""
    slow = Engine(PLAIN, "", lambda texts: encode_plain(backend(), texts))
    if backend().encode_special_tokens:
        return slow._replace(reason="the tokenizer splits special tokens")
    try:
        import fastokens
    except ImportError as error:
        return slow._replace(reason=f"fastokens cannot be imported: {error}")
    try:
        fast = fastokens.Tokenizer.from_json_str(serialized)
    except Exception as error:  # whatever its parser meets
        return slow._replace(reason=f"fastokens cannot load it: {first_line(error)}")
    sample = make_sample(texts, special_tokens(backend()))
    doubt = disagreement(fast, backend(), sample)
    if doubt:
        return slow._replace(reason=doubt)
    size = sum(map(len, sample))
    reason = f"ids equal to those of tokenizers on a sample of {size:,} characters"
    return Engine(FAST, reason, lambda texts: encode_surely(fast, backend, texts), fast)


def disagreement(fast: Any, plain: Any, sample: list[str]) -> str | None:
    """Why fastokens is not to be taken."""
    try:
        found = encode_fast(fast, sample)
    except Exception as error:  # its regular expressions have limits
        return f"fastokens fails on a sample: {first_line(error)}"
    difference = first_difference(found, encode_plain(plain, sample))
    return (
        None if difference is None else f"fastokens gives other ids for {sample[difference][:40]!r}"
    )


def special_tokens(plain: Any) -> list[str]:
    return [str(token) for token in plain.get_added_tokens_decoder().values()]


def make_sample(texts: list[str], special: list[str]) -> list[str]:
    """The user's texts, from all over the batch; nasty ones; and special tokens inside of texts."""
    own: list[str] = []
    size = 0
    step = max(len(texts) * min(LONGEST_SAMPLE, average(texts)) // SAMPLE_CHARACTERS, 1)
    for text in texts[::step]:
        if size >= SAMPLE_CHARACTERS:
            break
        own.append(text[:LONGEST_SAMPLE])
        size += len(own[-1])
    inside = [
        form for token in special[:64] for form in (token, f"a{token}b", f" {token} \n{token}")
    ]
    return own + list(NASTY) + inside + ["".join(special[:64])]


def average(texts: list[str]) -> int:
    return sum(map(len, texts)) // max(len(texts), 1)


def first_difference(found: Flat, wanted: Flat) -> int | None:
    """The number of the first text that was encoded differently."""
    if np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1]):
        return None
    for at in range(len(wanted[1]) - 1):
        ours, theirs = (ids[offsets[at] : offsets[at + 1]] for ids, offsets in (found, wanted))
        if not np.array_equal(ours, theirs):
            return at
    return 0


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# --- encoding -----------------------------------------------------------------------


def encode_surely(fast: Any, backend: Callable[[], Any], texts: list[str]) -> Flat:
    try:
        return encode_fast(fast, texts)
    except Exception:  # its regular expressions have limits
        return encode_plain(backend(), texts)


def encode_fast(fast: Any, texts: list[str]) -> Flat:
    ids, offsets = fast.encode_batch_flat(texts)
    return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)


def encode_plain(plain: Any, texts: list[str]) -> Flat:
    found = plain.encode_batch_fast(texts, add_special_tokens=False)
    return flat([np.array(encoding.ids, np.int32) for encoding in found])


def encode_slow(tokenizer: Any, texts: list[str]) -> Flat:
    if not texts:
        return flat([])
    found = tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )
    return flat([np.array(ids, np.int32) for ids in found["input_ids"]])


def flat(parts: list[Tokens]) -> Flat:
    offsets = offsets_of([len(part) for part in parts])
    return np.concatenate([np.empty(0, np.int32), *parts]), offsets
