"""The order of rows in an epoch. Floor 2, used by `dataset`."""

from __future__ import annotations

import torch


def epoch_order(rows: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of the rows, another one each epoch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)
