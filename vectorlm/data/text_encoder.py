"""Plain texts become documents: what is put before, around and between, and which part is learned.
Floor 2; called by `vectorlm.preprocess`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vectorlm.data.documents import Documents, Offsets, offsets_of
from vectorlm.data.sources import Source
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.errors import DataError
from vectorlm.row import Tokens
from vectorlm.row_batch import BadRow, Position, RowBatch, Where

if TYPE_CHECKING:
    from vectorlm.data.workers import Workers

NO_SEPARATOR = "separator absent"


class TextEncoder:
    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        add_bos_eos_tokens: bool,
        pre_pend: str | None,
        separator: str | None,
        ignore_index: int,
    ) -> None:
        if add_bos_eos_tokens and tokenizer.eos_id is None:
            raise DataError(
                "dataset_preprocess.add_bos_eos_tokens is true, but the model's tokenizer has no "
                "EOS token.\n"
                "Set add_bos_eos_tokens: false, or define eos_token in the model's "
                "tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.pre_pend = pre_pend or ""
        self.separator = separator
        self.ignore_index = ignore_index
        self.bos_id = tokenizer.bos_id if add_bos_eos_tokens else None
        self.eos_id = tokenizer.eos_id if add_bos_eos_tokens else None

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        return source.texts(start)

    def content(self, text: str) -> str:
        """What two rows have in common when they hold the same."""
        return text

    def ready(self, batches: Iterable[RowBatch], workers: Workers) -> Iterator[RowBatch]:
        return iter(batches)  # texts are all in all the tokenizer's work

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        """One document a row, in order; all texts go to the tokenizer at once."""
        texts: list[str] = batch.values
        if self.pre_pend:
            texts = [self.pre_pend + text for text in texts]
        if self.separator is None:
            return self.finished(*self.tokenizer.encode_flat(texts), None, batch.where), []
        pairs = [self.split(text) for text in texts]
        bad = [self.unseparated(batch.where[at]) for at, pair in enumerate(pairs) if pair is None]
        good = [at for at, pair in enumerate(pairs) if pair is not None]
        parts = list(chain.from_iterable(pair for pair in pairs if pair is not None))
        ids, offsets = self.tokenizer.encode_flat(parts)
        prompts = offsets[1::2] - offsets[:-1:2]
        return self.finished(ids, offsets[::2], prompts, batch.where.take(good)), bad

    def split(self, text: str) -> tuple[str, str] | None:
        """What is not learned and what is; None where the separator is absent."""
        assert self.separator is not None
        end = text.find(self.separator)
        if end < 0:
            return None
        end += len(self.separator)
        return text[:end], text[end:]

    def unseparated(self, where: str) -> BadRow:
        return BadRow(where, NO_SEPARATOR, f"the separator {self.separator!r} is not in the text")

    def finished(
        self, ids: Tokens, offsets: Offsets, prompts: NDArray[np.int64] | None, where: Where
    ) -> Documents:
        """With BOS and EOS, and labels; `prompts` are the lengths that are not learned."""
        ids, offsets = wrapped(ids, offsets, self.bos_id, self.eos_id)
        labels = ids.copy()
        if self.bos_id is not None:
            labels[offsets[:-1]] = self.ignore_index
        if prompts is not None:
            unlearned = prompts + (self.bos_id is not None)
            lengths = np.stack([unlearned, np.diff(offsets) - unlearned], axis=1).ravel()
            flags = np.tile([True, False], len(prompts))
            labels[np.repeat(flags, lengths)] = self.ignore_index
        return Documents(ids, labels, offsets, where)


def wrapped(
    ids: Tokens, offsets: Offsets, bos_id: int | None, eos_id: int | None
) -> tuple[Tokens, Offsets]:
    """Each document between BOS and EOS."""
    added = (bos_id is not None) + (eos_id is not None)
    if not added:
        return ids, offsets
    longer = offsets_of(np.diff(offsets) + added)
    out = np.empty(longer[-1], np.int32)
    kept = np.ones(longer[-1], bool)
    for places, token in ((longer[:-1], bos_id), (longer[1:] - 1, eos_id)):
        if token is not None:
            out[places] = token
            kept[places] = False
    out[kept] = ids
    return out, longer
