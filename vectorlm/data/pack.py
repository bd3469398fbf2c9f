"""Documents become rows: joined, cut, or refused. Floor 2, numpy only; called by
`vectorlm.preprocess`.

A packer is fed one document at a time and hands back the rows that are complete; what it keeps
between two documents is at most one row. Every row obeys the format in docs/decisions.md, section
2: labels are `ignore_index` at the first token of every document or piece of one, because nothing
stands before it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from vectorlm.errors import DataError
from vectorlm.row import Row, Tokens

NOTHING_TO_LEARN = "nothing to learn"
NO_TOKENS = "no tokens"


class Document(NamedTuple):
    """One tokenized document; `where` names it in messages."""

    ids: Tokens
    labels: Tokens
    where: str


class Packer:
    """What all ways of packing share: `add` every document, then `finish`; the counts are read at
    the end."""

    def __init__(self, max_seq_len: int, ignore_index: int) -> None:
        self.max_seq_len = max_seq_len
        self.ignore_index = ignore_index
        self.documents = 0
        self.cut_documents = 0
        self.cut_tokens = 0
        self.skipped: Counter[str] = Counter()

    def add(self, document: Document) -> list[Row]:
        if len(document.ids) == 0:
            self.skipped[NO_TOKENS] += 1
            return []
        return self.pack(document)

    def pack(self, document: Document) -> list[Row]:
        raise NotImplementedError

    def finish(self) -> list[Row]:
        return []

    def single(self, ids: Tokens, labels: Tokens, context: int = 0) -> Row | None:
        """A row of one piece whose first `context` tokens (at least one) are not learned; None if
        none is."""
        labels = labels.copy()
        labels[: max(context, 1)] = self.ignore_index
        if np.all(labels == self.ignore_index):
            self.skipped[NOTHING_TO_LEARN] += 1
            return None
        return Row(ids, labels, np.zeros(1, np.int32))

    def whole(self, ids: Tokens, labels: Tokens) -> list[Row]:
        row = self.single(ids, labels)
        self.documents += row is not None
        return [row] if row else []


class FullPacker(Packer):
    """Joins all documents, in order, and cuts every `max_seq_len` tokens: nothing is lost, the
    last row may be short."""

    def __init__(self, max_seq_len: int, ignore_index: int) -> None:
        super().__init__(max_seq_len, ignore_index)
        # Copied into, never kept as views: a view would hold on to the whole of a long document.
        self.ids = np.empty(max_seq_len, np.int32)
        self.labels = np.empty(max_seq_len, np.int32)
        self.starts: list[int] = []
        self.used = 0

    def pack(self, document: Document) -> list[Row]:
        self.documents += 1
        rows = []
        done = 0
        while done < len(document.ids):
            done += self.put(document.ids[done:], document.labels[done:])
            if self.used == self.max_seq_len:
                rows.append(self.close())
        return rows

    def put(self, ids: Tokens, labels: Tokens) -> int:
        taken = min(self.max_seq_len - self.used, len(ids))
        end = self.used + taken
        self.ids[self.used : end] = ids[:taken]
        self.labels[self.used : end] = labels[:taken]
        self.labels[self.used] = self.ignore_index
        self.starts.append(self.used)
        self.used = end
        return taken

    def close(self) -> Row:
        starts = np.array(self.starts, np.int32)
        row = Row(self.ids[: self.used].copy(), self.labels[: self.used].copy(), starts)
        self.starts, self.used = [], 0
        return row

    def finish(self) -> list[Row]:
        return [self.close()] if self.used else []


class PartialPacker(Packer):
    """Cuts each document by itself; a chunk repeats the last `overlap` tokens of the one before,
    as context."""

    def __init__(self, max_seq_len: int, ignore_index: int, overlap: int) -> None:
        super().__init__(max_seq_len, ignore_index)
        if not 0 <= overlap < max_seq_len:
            raise ValueError(f"overlap {overlap} must be below max_seq_len {max_seq_len}")
        self.overlap = overlap

    def pack(self, document: Document) -> list[Row]:
        rows = [
            row for start in self.starts(len(document.ids)) if (row := self.chunk(document, start))
        ]
        self.documents += bool(rows)
        return rows

    def starts(self, length: int) -> range:
        # A later chunk must hold a token beyond the overlap, else it would only repeat.
        return range(0, max(length - self.overlap, 1), self.max_seq_len - self.overlap)

    def chunk(self, document: Document, start: int) -> Row | None:
        piece = slice(start, start + self.max_seq_len)
        return self.single(
            document.ids[piece], document.labels[piece], self.overlap if start else 0
        )


class TruncatePacker(Packer):
    """Keeps the first `max_seq_len` tokens of each document, and counts what was cut."""

    def pack(self, document: Document) -> list[Row]:
        cut = len(document.ids) - self.max_seq_len
        self.cut_documents += cut > 0
        self.cut_tokens += max(cut, 0)
        return self.whole(document.ids[: self.max_seq_len], document.labels[: self.max_seq_len])


class WholePacker(Packer):
    """A row a document; a longer document is an error, because cutting it is the user's choice to
    make."""

    def pack(self, document: Document) -> list[Row]:
        if len(document.ids) > self.max_seq_len:
            raise DataError(too_long(document, self.max_seq_len))
        return self.whole(document.ids, document.labels)


def too_long(document: Document, max_seq_len: int) -> str:
    return (
        f"{document.where}: the document has {len(document.ids):,} tokens, "
        f"more than train_parameters.max_seq_len ({max_seq_len:,}), "
        "and dataset_preprocess.packing_type is none.\n"
        "Raise max_seq_len, or choose a packing_type: "
        "full (join documents and cut: nothing is lost), "
        "partial (cut each document into chunks), truncate (keep the first tokens of each)."
    )


def make_packer(packing_type: str, max_seq_len: int, ignore_index: int, overlap: int = 0) -> Packer:
    if packing_type == "full":
        return FullPacker(max_seq_len, ignore_index)
    if packing_type == "partial":
        return PartialPacker(max_seq_len, ignore_index, overlap)
    packers = {"truncate": TruncatePacker, "none": WholePacker}
    return packers[packing_type](max_seq_len, ignore_index)
