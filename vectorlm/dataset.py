"""Dataset: a prepared folder -> this rank's batches, from an exact position.
Floor 3, built by `assemble`.

Every rank reads only its own rows (memory-mapped), and nothing is skipped to find a position.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from vectorlm.batch import Batch
from vectorlm.data.sampler import epoch_order
from vectorlm.data.store import MANIFEST_NAME, open_rows, read_manifest
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
        self._chunks = table.to_batches()
        self._ends = list(accumulate(chunk.num_rows for chunk in self._chunks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        chunk = bisect_right(self._ends, index)
        batch = self._chunks[chunk]
        at = index - (self._ends[chunk] - batch.num_rows)
        return Row(*(_values(batch, name, at) for name in ("input_ids", "labels", "boundaries")))


def _values(batch: pa.RecordBatch, name: str, at: int) -> np.ndarray:
    return batch.column(name)[at].values.to_numpy()


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

    def _refuse(self, key: str, prepared: int, asked: int) -> None:
        if prepared != asked:
            raise DataError(
                f"{self.folder}: was prepared with {key} {prepared}, the configuration says "
                f"{asked}; set it to {prepared}, or prepare the data again: python "
                "preprocess_data.py --config ..."
            )

    @property
    def fingerprint(self) -> str:
        """Identifies the prepared data: a resumed run must see the same rows."""
        return hashlib.sha256((self.folder / MANIFEST_NAME).read_bytes()).hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        return Batch.from_rows([self.rows[i] for i in indices], self.ignore_index)

    def groups(self, steps: Steps, position: Position) -> Iterator[Group]:
        """The steps from `position` to the end of its epoch."""
        order = epoch_order(len(self.rows), self.seed, position.epoch)
        epoch = position.epoch
        while position.epoch == epoch:
            start, stop = steps.step_rows(position)
            position = steps.after(position)
            yield Group(list(self._batches(order, start, stop)), position)

    def _batches(
        self, order: Sequence[int] | torch.Tensor, start: int, stop: int
    ) -> Iterator[Batch]:
        for i in range(micro_batches(stop - start, self.micro_batch, self.ranks)):
            part = rank_slice(start, stop, i, self.micro_batch, self.rank, self.ranks)
            yield self.batch([int(row) for row in order[part]])

    def __iter__(self) -> Iterator[Batch]:
        """All rows once, in their order, as many batches on every rank: for evaluation."""
        yield from self._batches(range(len(self.rows)), 0, len(self.rows))
