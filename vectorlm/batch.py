"""Batch: the one noun that data, attention and loss share. Floor 2.

Rows are laid end to end without padding. Legend: T tokens of the batch, D documents in it.

    input_ids, targets, position_ids   [1, T]   positions restart at each document
    starts                             [D + 1]  where each document starts, and T at the end;
    `bounds` on the host
    learned                            [N]      where targets are that are learned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vectorlm.row import Row


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    starts: torch.Tensor
    learned: torch.Tensor
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
        learned = np.flatnonzero(targets != ignore_index)
        sizes = np.diff(starts)
        positions = np.arange(len(input_ids)) - np.repeat(starts[:-1], sizes)
        return cls(
            input_ids=torch.from_numpy(input_ids)[None],
            targets=torch.from_numpy(targets)[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
            starts=torch.from_numpy(starts.astype(np.int32)),
            learned=torch.from_numpy(learned),
            bounds=tuple(starts.tolist()),
            longest=int(sizes.max()),
            supervised_tokens=len(learned),
            tokens=len(input_ids),
            ignore_index=ignore_index,
        )

    def to(self, device: torch.device) -> Batch:
        """On the device; from pinned memory without waiting for it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In host memory that a GPU reads by itself."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            input_ids=move(self.input_ids),
            targets=move(self.targets),
            position_ids=move(self.position_ids),
            starts=move(self.starts),
            learned=move(self.learned),
        )

    @property
    def learned_targets(self) -> torch.Tensor:
        """[N]"""
        return self.targets[0].index_select(0, self.learned)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids as [D, longest], one document a row, padded on the right; and where in these,
        flattened, the learned tokens stand.
        """
        tokens = torch.arange(
            len(self.position_ids[0]), dtype=torch.int32, device=self.starts.device
        )
        documents = torch.searchsorted(self.starts[1:].contiguous(), tokens, right=True)
        places = documents * self.longest + self.position_ids[0]
        shape = (len(self.bounds) - 1, self.longest)
        input_ids = self.input_ids.new_zeros(shape[0] * shape[1])
        input_ids[places] = self.input_ids[0]
        return input_ids.view(shape), places.index_select(0, self.learned)


def _targets(labels: np.ndarray, starts: np.ndarray, ignore_index: int) -> np.ndarray:
    """The label of the next token of the same document; a document's last token has none."""
    targets = np.full(len(labels), ignore_index, dtype=np.int64)
    targets[:-1] = labels[1:]
    targets[starts[1:] - 1] = ignore_index
    return targets
