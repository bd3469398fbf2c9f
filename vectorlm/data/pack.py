"""Documents become rows: joined, cut, or refused. Floor 2, numpy only; called by
`vectorlm.preprocess`.

A packer is fed many documents at a time and hands back blocks of complete rows. Every row obeys the
format in docs/decisions.md, section 2: labels are `ignore_index` at the first token of every
document or piece of one, because nothing stands before it. `best_fit` is in `data.best_fit`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vectorlm.data.documents import Documents, Offsets, RowBlock, offsets_of
from vectorlm.errors import DataError
from vectorlm.row import Tokens
from vectorlm.row_batch import Where

NOTHING_TO_LEARN = "nothing to learn"
NO_TOKENS = "no tokens"

State = dict[str, Any]  # JSON and numpy arrays


class Packer:
    """What all ways of packing share: `add` all documents, then `finish`; the counts are read at
    the end, and `state` is what an interrupted run goes on from."""

    def __init__(self, max_seq_len: int, ignore_index: int) -> None:
        self.max_seq_len = max_seq_len
        self.ignore_index = ignore_index
        self.documents = 0
        self.cut_documents = 0
        self.cut_tokens = 0
        self.skipped: Counter[str] = Counter()

    def add(self, documents: Documents) -> Iterable[RowBlock]:
        """Rows that are complete now; to be taken before more is added."""
        there = np.flatnonzero(np.diff(documents.offsets))
        empty = len(documents.offsets) - 1 - len(there)
        if empty:
            self.skipped[NO_TOKENS] += empty
        if not len(there):
            return []
        starts, stops = documents.offsets[:-1], documents.offsets[1:]
        if empty:
            starts, stops = starts[there], stops[there]
        return self.pack(documents, starts, stops, there)

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> Iterable[RowBlock]:
        """`starts` and `stops` are those of the documents that hold tokens, `numbers` which."""
        raise NotImplementedError

    def finish(self) -> Iterable[RowBlock]:
        return []

    def state(self) -> State:
        counts = (self.documents, self.cut_documents, self.cut_tokens)
        return {"counts": list(counts), "skipped": dict(self.skipped)}

    def load_state(self, state: State) -> None:
        self.documents, self.cut_documents, self.cut_tokens = state["counts"]
        self.skipped = Counter(state["skipped"])


class FullPacker(Packer):
    """Joins all documents, in order, and cuts every `max_seq_len` tokens: nothing is lost, the
    last row may be short."""

    def __init__(self, max_seq_len: int, ignore_index: int) -> None:
        super().__init__(max_seq_len, ignore_index)
        # Copied into, never kept as views: a view would hold on to the whole of a batch.
        self.ids = self.labels = np.empty(0, np.int32)
        self.starts = np.empty(0, np.int64)

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> list[RowBlock]:
        self.documents += len(starts)
        first_row, last_row = (
            (at + len(self.ids)) // self.max_seq_len for at in (starts, stops - 1)
        )
        self.cut_documents += int(np.count_nonzero(first_row != last_row))
        starts = np.concatenate([self.starts, starts + len(self.ids)])
        ids = np.concatenate([self.ids, documents.ids])
        labels = np.concatenate([self.labels, documents.labels])
        end = len(ids) // self.max_seq_len * self.max_seq_len
        inside = int(np.searchsorted(starts, end))
        self.ids, self.labels = ids[end:].copy(), labels[end:].copy()
        self.starts = starts[inside:] - end
        return [self.block(ids[:end], labels[:end], starts[:inside])] if end else []

    def block(self, ids: Tokens, labels: Tokens, starts: Offsets) -> RowBlock:
        rows = np.arange(0, len(ids), self.max_seq_len)
        boundaries = np.union1d(starts, rows)
        labels[boundaries] = self.ignore_index
        return RowBlock(
            ids,
            labels,
            np.append(rows, len(ids)),
            (boundaries % self.max_seq_len).astype(np.int32),
            np.append(np.searchsorted(boundaries, rows), len(boundaries)),
        )

    def finish(self) -> list[RowBlock]:
        return [self.block(self.ids, self.labels, self.starts)] if len(self.ids) else []

    def state(self) -> State:
        return super().state() | {"ids": self.ids, "labels": self.labels, "starts": self.starts}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.ids, self.labels, self.starts = state["ids"], state["labels"], state["starts"]


class SpanPacker(Packer):
    """What packings share whose rows are single pieces of documents."""

    def single(
        self, documents: Documents, starts: Offsets, stops: Offsets, context: int | Offsets = 1
    ) -> tuple[list[RowBlock], NDArray[np.bool_]]:
        """Rows of one piece each, whose first `context` tokens (at least one) are not learned;
        where none is, there is no row. With which pieces were kept."""
        labels = take_spans(documents.labels, starts, stops).copy()
        offsets = offsets_of(stops - starts)
        forget(labels, offsets[:-1], np.minimum(offsets[:-1] + context, offsets[1:]), self)
        kept = np.logical_or.reduceat(labels != self.ignore_index, offsets[:-1])
        if not kept.all():
            self.skipped[NOTHING_TO_LEARN] += int(len(kept) - kept.sum())
            labels = take_spans(labels, offsets[:-1][kept], offsets[1:][kept])
            starts, stops = starts[kept], stops[kept]
        if not len(starts):
            return [], kept
        ids, count = take_spans(documents.ids, starts, stops), len(starts)
        boundaries = np.zeros(count, np.int32)
        offsets = offsets_of(stops - starts)
        return [RowBlock(ids, labels, offsets, boundaries, np.arange(count + 1))], kept


def forget(labels: Tokens, starts: Offsets, stops: Offsets, packer: Packer) -> None:
    lengths = stops - starts
    first = np.repeat(starts - offsets_of(lengths)[:-1], lengths)
    labels[first + np.arange(len(first))] = packer.ignore_index


class PartialPacker(SpanPacker):
    """Cuts each document by itself; a chunk repeats the last `overlap` tokens of the one before,
    as context."""

    def __init__(self, max_seq_len: int, ignore_index: int, overlap: int) -> None:
        super().__init__(max_seq_len, ignore_index)
        if not 0 <= overlap < max_seq_len:
            raise ValueError(f"overlap {overlap} must be below max_seq_len {max_seq_len}")
        self.overlap = overlap

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> list[RowBlock]:
        # A later chunk must hold a token beyond the overlap, else it would only repeat.
        step = self.max_seq_len - self.overlap
        chunks = -(-np.maximum(stops - starts - self.overlap, 1) // step)
        self.cut_documents += int(np.count_nonzero(chunks > 1))
        firsts = offsets_of(chunks)[:-1]
        document = np.repeat(np.arange(len(starts)), chunks)
        number = np.arange(len(document)) - firsts[document]
        chunk_starts = starts[document] + number * step
        chunk_stops = np.minimum(chunk_starts + self.max_seq_len, stops[document])
        context = np.where(number == 0, 1, max(self.overlap, 1))
        rows, kept = self.single(documents, chunk_starts, chunk_stops, context)
        self.documents += int(np.logical_or.reduceat(kept, firsts).sum())
        return rows


class TruncatePacker(SpanPacker):
    """Keeps the first `max_seq_len` tokens of each document, and counts what was cut."""

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> list[RowBlock]:
        cut = np.maximum(stops - starts - self.max_seq_len, 0)
        self.cut_documents += int(np.count_nonzero(cut))
        self.cut_tokens += int(cut.sum())
        rows, kept = self.single(documents, starts, stops - cut)
        self.documents += int(kept.sum())
        return rows


class WholePacker(SpanPacker):
    """A row a document; a longer document is an error, because cutting it is the user's choice to
    make."""

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> list[RowBlock]:
        long = np.flatnonzero(stops - starts > self.max_seq_len)
        if len(long):
            first = int(long[0])
            length = int(stops[first] - starts[first])
            raise DataError(too_long(documents.where, int(numbers[first]), length, self))
        rows, kept = self.single(documents, starts, stops)
        self.documents += int(kept.sum())
        return rows


def too_long(where: Where, number: int, length: int, packer: Packer) -> str:
    return (
        f"{where[number]}: the document has {length:,} tokens, "
        f"more than train_parameters.max_seq_len ({packer.max_seq_len:,}), "
        "and dataset_preprocess.packing_type is none.\n"
        "Raise max_seq_len, or choose a packing_type: "
        "full (join documents and cut: nothing is lost), "
        "best_fit (join whole documents: nothing is lost, and only longer ones are cut), "
        "partial (cut each document into chunks), truncate (keep the first tokens of each)."
    )


def take_spans(values: Tokens, starts: Offsets, stops: Offsets) -> Tokens:
    """The pieces of `values`, end to end; a view where they stand so already."""
    if not len(starts):
        return values[:0]
    if np.array_equal(starts[1:], stops[:-1]):
        return values[starts[0] : stops[-1]]
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    return np.concatenate([values[start:stop] for start, stop in spans])


def make_packer(packing_type: str, max_seq_len: int, ignore_index: int, overlap: int = 0) -> Packer:
    if packing_type == "full":
        return FullPacker(max_seq_len, ignore_index)
    if packing_type == "partial":
        return PartialPacker(max_seq_len, ignore_index, overlap)
    packers = {"truncate": TruncatePacker, "none": WholePacker}
    return packers[packing_type](max_seq_len, ignore_index)
