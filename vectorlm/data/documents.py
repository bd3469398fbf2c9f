"""What walks through preprocessing after rows are read: documents as tokens, rows as written. Floor
2, numpy only; shared by the encoders, the packers and the writer in `vectorlm.data`.

Tokens lie flat, many documents or rows in one array with offsets, so that nothing costs a Python
object a token. Legend: T tokens, D documents, R rows, B boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vectorlm.row import Row, Tokens
from vectorlm.row_batch import BadRow, Position, RowBatch, Where

if TYPE_CHECKING:
    from vectorlm.data.sources import Source
    from vectorlm.data.tokenize import TextTokenizer
    from vectorlm.data.workers import Workers

Offsets = NDArray[np.int64]

TOO_LONG = "longer than max_seq_len"


class Documents(NamedTuple):
    """`labels` are `ignore_index` where nothing is learned."""

    ids: Tokens  # [T]
    labels: Tokens  # [T]
    offsets: Offsets  # [D + 1]
    where: Where  # D names


class Encoder(Protocol):
    """What makes documents of rows; a format of rows has one."""

    tokenizer: TextTokenizer

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        """What it needs of the source: texts, or records."""

    def ready(self, batches: Iterable[RowBatch], workers: Workers) -> Iterator[RowBatch]:
        """The same batches as `encode` takes them, after what is slow in Python."""

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        """The documents of a batch, in order, and the rows that make none."""


class RowEncoder(Encoder, Protocol):
    """One that knows what a row says, apart from where it stands."""

    def content(self, value: Any) -> str | None:
        """Equal for rows that say the same; None where a row is bad."""


def without_longer(documents: Documents, limit: int) -> tuple[Documents, list[BadRow]]:
    """The documents of at most so many tokens, and the others."""
    lengths = np.diff(documents.offsets)
    kept = np.flatnonzero(lengths <= limit)
    if len(kept) == len(lengths):
        return documents, []
    bad = [
        BadRow(documents.where[at], TOO_LONG, f"{lengths[at]} tokens; max_seq_len is {limit}")
        for at in np.flatnonzero(lengths > limit).tolist()
    ]
    tokens = np.repeat(lengths <= limit, lengths)
    return Documents(
        documents.ids[tokens],
        documents.labels[tokens],
        offsets_of(lengths[kept]),
        documents.where.take(kept),
    ), bad


class RowBlock(NamedTuple):
    """Complete rows; `boundaries` count from the start of their row."""

    ids: Tokens  # [T]
    labels: Tokens  # [T]
    offsets: Offsets  # [R + 1]
    boundaries: Tokens  # [B]
    boundary_offsets: Offsets  # [R + 1]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Row:
        tokens = slice(*self.offsets[index : index + 2])
        starts = slice(*self.boundary_offsets[index : index + 2])
        return Row(self.ids[tokens], self.labels[tokens], self.boundaries[starts])


def offsets_of(lengths: Sequence[int] | NDArray[Any]) -> Offsets:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def block_of(rows: Iterable[Row]) -> RowBlock:
    rows = list(rows)
    return RowBlock(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.labels for row in rows]),
        offsets_of([len(row.input_ids) for row in rows]),
        np.concatenate([row.boundaries for row in rows]),
        offsets_of([len(row.boundaries) for row in rows]),
    )


def joined(blocks: Sequence[RowBlock]) -> RowBlock:
    """One block of all their rows, in order."""
    if len(blocks) == 1:
        return blocks[0]
    return RowBlock(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.labels for block in blocks]),
        joined_offsets([block.offsets for block in blocks]),
        np.concatenate([block.boundaries for block in blocks]),
        joined_offsets([block.boundary_offsets for block in blocks]),
    )


def joined_offsets(parts: Sequence[Offsets]) -> Offsets:
    return offsets_of(np.concatenate([np.diff(part) for part in parts]))
