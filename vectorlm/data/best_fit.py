"""Packing by best fit: whole documents side by side in rows, with hardly anything left empty.
Floor 2; called by `vectorlm.preprocess`.

Documents are gathered in a window, sorted by length, and each put into the fullest row that still
takes it (best fit, decreasing). Only documents longer than a row are cut: into full rows, and a
rest that is packed like a document. Rows that stay emptier than others give their documents to the
next window, so that a bounded window packs nearly as well as an endless one. The order of rows is
shuffled by seed; inside a row, documents keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vectorlm.data.documents import Documents, Offsets, RowBlock, offsets_of
from vectorlm.data.pack import Packer, State
from vectorlm.row import Tokens

BYTES_A_TOKEN = 12  # of ids, labels, and the documents' lengths and places
ON_THE_WAY_MB = 128
BLOCK_TOKENS = 1 << 19
FULL_ENOUGH = 0.999
CARRIED = 8  # at most one part in so many goes to the next window


def window_tokens(memory_mb: int) -> int:
    """What fits beside the batches that are on their way."""
    return max(memory_mb - ON_THE_WAY_MB, memory_mb // 4) * (1 << 20) // BYTES_A_TOKEN


class BestFitPacker(Packer):
    def __init__(
        self, max_seq_len: int, ignore_index: int, *, seed: int, window_tokens: int
    ) -> None:
        super().__init__(max_seq_len, ignore_index)
        self.seed = seed
        self.windows = 0
        self.window = Window(window_tokens)

    def pack(
        self, documents: Documents, starts: Offsets, stops: Offsets, numbers: Offsets
    ) -> Iterator[RowBlock]:
        self.documents += len(starts)
        if not self.window.has_room(len(documents.ids)):
            yield from self.emit(last=False)
        self.cut_documents += int(np.count_nonzero(stops - starts > self.max_seq_len))
        lengths = cut(stops - starts, self.max_seq_len)
        self.window.add(documents.ids, documents.labels, lengths)

    def finish(self) -> Iterator[RowBlock]:
        return self.emit(last=True)

    def emit(self, last: bool) -> Iterator[RowBlock]:
        lengths = self.window.lengths()
        row_of, fills = best_fit(lengths, self.max_seq_len)
        carried = np.zeros(len(fills), bool) if last else self.emptiest(fills)
        rank = shuffled(len(fills), self.seed, self.windows)
        order = np.lexsort((np.arange(len(row_of)), rank[row_of]))
        order = order[~carried[row_of[order]]]
        pieces = Pieces(self.window, lengths, self.ignore_index)
        # Some rows at a time: what is written is never there twice as a whole.
        rows = np.append(np.flatnonzero(np.diff(row_of[order], prepend=-1)), len(order))
        cuts = [*rows[:-1][:: max(BLOCK_TOKENS // self.max_seq_len, 1)].tolist(), len(order)]
        for start, stop in pairwise(cuts):
            yield pieces.block(order[start:stop], row_of[order[start:stop]])
        self.window.replace(*pieces.taken(np.flatnonzero(carried[row_of])))
        self.windows += 1

    def emptiest(self, fills: Offsets) -> NDArray[np.bool_]:
        """The rows to be packed anew with what comes; few, where many are empty for good."""
        order = np.argsort(fills, kind="stable")
        carried = np.zeros(len(fills), bool)
        some = np.cumsum(fills[order]) <= fills.sum() // CARRIED
        carried[order] = some & (fills[order] < FULL_ENOUGH * self.max_seq_len)
        return carried

    def state(self) -> State:
        ids, labels = self.window.tokens()
        pieces = {"ids": ids, "labels": labels, "lengths": self.window.lengths()}
        return super().state() | pieces | {"windows": self.windows}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.windows = state["windows"]
        self.window.replace(state["ids"], state["labels"], state["lengths"])


class Window:
    """Documents, or parts of one, end to end; none is longer than a row. They are copied into
    arrays that stay: many that come and go would leave holes in the memory."""

    def __init__(self, capacity: int) -> None:
        self.ids = np.empty(capacity, np.int32)
        self.labels = np.empty(capacity, np.int32)
        self.parts: list[Offsets] = [np.empty(0, np.int64)]
        self.used = 0

    def has_room(self, tokens: int) -> bool:
        """True also where nothing is there that could make room."""
        return not self.used or self.used + tokens <= len(self.ids)

    def add(self, ids: Tokens, labels: Tokens, lengths: Offsets) -> None:
        end = self.used + len(ids)
        if end > len(self.ids):
            self.ids, self.labels = (np.resize(array, end) for array in (self.ids, self.labels))
        self.ids[self.used : end] = ids
        self.labels[self.used : end] = labels
        self.parts.append(lengths)
        self.used = end

    def replace(self, ids: Tokens, labels: Tokens, lengths: Offsets) -> None:
        self.parts, self.used = [np.empty(0, np.int64)], 0
        self.add(ids, labels, lengths)

    def lengths(self) -> Offsets:
        return np.concatenate(self.parts)

    def tokens(self) -> tuple[Tokens, Tokens]:
        return self.ids[: self.used], self.labels[: self.used]


class Pieces:
    """The pieces in a window, to be taken in any order. To Arrow each is a string of bytes, which
    it copies several times faster than numpy takes single tokens."""

    def __init__(self, window: Window, lengths: Offsets, ignore_index: int) -> None:
        self.lengths = lengths
        offsets = offsets_of(lengths)
        ids, labels = window.tokens()
        labels[offsets[:-1]] = ignore_index
        places = pa.py_buffer(offsets * ids.itemsize)
        self.strings = [
            pa.Array.from_buffers(
                pa.large_binary(), len(lengths), [None, places, pa.py_buffer(values)]
            )
            for values in (ids, labels)
        ]

    def taken(self, order: Offsets) -> tuple[Tokens, Tokens, Offsets]:
        import pyarrow.compute as pc

        indices, pool = pa.array(order), pa.system_memory_pool()  # one that keeps nothing back
        ids, labels = (
            pc.take(strings, indices, memory_pool=pool).buffers()[2] for strings in self.strings
        )
        return (
            np.frombuffer(ids or b"", np.int32),
            np.frombuffer(labels or b"", np.int32),
            self.lengths[order],
        )

    def block(self, order: Offsets, row_of: Offsets) -> RowBlock:
        """`row_of` tells where a new row begins."""
        ids, labels, lengths = self.taken(order)
        at = offsets_of(lengths)
        first = np.flatnonzero(np.diff(row_of, prepend=-1))
        pieces = np.append(first, len(order))
        inside = at[:-1] - np.repeat(at[first], np.diff(pieces))
        return RowBlock(ids, labels, at[pieces], inside.astype(np.int32), pieces)


def cut(lengths: Offsets, max_seq_len: int) -> Offsets:
    """The lengths of full rows and rests."""
    if not len(lengths) or lengths.max() <= max_seq_len:
        return lengths
    parts = -(-lengths // max_seq_len)
    pieces = np.full(parts.sum(), max_seq_len, np.int64)
    pieces[np.cumsum(parts) - 1] = lengths - (parts - 1) * max_seq_len
    return pieces


def best_fit(lengths: Offsets, max_seq_len: int) -> tuple[Offsets, Offsets]:
    """(the row of each piece, the tokens in each row).

    Pieces of one length go together: the fullest row that takes one takes as many as fit, for after
    each it is still the fullest. `rooms` has the rows by the room that is left in them, `has_room`
    a bit for each room that a row has, so that the smallest sufficient one is found at once.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    placed: list[int] = []
    rooms: list[list[int]] = [[] for _ in range(max_seq_len + 1)]
    has_room = rows = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = has_room >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                open_rows = rooms[room]
            else:
                room, open_rows = max_seq_len, [rows]
                rows += 1
            each = min(room // size, count)
            taking = min(count // each, len(open_rows)) if fitting else 1
            taken = open_rows[-taking:]
            del open_rows[-taking:]
            placed += taken if each == 1 else [row for row in taken for _ in range(each)]
            count -= each * taking
            if not open_rows:
                has_room &= ~(1 << room)
            left = room - each * size
            if left:
                rooms[left] += taken
                has_room |= 1 << left
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = placed
    fills = np.bincount(row_of, weights=lengths, minlength=rows).astype(np.int64)
    return row_of, fills


def shuffled(count: int, seed: int, window: int) -> Offsets:
    """A place for each of `count` rows. Raw bits, because only they are promised to stay the same
    in every version of numpy."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, window])).random_raw(count)
    places = np.empty(count, np.int64)
    places[np.argsort(bits, kind="stable")] = np.arange(count)
    return places
