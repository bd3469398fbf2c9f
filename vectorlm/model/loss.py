"""The loss of a batch: the SUM of its token losses, so that steps can be normalised over all
ranks. Floor 2, called by `head`.

Logits never exist whole: hidden states are taken in chunks of rows, large enough for fast products,
and while a chunk's logits are there, its gradients take their place, a slice of rows at a time; the
backward pass only scales them. Legend: N learned tokens, H hidden size, V vocabulary;
hidden [N, H], weight [V, H], bias [V], targets [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, log_softmax

from vectorlm.model.products import linear, product

# Of a chunk's logits, if they were in 32 bits. Each goes over the weight's gradient once more.
CHUNK_BYTES = 512 * 2**20
# Of a slice in 32 bits: stays in a CPU's cache; keeps all of a GPU busy.
SLICE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


@dataclass(frozen=True)
class Transform:
    """What a family does to the head's output: `cap * tanh(scale * x / cap)`, or `scale * x`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    @property
    def changes(self) -> bool:
        return self.scale != 1.0 or self.cap is not None

    def slope(self, transformed: torch.Tensor) -> torch.Tensor | float:
        """The derivative, by its result."""
        if self.cap is None:
            return self.scale
        return (1 - (transformed / self.cap).square_()).mul_(self.scale)


class Wanted(NamedTuple):
    """Which gradients, and the factor that the loss will be multiplied with."""

    hidden: bool
    weight: bool
    bias: bool
    factor: float

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`logits` [N, V padded]; in 32 bits, over the real vocabulary only."""
    return cross_entropy(logits[:, :vocab_size].float(), targets, reduction="sum")


def head_loss_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_size: int,
    transform: Transform,
    factor: float,
) -> torch.Tensor:
    """As `token_loss_sum` of the transformed logits. Gradients are rounded once when the loss is
    multiplied with `factor` before its backward pass; with another number they are right, too.
    """
    parts = (hidden, weight, bias)
    grads = torch.is_grad_enabled()
    of = [grads and part is not None and part.requires_grad for part in parts]
    wanted = Wanted(of[0], of[1], of[2], factor)
    loss: torch.Tensor = _HeadLoss.apply(*parts, targets, vocab_size, transform, wanted)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        vocab_size: int,
        transform: Transform,
        wanted: Wanted,
    ) -> torch.Tensor:
        chunks = _Chunks(hidden, weight, bias, vocab_size, transform, wanted)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunks.rows):
            total += chunks.loss_sum(start, targets[start : start + chunks.rows])
        if wanted.weight and chunks.of_weight is None:  # nothing is learned, but ranks reduce alike
            chunks.of_weight = torch.zeros_like(weight)
        ctx.gradients = (chunks.of_hidden, chunks.of_weight, chunks.of_bias)
        ctx.types = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.factor = wanted.factor
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        by = outer[0] / ctx.factor
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "gradients are given away, so one backward pass is all"
        scaled = [None if g is None else g.mul_(by) for g in gradients]
        del gradients
        for i, kind in enumerate(ctx.types):
            gradient = scaled[i]
            scaled[i] = None if gradient is None else gradient.to(kind)
        return (*scaled, None, None, None, None)


class _Chunks:
    """Walks over the rows of hidden states, and adds up gradients."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int,
        transform: Transform,
        wanted: Wanted,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.vocab_size, self.transform, self.wanted = vocab_size, transform, wanted
        self.rows = chunk_rows(len(weight))
        self.slice_rows = slice_rows(len(weight), hidden.device.type)
        self.of_hidden = torch.empty_like(hidden) if wanted.hidden else None
        self.of_bias = None
        if wanted.bias and bias is not None:
            self.of_bias = torch.zeros_like(bias, dtype=torch.float32)
        self.of_weight: torch.Tensor | None = None

    def loss_sum(self, start: int, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[start : start + self.rows]
        logits = linear(hidden, self.weight, self.bias)
        slices = zip(logits.split(self.slice_rows), targets.split(self.slice_rows), strict=True)
        total = torch.stack([self._slice(*parts) for parts in slices]).sum()
        if self.wanted.any:
            self._gradients(start, hidden, logits)
        return total

    def _slice(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a few rows; `logits` are overwritten by their gradient where it is wanted."""
        wide = logits.float()
        slope: torch.Tensor | float = 1.0
        if self.transform.changes:
            wide = self.transform(wide)
            slope = self.transform.slope(wide) if self.wanted.any else slope
        wide[:, self.vocab_size :] = -torch.inf
        shares = log_softmax(wide, 1)
        total = -shares.gather(1, targets[:, None]).sum()
        if self.wanted.any:
            shares.exp_()
            shares.scatter_add_(1, targets[:, None], shares.new_full((len(targets), 1), -1.0))
            if isinstance(slope, torch.Tensor):
                shares.mul_(slope)
                slope = 1.0
            torch.mul(shares, self.wanted.factor * slope, out=logits)
        return total

    def _gradients(self, start: int, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        if self.of_bias is not None:
            self.of_bias += gradient.sum(0, dtype=torch.float32)
        if self.of_hidden is not None:
            self.of_hidden[start : start + self.rows] = product(gradient, self.weight)
        if self.wanted.weight:
            self._add_to_weight(product(gradient.t(), hidden))

    def _add_to_weight(self, part: torch.Tensor) -> None:
        if self.of_weight is None:
            alone = len(self.hidden) <= self.rows
            self.of_weight = part if alone else part.float()
        else:
            self.of_weight += part


def chunk_rows(vocabulary: int) -> int:
    """Rows of a chunk: what `CHUNK_BYTES` of logits in 32 bits hold."""
    return max(CHUNK_BYTES // (4 * vocabulary), 64)


def slice_rows(vocabulary: int, device: str) -> int:
    """Rows whose softmax is made at once: what `SLICE_BYTES` hold."""
    return max(SLICE_BYTES[device] // (4 * vocabulary), 1)
