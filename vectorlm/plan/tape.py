"""What autograd keeps of a block, and the peak of its backward pass, from sizes alone. Floor 1.

A block is written down as the operations that transformers runs, each with what autograd saves of
it. Running the tape backwards then gives the peak: gradients live from the operation that makes
them to the one that takes them, saved tensors until their operation has run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Tensor = int


@dataclass(frozen=True)
class _Operation:
    output: Tensor
    inputs: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    passes: bool  # the gradient goes through as it is, such as that of a sum
    scratch_bytes: int  # needed by the backward pass beside its results


@dataclass(frozen=True)
class Backward:
    peak_bytes: int  # beside what was saved, at the worst moment
    saved_bytes: int


@dataclass
class Tape:
    """Operations in the order they ran; a tensor is a number, `sizes` are bytes."""

    sizes: list[int] = field(default_factory=list)
    needs: list[bool] = field(default_factory=list)
    operations: list[_Operation] = field(default_factory=list)

    def tensor(self, size_bytes: int, needs_gradient: bool = False) -> Tensor:
        self.sizes.append(size_bytes)
        self.needs.append(needs_gradient)
        return len(self.sizes) - 1

    def run(
        self,
        output_bytes: int,
        inputs: Sequence[Tensor],
        *,
        saves: Iterable[Tensor] = (),
        keeps_output: bool = False,
        extra_bytes: int = 0,
        passes: bool = False,
        scratch_bytes: int = 0,
        trains: bool = False,
    ) -> Tensor:
        """An operation; `trains`: it has a trained parameter, so its output needs a gradient.
        `extra_bytes` are saved besides."""
        needs = trains or any(self.needs[tensor] for tensor in inputs)
        output = self.tensor(output_bytes, needs)
        if not needs:
            return output
        saved = [*saves, *([output] if keeps_output else [])]
        if extra_bytes:
            saved.append(self.tensor(extra_bytes))
        self.operations.append(
            _Operation(output, tuple(inputs), tuple(saved), passes, scratch_bytes)
        )
        return output

    def saved_bytes(self, without: Iterable[Tensor] = ()) -> int:
        kept = {tensor for operation in self.operations for tensor in operation.saved}
        return sum(self.sizes[tensor] for tensor in kept - set(without))

    def forward_bytes(self) -> int:
        """The peak of a pass that keeps nothing: each tensor until its last use."""
        last = {t: i for i, operation in enumerate(self.operations) for t in operation.inputs}
        made = {operation.output for operation in self.operations}
        live = sum(self.sizes[tensor] for tensor in last if tensor not in made)
        peak = live
        for i, operation in enumerate(self.operations):
            live += self.sizes[operation.output]
            peak = max(peak, live)
            live -= sum(self.sizes[t] for t in set(operation.inputs) if last[t] == i)
        return peak

    def backward(self, output: Tensor) -> Backward:
        """Runs the tape backwards from a gradient of `output`."""
        return _Run(self).back(output)


class _Run:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.uses = Counter(t for operation in tape.operations for t in set(operation.saved))
        self.saved = self.total = tape.saved_bytes()
        self.gradients: dict[Tensor, int] = {}  # tensor -> which storage holds its gradient
        self.sharing: Counter[int] = Counter()
        self.bytes: dict[int, int] = {}
        self.live = 0
        self.peak = 0

    def back(self, output: Tensor) -> Backward:
        self._put(output, self._new(self.tape.sizes[output]))
        for operation in reversed(self.tape.operations):
            if operation.output in self.gradients:
                self._step(operation)
        return Backward(self.peak, self.total)

    def _step(self, operation: _Operation) -> None:
        own = self.gradients.pop(operation.output)
        wanted = [t for t in dict.fromkeys(operation.inputs) if self.tape.needs[t]]
        for tensor in wanted:
            share = operation.passes and self.tape.sizes[tensor] == self.bytes[own]
            storage = own if share else self._new(self.tape.sizes[tensor])
            if tensor in self.gradients:  # a second one is added to it
                self._add(tensor, storage)
            else:
                self._put(tensor, storage)
        self._note(operation.scratch_bytes)
        self._free(own)
        for tensor in set(operation.saved):
            self.uses[tensor] -= 1
            if not self.uses[tensor]:
                self.saved -= self.tape.sizes[tensor]

    def _add(self, tensor: Tensor, storage: int) -> None:
        old = self.gradients[tensor]
        if self.sharing[old] > 1:  # not in place: others hold it
            fresh = self._new(self.tape.sizes[tensor])
            self._note()
            self._free(old)
            self._put(tensor, fresh)
        self._note()
        if not self.sharing[storage]:
            self.live -= self.bytes.pop(storage)

    def _new(self, size_bytes: int) -> int:
        storage = len(self.sharing)
        self.sharing[storage] = 0
        self.bytes[storage] = size_bytes
        self.live += size_bytes
        return storage

    def _put(self, tensor: Tensor, storage: int) -> None:
        self.gradients[tensor] = storage
        self.sharing[storage] += 1
        self._note()

    def _free(self, storage: int) -> None:
        self.sharing[storage] -= 1
        if self.sharing[storage] <= 0 and storage in self.bytes:
            self.live -= self.bytes.pop(storage)

    def _note(self, scratch_bytes: int = 0) -> None:
        self.peak = max(self.peak, self.saved - self.total + self.live + scratch_bytes)
