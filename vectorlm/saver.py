"""Saver: checkpoints that are written while training goes on. Floor 3, used by `trainer`.

The loop waits only for a copy of the tensors on the host; a thread does the rest, on a process
group of its own, with the very code of a save that is waited for. One save is under way at most.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from vectorlm.background import Underway
from vectorlm.checkpoint import Checkpoints
from vectorlm.errors import CheckpointError, VectorLMError
from vectorlm.machine import free_host_bytes

FREE_SHARE = 0.8  # of the host's free memory, that copies may take


class Saver:
    def __init__(
        self, checkpoints: Checkpoints, in_background: bool, say: Callable[[str], None]
    ) -> None:
        self.checkpoints, self.in_background, self._say = checkpoints, in_background, say
        self._chosen = False
        self._beside: Checkpoints | None = None
        self._copies = _HostCopies()
        self._underway: Underway[Path] | None = None

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], wait: bool
    ) -> None:
        """Save what the tensors hold now; an earlier save is waited for in any case."""
        self.wait()
        if wait or not self.in_background:
            self._say_saved(self.checkpoints.save(step, tensors, state))
            return
        if self._beside is None:
            self._beside = self.checkpoints.apart()
        beside, copies, state = self._beside, self._copies.of(tensors), copy.deepcopy(state)
        self._underway = Underway(lambda: beside.save(step, copies, state))

    @property
    def failed(self) -> bool:
        """Whether the save under way has ended without a checkpoint, as this rank knows it. Once
        any rank does, all have to `wait`, which raises why.
        """
        return self._underway is not None and self._underway.failed

    def look(self, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """After each step: before the first save, whether there is room for it, now that the
        optimizer has its state; then, whether the save under way is complete.
        """
        if not self._chosen:
            self._chosen = True
            self._require_room(tensors())
        if self._underway is not None and self._underway.done and not self.failed:
            self.wait()

    def _require_room(self, tensors: dict[str, torch.Tensor]) -> None:
        """On the disk; and, for the copies, in the memory of each node, or they are given up."""
        self.checkpoints.require_space(tensors)
        ranks = self.checkpoints.ranks
        own = ranks.local_world * sum(_local(tensor).nbytes for tensor in tensors.values())
        needed, free = map(list, zip(*ranks.gather((own, free_host_bytes())), strict=True))
        if self.in_background and max(needed) > FREE_SHARE * min(free):
            self.in_background = False
            self._say(
                "training waits for each checkpoint: the copy that one is written from in the "
                f"background takes {max(needed) / 2**30:.2f} GiB of a node's memory, "
                f"{min(free) / 2**30:.2f} GiB are free"
            )

    def wait(self) -> None:
        if self._underway is None:
            return
        underway, self._underway = self._underway, None
        limit_s = self.checkpoints.ranks.timeout.total_seconds()
        self._say_saved(underway.result(limit_s, lambda: self._late(limit_s)))

    def _say_saved(self, folder: Path) -> None:
        self._say(f"saved {folder}")

    def settle(self) -> None:
        """Let the save under way end, when another error ends the run: it would hide that one."""
        try:
            self.wait()
        except (VectorLMError, RuntimeError, OSError):
            self._underway = None

    def _late(self, limit_s: float) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoints.root}: a checkpoint was not written within "
            f"{math.ceil(limit_s / 60)} min; earlier checkpoints are intact. Look whether the "
            "file system answers, or raise train_parameters.collective_timeout_minutes"
        )


class _HostCopies:
    """Copies on the host, whose memory is kept from save to save."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def of(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors, spread over ranks alike."""
        self._kept = {name: self._copy(name, _local(t)) for name, t in tensors.items()}
        return {name: _spread_as(t, self._kept[name]) for name, t in tensors.items()}

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty_like(tensor, device="cpu")
        return kept.copy_(tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _spread_as(tensor: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return copied
    # `from_local` would move it to the device that the mesh is of.
    return DTensor(copied, tensor._spec, requires_grad=False)
