"""Dataset: a prepared folder -> this rank's batches, from an exact position.
Floor 3, built by `assemble`.

Every rank reads only its own rows (memory-mapped), and nothing is skipped to find a position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from vectorlm.batch import Batch
from vectorlm.data.sampler import epoch_order, grouped_by_length, longest_first
from vectorlm.data.store import open_rows, read_manifest
from vectorlm.errors import DataError
from vectorlm.row import Row
from vectorlm.steps import Position, Steps, micro_batches, rank_slice


@dataclass(frozen=True)
class Group:
    """The micro-batches of one optimizer step on this rank."""

    batches: list[Batch]
    after: Position


class Rows:
    """Random access to the rows of a prepared folder."""

    def __init__(self, table: pa.Table) -> None:
        self._chunks = [_Chunk(batch) for batch in table.to_batches()]
        self._ends = list(accumulate(len(chunk) for chunk in self._chunks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        number = bisect_right(self._ends, index)
        chunk = self._chunks[number]
        at = index - (self._ends[number] - len(chunk))
        return Row(chunk.of("input_ids", at), chunk.of("labels", at), chunk.of("boundaries", at))

    def lengths(self) -> np.ndarray:
        """The tokens of each row; no row is read for it."""
        return self._all(lambda chunk: chunk.lengths("input_ids"))

    def longest_documents(self) -> np.ndarray:
        """The tokens of the longest document of each row."""
        return self._all(_Chunk.longest_documents)

    def _all(self, number_of: Callable[[_Chunk], np.ndarray]) -> np.ndarray:
        numbers = [number_of(chunk).astype(np.int64) for chunk in self._chunks if len(chunk)]
        return np.concatenate(numbers) if numbers else np.zeros(0, np.int64)


class _Chunk:
    """A record batch, with its columns' offsets and values at hand."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def of(self, name: str, at: int) -> np.ndarray:
        offsets, values = self._column(name)
        return values[offsets[at] : offsets[at + 1]]

    def lengths(self, name: str) -> np.ndarray:
        return np.diff(self._column(name)[0])

    def longest_documents(self) -> np.ndarray:
        offsets, starts = self._column("boundaries")
        ends = np.append(starts[offsets[0] + 1 : offsets[-1]], 0)
        ends[offsets[1:] - offsets[0] - 1] = self.lengths("input_ids")
        return np.maximum.reduceat(
            ends - starts[offsets[0] : offsets[-1]], offsets[:-1] - offsets[0]
        )

    def _column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = self._columns.get(name)
        if found is None:
            column = self._batch.column(name)
            found = column.offsets.to_numpy(), column.values.to_numpy()
            self._columns[name] = found
        return found


class Dataset:
    """The rows of one prepared folder, shared out over data-parallel ranks."""

    def __init__(
        self,
        folder: str | Path,
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        max_seq_len: int,
        ignore_index: int,
        seed: int,
        longest_first: bool = False,
        group_by_length: bool = False,
        pinned: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._refuse("max_seq_len", self.manifest.max_seq_len, max_seq_len)
        self._refuse("ignore_index", self.manifest.ignore_index, ignore_index)
        self.rows = Rows(open_rows(self.folder))
        if not len(self.rows):
            raise DataError(f"{self.folder}: holds no rows; nothing can be learned from it")
        self.micro_batch, self.rank, self.ranks = micro_batch, rank, ranks
        self.ignore_index, self.seed = ignore_index, seed
        self.longest_first, self.group_by_length = longest_first, group_by_length
        self.pinned = pinned

    def _refuse(self, key: str, prepared: int, asked: int) -> None:
        if prepared != asked:
            raise DataError(
                f"{self.folder}: was prepared with {key} {prepared}, the configuration says "
                f"{asked}; set it to {prepared}, or prepare the data again: "
                "vectorlm preprocess --config ..."
            )

    @property
    def fingerprint(self) -> str:
        """Identifies the prepared data: a resumed run must see the same rows."""
        return self.manifest.fingerprint()

    def batch(self, indices: Sequence[int]) -> Batch:
        made = Batch.from_rows([self.rows[i] for i in indices], self.ignore_index)
        return made.pinned() if self.pinned else made

    def groups_to_the_end(self, steps: Steps, position: Position) -> Iterator[Group]:
        """The steps from `position` to the end of the run."""
        while position.epoch < steps.epochs:
            for group in self.groups(steps, position):
                position = group.after
                yield group

    def groups(self, steps: Steps, position: Position) -> Iterator[Group]:
        """The steps from `position` to the end of its epoch."""
        order = self.order(position.epoch, steps.global_batch)
        epoch = position.epoch
        while position.epoch == epoch:
            start, stop = steps.step_rows(position)
            position = steps.after(position)
            yield Group(list(self._batches(order, start, stop)), position)

    def order(self, epoch: int, step_rows: int) -> np.ndarray:
        """The rows of an epoch, in the order in which steps of `step_rows` rows learn them."""
        order = epoch_order(len(self.rows), self.seed, epoch)
        first = order[:0]
        if self.longest_first and epoch == 0:
            order = longest_first(order, self._sizes(), step_rows)
            first, order = order[:step_rows], order[step_rows:]
        if self.group_by_length:
            lengths = self.rows.lengths()
            order = grouped_by_length(order, lengths, step_rows, self.seed, epoch)
        return np.concatenate([first, order])

    def _sizes(self) -> np.ndarray:
        """What rows take of memory, in order: by their tokens, and by the longest document where
        these are equal.
        """
        return self.rows.lengths() * (1 << 32) + self.rows.longest_documents()

    def _batches(self, order: Sequence[int] | np.ndarray, start: int, stop: int) -> Iterator[Batch]:
        for i in range(micro_batches(stop - start, self.micro_batch, self.ranks)):
            part = rank_slice(start, stop, i, self.micro_batch, self.rank, self.ranks)
            yield self.batch([int(row) for row in order[part]])

    def __iter__(self) -> Iterator[Batch]:
        """All rows once, in their order, as many batches on every rank: for evaluation."""
        yield from self._batches(range(len(self.rows)), 0, len(self.rows))
