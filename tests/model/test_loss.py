"""The loss without logits is the loss with them, and so are its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vectorlm.model import loss as losses
from vectorlm.model.loss import Transform, chunk_rows, head_loss_sum

TOKENS, HIDDEN, VOCABULARY, PADDED = 150, 16, 50, 64
FACTOR = 1 / TOKENS
TRANSFORMS = {
    "plain": Transform(),
    "capped": Transform(cap=2.0),
    "scaled": Transform(scale=0.25),
    "scaled and capped": Transform(scale=3.0, cap=5.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows: three chunks, the last of 22."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 4 * PADDED * 64})


def made(
    dtype: torch.dtype = torch.float32, tokens: int = TOKENS, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return normal(tokens, HIDDEN), normal(PADDED, HIDDEN), normal(PADDED) if bias else None, targets


def by_hand(
    parts: tuple[Any, ...], transform: Transform
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Whole logits in 64 bits."""
    wide = [None if p is None else p.detach().double().requires_grad_() for p in parts[:3]]
    hidden, weight, bias = wide
    logits = transform(torch.nn.functional.linear(hidden, weight, bias))[:, :VOCABULARY]
    loss = cross_entropy(logits, parts[3], reduction="sum")
    (loss * FACTOR).backward()
    return loss.detach(), [None if p is None else p.grad for p in wide]


def ours(
    parts: tuple[Any, ...], transform: Transform, factor: float = FACTOR
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    loss = head_loss_sum(*parts, VOCABULARY, transform, factor)
    (loss * FACTOR).backward()
    return loss.detach(), [None if p is None else p.grad for p in parts[:3]]


def errors(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> list[float]:
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    assert all(f is not None for f, _ in pairs)
    return [float((f.double() - e).norm() / e.norm()) for f, e in pairs if f is not None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_and_gradients_are_those_of_whole_logits(name: str, bias: bool) -> None:
    parts = made(bias=bias)
    loss, gradients = ours(parts, TRANSFORMS[name])
    expected_loss, expected = by_hand(parts, TRANSFORMS[name])
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert max(errors(gradients, expected)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """Against 64 bits, no worse than whole logits in the same type."""
    parts = made(dtype)
    whole = [None if p is None else p.detach().clone().requires_grad_() for p in parts[:3]]
    logits = torch.nn.functional.linear(*whole)[:, :VOCABULARY].float()  # type: ignore[arg-type]
    (cross_entropy(logits, parts[3], reduction="sum") * FACTOR).backward()
    loss, gradients = ours(parts, Transform())
    expected_loss, expected = by_hand(parts, Transform())
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-3)
    assert [g.dtype for g in gradients if g is not None] == [dtype] * 3
    plain = errors([p.grad for p in whole if p is not None], expected)
    for found, allowed in zip(errors(gradients, expected), plain, strict=True):
        assert found < 1.3 * allowed


def test_many_chunks_add_up_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, sums over 32 chunks would be three times as wrong as one product."""
    parts = made(torch.bfloat16, tokens=2048, bias=False)
    _, expected = by_hand(parts, Transform())
    _, in_chunks = ours(parts, Transform())
    parts[0].grad = parts[1].grad = None
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 2**30})
    _, at_once = ours(parts, Transform())
    many, one = errors(in_chunks, expected)[1], errors(at_once, expected)[1]
    assert many < 1.5 * one


def test_another_factor_gives_the_same_gradients() -> None:
    parts = made()
    _, expected = ours(parts, Transform())
    expected = [g.double().clone() for g in expected if g is not None]
    for part in parts[:3]:
        part.grad = None  # type: ignore[union-attr]
    assert max(errors(ours(parts, Transform(), factor=3.0)[1], expected)) < 1e-6


def test_frozen_parts_get_no_gradient() -> None:
    parts = made()
    parts[1].requires_grad_(False)
    _, gradients = ours(parts, Transform())
    _, expected = by_hand(parts, Transform())
    assert gradients[1] is None
    assert errors([gradients[0], gradients[2]], [expected[0], expected[2]])[0] < 2e-6


def test_nothing_learned_still_has_gradients() -> None:
    """So that a rank without learned tokens reduces what the others reduce."""
    parts = made(tokens=0)
    loss, gradients = ours(parts, Transform())
    assert float(loss) == 0
    assert [g is not None and not g.any() for g in gradients] == [True] * 3


def test_evaluation_computes_no_gradients() -> None:
    parts = made()
    with torch.no_grad(), Largest() as seen:
        loss = head_loss_sum(*parts, VOCABULARY, Transform(), 1.0)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(by_hand(parts, Transform())[0]), rel=1e-6)
    assert "aten.mm" not in seen.operations


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that ends in the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(str(func.overloadpacket))
        for tensor in self._tensors(result):
            if tensor.dim() > 1 and tensor.shape[-1] in (VOCABULARY, PADDED):
                self.elements = max(self.elements, tensor.numel())
        return result

    def _tensors(self, tree: Any) -> Iterator[torch.Tensor]:
        yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def test_logits_never_exist_whole() -> None:
    parts = made()
    with Largest() as seen:
        ours(parts, Transform())
    assert chunk_rows(PADDED, "cpu") == 64
    assert 0 < seen.elements <= 64 * PADDED
    with Largest() as seen:  # guards the comparison
        losses.token_loss_sum(torch.nn.functional.linear(*parts[:3]), parts[3], VOCABULARY)
    assert seen.elements == TOKENS * PADDED


def test_a_chunk_is_never_tiny() -> None:
    assert chunk_rows(10**9, "cpu") == 64
