"""Batch: the one noun that data, attention and loss share. Floor 2.

Rows are laid end to end without padding. Legend: T tokens of the batch, D documents in it.

    input_ids, targets, position_ids   [1, T]   positions restart at each document
    starts                             [D + 1]  where each document starts, and T at the end;
    `bounds` on the host
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from vectorlm.row import Row


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    starts: torch.Tensor
    bounds: tuple[int, ...]
    longest: int
    supervised_tokens: int
    tokens: int
    ignore_index: int

    @classmethod
    def from_rows(cls, rows: Sequence[Row], ignore_index: int) -> Batch:
        """Without rows: one token that is not learned, so that this rank still joins every
        collective.
        """
        if not rows:
            nothing = np.full(1, ignore_index)
            empty = cls.from_rows(
                [Row(np.zeros(1, np.int32), nothing, np.zeros(1, np.int32))], ignore_index
            )
            return replace(empty, tokens=0)
        lengths = np.array([len(row.input_ids) for row in rows])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.concatenate(
            [row.boundaries + offset for row, offset in zip(rows, offsets[:-1], strict=True)]
            + [offsets[-1:]]
        )
        input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
        targets = _targets(np.concatenate([row.labels for row in rows]), starts, ignore_index)
        sizes = np.diff(starts)
        positions = np.arange(len(input_ids)) - np.repeat(starts[:-1], sizes)
        return cls(
            input_ids=torch.from_numpy(input_ids)[None],
            targets=torch.from_numpy(targets)[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
            starts=torch.from_numpy(starts.astype(np.int32)),
            bounds=tuple(starts.tolist()),
            longest=int(sizes.max()),
            supervised_tokens=int((targets != ignore_index).sum()),
            tokens=len(input_ids),
            ignore_index=ignore_index,
        )

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            position_ids=self.position_ids.to(device),
            starts=self.starts.to(device),
        )

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, targets) as [D, longest], one document a row, padded on the right."""
        bounds = self.bounds
        shape = (len(bounds) - 1, self.longest)
        input_ids = self.input_ids.new_zeros(shape)
        targets = self.targets.new_full(shape, self.ignore_index)
        for i, (start, stop) in enumerate(pairwise(bounds)):
            input_ids[i, : stop - start] = self.input_ids[0, start:stop]
            targets[i, : stop - start] = self.targets[0, start:stop]
        return input_ids, targets


def _targets(labels: np.ndarray, starts: np.ndarray, ignore_index: int) -> np.ndarray:
    """The label of the next token of the same document; a document's last token has none."""
    targets = np.full(len(labels), ignore_index, dtype=np.int64)
    targets[:-1] = labels[1:]
    targets[starts[1:] - 1] = ignore_index
    return targets
