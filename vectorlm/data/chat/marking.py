"""Which tokens hold a learned character. Floor 2; called by `data.chat.encoder`.

The ids are always those of the whole text. Where each token stands is found in the cheapest way
that proves itself on that very text:

- by the tokens' lengths in bytes, for byte-level tokenizers, if they add up to the text's;
- by counting, if the parts between the edges encode to the same ids as the whole;
- else by the offsets that `tokenizers` gives, which is slow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorlm.chat.spans import Span
from vectorlm.data.documents import offsets_of
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.row import Tokens

Learned = NDArray[np.bool_]
Places = NDArray[np.int64]


class Spanned(NamedTuple):
    """A text, and what of it is learned."""

    text: str
    spans: list[Span]


class Marker:
    """Turns texts into ids, and says which of them are learned."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.parts_agree = True

    def mark(self, texts: Sequence[Spanned]) -> list[tuple[Tokens, Learned]]:
        if not texts:
            return []
        ids, offsets = self.tokenizer.encode_flat([one.text for one in texts])
        wholes = [ids[start:end] for start, end in pairwise(offsets.tolist())]
        found = dict(self.by_bytes(texts, wholes))
        for way in (self.by_parts, self.by_offsets):
            left = [at for at in range(len(texts)) if at not in found]
            marked = way([texts[at] for at in left], [wholes[at] for at in left])
            found |= {at: one for at, one in zip(left, marked, strict=True) if one is not None}
        return [found[at] for at in range(len(texts))]

    # --- by lengths ---

    @cached_property
    def token_bytes(self) -> Places | None:
        """How many bytes each id stands for; None where the tokenizer is not byte-level."""
        serialized = self.tokenizer.resolved.serialized
        if serialized is None or not is_byte_level(json.loads(serialized)):
            return None
        backend = self.tokenizer.backend
        # Byte-level tokens are written with one character for every byte.
        lengths = {n: len(one) for one, n in backend.get_vocab(with_added_tokens=False).items()}
        for number, token in backend.get_added_tokens_decoder().items():
            lengths[number] = len(token.content.encode())
        table = np.zeros(max(lengths) + 1, np.int64)
        table[list(lengths)] = list(lengths.values())
        return table

    def by_bytes(
        self, texts: Sequence[Spanned], wholes: Sequence[Tokens]
    ) -> Iterator[tuple[int, tuple[Tokens, Learned]]]:
        if self.token_bytes is None:
            return
        for at, (one, ids) in enumerate(zip(texts, wholes, strict=True)):
            edges = offsets_of(self.token_bytes[ids])
            places = byte_places(one.text)
            if edges[-1] == places[-1]:
                spans = [(int(places[start]), int(places[end])) for start, end in one.spans]
                yield at, (ids, holding(spans, edges[:-1], edges[1:], int(edges[-1])))

    # --- by counting ---

    def by_parts(
        self, texts: Sequence[Spanned], wholes: Sequence[Tokens]
    ) -> list[tuple[Tokens, Learned] | None]:
        if not texts or not self.parts_agree:
            return [None] * len(texts)
        cut = [parts(one) for one in texts]
        ids, offsets = self.tokenizer.encode_flat([text for each in cut for text, _ in each])
        first = offsets_of([len(each) for each in cut]).tolist()
        found: list[tuple[Tokens, Learned] | None] = []
        for at, (each, whole) in enumerate(zip(cut, wholes, strict=True)):
            edges = offsets[first[at] : first[at + 1] + 1]
            same = np.array_equal(ids[edges[0] : edges[-1]], whole)
            flags = np.array([learned for _, learned in each])
            found.append((whole, np.repeat(flags, np.diff(edges))) if same else None)
        # What does not agree for most texts is not worth trying again.
        self.parts_agree = 2 * sum(one is None for one in found) <= len(found)
        return found

    # --- by offsets ---

    def by_offsets(
        self, texts: Sequence[Spanned], wholes: Sequence[Tokens]
    ) -> list[tuple[Tokens, Learned]]:
        if not texts:
            return []
        encoded = self.tokenizer.encode_with_offsets([one.text for one in texts])
        found = []
        for one, (ids, starts, ends) in zip(texts, encoded, strict=True):
            # White space that a tokenizer leaves out of a token's offsets belongs to the next.
            ends = np.maximum.accumulate(np.maximum(starts, ends))
            starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
            found.append((ids, holding(one.spans, starts, ends, len(one.text))))
        return found


def is_byte_level(content: dict[str, Any]) -> bool:
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return content["model"].get("type") == "BPE" and [step.get("type") for step in steps] == [
        "ByteLevel"
    ]


def byte_places(text: str) -> Places:
    """Where each character's bytes begin in UTF-8, and where the last ends."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(np.int64) + (codes > 0xFFFF)
    return offsets_of(widths)


def parts(one: Spanned) -> list[tuple[str, bool]]:
    """The text cut at the edges of its spans, each part with whether it is learned."""
    edges = [0, *chain.from_iterable(one.spans), len(one.text)]
    cuts = enumerate(pairwise(edges))
    return [(one.text[start:end], at % 2 == 1) for at, (start, end) in cuts]


def holding(spans: Sequence[Span], starts: Places, ends: Places, size: int) -> Learned:
    """Which tokens hold a place that is learned, of `size` in all."""
    learned = np.zeros(size, bool)
    for start, end in spans:
        learned[start:end] = True
    before = offsets_of(learned)
    return before[ends] > before[starts]
