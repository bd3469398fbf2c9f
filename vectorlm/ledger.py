"""A ledger of fake tensors' memory: each block that would be allocated, when, for what, and until
when. Floor 2, used by `simulate`.

A block is a tensor's storage. What it was for is often known only later (a buffer becomes a
gradient, an output is sent to other ranks), so events are kept, and kinds are settled at the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
ACTIVATIONS, LOGITS, COMMUNICATION = "activations", "logits", "communication"
START = "before the step"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, COMMUNICATION)
ALIGNMENT_BYTES = 512  # CUDA's caching allocator hands out multiples of this


@dataclass(eq=False)
class Block:
    size_bytes: int
    kind: str = ACTIVATIONS


@dataclass(frozen=True)
class Event:
    block: Block
    change_bytes: int
    moment: str


@dataclass(frozen=True)
class Peak:
    total_bytes: int
    by_kind: dict[str, int]
    moment: str


class Ledger(TorchDispatchMode):
    """Watches every operation on the tensors of one fake mode; entered after that mode."""

    def __init__(self, fake: FakeTensorMode, vocabularies: Iterable[int]) -> None:
        super().__init__()
        self.moment = START
        self.values_do_not_matter = True  # of a tensor that code looks at: any will do
        self.events: list[Event] = []
        self._fake = fake
        self._vocabularies = set(vocabularies)
        self._live: dict[int, Block] = {}
        self._watches: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the local tensors
        if func is torch.ops.aten._local_scalar_dense.default and self.values_do_not_matter:
            return 0.5 if args[0].dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self._see(tensor)
        if func.namespace in ("fsdp", "c10d"):
            self._mark(self._tensors((args, kwargs)), COMMUNICATION)
        return result

    def _tensors(self, tree: Any) -> Iterator[torch.Tensor]:
        for leaf in tree_leaves(tree):
            # Inside of kernels fake tensors give themselves away as meta: not memory, but shapes.
            if isinstance(leaf, FakeTensor) and leaf.fake_mode is self._fake:
                if leaf.device.type != "meta":
                    yield leaf

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._watches[key] = weakref.ref(storage, partial(self._gone, key))
            self._live[key] = Block(0)
        ends_in_vocabulary = tensor.dim() > 1 and tensor.shape[-1] in self._vocabularies
        self._fit(key, storage.nbytes(), LOGITS if ends_in_vocabulary else ACTIVATIONS)

    def _fit(self, key: int, size: int, kind: str = ACTIVATIONS) -> None:
        """The storage has this size now; a storage that grows again is another block."""
        size = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        block = self._live[key]
        if size == block.size_bytes:
            return
        if block.size_bytes:
            self.events.append(Event(block, -block.size_bytes, self.moment))
        self._live[key] = block = Block(size, kind)
        if size:
            self.events.append(Event(block, size, self.moment))

    def _gone(self, key: int, _: Any) -> None:
        block = self._live.pop(key)
        del self._watches[key]
        if block.size_bytes:
            self.events.append(Event(block, -block.size_bytes, self.moment))

    def _mark(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        for tensor in tensors:
            block = self._live.get(tensor.untyped_storage()._cdata)
            if block and block.kind in (ACTIVATIONS, LOGITS):
                block.kind = kind

    def name(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what these (allocated before, perhaps unseen) tensors are for."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            for leaf in self._tensors(local.detach()):
                self._see(leaf)
                self._live[leaf.untyped_storage()._cdata].kind = kind

    def name_rest(self, kind: str) -> None:
        """What is alive and not named yet."""
        for block in self._live.values():
            if block.kind in (ACTIVATIONS, LOGITS, COMMUNICATION):
                block.kind = kind

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """FSDP frees and gets back gathered parameters by resizing storages, past any operation."""
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            key = storage._cdata
            if key in self._live:
                if self._live[key].kind in (ACTIVATIONS, LOGITS):
                    self._live[key].kind = COMMUNICATION
                self._fit(key, storage.nbytes(), COMMUNICATION)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def peak(self, after: str) -> Peak:
        """The most that was held at once, past the moment `after`."""
        total = best = at = 0
        for i, event in enumerate(self.events):
            total += event.change_bytes
            if total > best and event.moment != after:
                best, at = total, i + 1
        by_kind = dict.fromkeys(KINDS, 0)
        for event in self.events[:at]:
            by_kind[event.block.kind] += event.change_bytes
        return Peak(best, by_kind, self.events[at - 1].moment)

    def moments(self, after: str) -> dict[str, int]:
        """The most that was held within each moment, past `after`."""
        total, most = 0, dict[str, int]()
        for event in self.events:
            total += event.change_bytes
            if event.moment != after:
                most[event.moment] = max(most.get(event.moment, 0), total)
        return most
