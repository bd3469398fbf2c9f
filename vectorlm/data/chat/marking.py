"""Which tokens hold a learned character. Floor 2; called by `data.chat.encoder`.

The ids are always those of the whole text. Where each token stands is found in the cheapest way
that proves itself on that very text:

- by the tokens' lengths in bytes, for byte-level tokenizers, if they add up to the text's;
- by counting, if the parts between the edges encode to the same ids as the whole;
- else by the offsets that `tokenizers` gives, which is slow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorlm.chat.shapes import Span
from vectorlm.data.documents import Offsets, offsets_of
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.row import Tokens

Learned = NDArray[np.bool_]
Places = NDArray[np.int64]


class Spanned(NamedTuple):
    """A text, and what of it is learned."""

    text: str
    spans: list[Span]


class Marked(NamedTuple):
    """Texts end to end."""

    ids: Tokens  # [T]
    learned: Learned  # [T]
    offsets: Offsets  # [D + 1]


class Marker:
    """Turns texts into ids, and says which of them are learned."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.parts_agree = True

    def mark(self, texts: Sequence[Spanned]) -> Marked:
        ids, offsets = self.tokenizer.encode_flat([one.text for one in texts])
        learned, sure = self.by_bytes(texts, ids, offsets)
        if all(sure):
            return Marked(ids, learned, offsets)
        edges = list(pairwise(offsets.tolist()))
        found = {
            at: (ids[start:end], learned[start:end])
            for at, (start, end) in enumerate(edges)
            if sure[at]
        }
        wholes = [ids[start:end] for start, end in edges]
        for way in (self.by_parts, self.by_offsets):
            left = [at for at in range(len(texts)) if at not in found]
            marked = way([texts[at] for at in left], [wholes[at] for at in left])
            found |= {at: one for at, one in zip(left, marked, strict=True) if one is not None}
        return end_to_end([found[at] for at in range(len(texts))])

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
        self, texts: Sequence[Spanned], ids: Tokens, offsets: Offsets
    ) -> tuple[Learned, list[bool]]:
        """Of all tokens, and for which texts that is sure."""
        if self.token_bytes is None:
            return np.zeros(len(ids), bool), [False] * len(texts)
        lengths = self.token_bytes[ids]
        edges = offsets_of(lengths)
        starts = edges[offsets].tolist()
        sure, spans = [], []
        for one, (start, end) in zip(texts, pairwise(starts), strict=True):
            *places, size = byte_places(one)
            sure.append(end - start == size)
            if sure[-1]:
                spans += [start + place for place in places]
        inside = np.zeros(len(ids) + 1, np.int64)
        np.add.at(inside, np.searchsorted(edges, spans[::2], "right") - 1, 1)
        np.add.at(inside, np.searchsorted(edges, spans[1::2], "left"), -1)
        return (np.cumsum(inside[:-1]) > 0) & (lengths > 0), sure

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


def byte_places(one: Spanned) -> list[int]:
    """The edges of its spans, and where it ends, counted in bytes of UTF-8."""
    edges = [*chain.from_iterable(span for span in one.spans if span[0] < span[1]), len(one.text)]
    if one.text.isascii():
        return edges
    parts = pairwise([0, *edges])
    return list(accumulate(len(one.text[start:end].encode()) for start, end in parts))


def end_to_end(found: Sequence[tuple[Tokens, Learned]]) -> Marked:
    return Marked(
        np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in found)]),
        np.concatenate([np.empty(0, bool), *(learned for _, learned in found)]),
        offsets_of([len(ids) for ids, _ in found]),
    )


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
