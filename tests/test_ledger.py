"""The ledger: a block for each storage, from its first tensor to its last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vectorlm.ledger import ACTIVATIONS, COMMUNICATION, GRADIENTS, LOGITS, START, Ledger

KIB = 1024


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    fake = FakeTensorMode()
    with fake, Ledger(fake, vocabularies=(8,)) as ledger, ledger.resizes():
        ledger.moment = "first"
        yield ledger


def kib(count: int) -> torch.Tensor:
    return torch.empty(count * KIB // 4)


def most(ledger: Ledger) -> int:
    return ledger.peak(after=START).total_bytes // KIB


def test_what_is_released_makes_room(ledger: Ledger) -> None:
    one = kib(4)
    two = one + 1
    del one
    three = two.exp()
    assert most(ledger) == 8
    del two, three
    kib(9)
    assert most(ledger) == 9


def test_a_view_costs_nothing_and_keeps_its_storage(ledger: Ledger) -> None:
    whole = kib(4)
    part = whole[:2].view(2, 1)
    del whole
    kept = kib(4)
    assert most(ledger) == 8
    del part, kept


def test_what_autograd_saves_is_alive(ledger: Ledger) -> None:
    weight = kib(4).requires_grad_()
    out = weight.exp().exp().sum()  # the first result is kept for the backward pass
    ledger.moment = "backward"
    out.backward()
    del out, weight
    peak = ledger.moments(after=START)
    assert peak["first"] == (3 * 4 + 0.5) * KIB
    assert peak["backward"] <= (4 * 4 + 1) * KIB


def test_small_blocks_are_rounded_up_as_cuda_does(ledger: Ledger) -> None:
    kept = torch.empty(3)
    assert ledger.peak(after=START).total_bytes == 512
    del kept


def test_storages_that_are_resized(ledger: Ledger) -> None:
    buffer = kib(4)
    buffer.untyped_storage().resize_(0)
    other = kib(6)
    assert most(ledger) == 6
    buffer.untyped_storage().resize_(4 * KIB)
    peak = ledger.peak(after=START)
    assert (peak.total_bytes, peak.by_kind[COMMUNICATION]) == (10 * KIB, 4 * KIB)
    del buffer, other


def test_resizing_is_as_before_afterwards() -> None:
    original = torch.UntypedStorage.resize_
    with Ledger(FakeTensorMode(), ()).resizes():
        assert torch.UntypedStorage.resize_ is not original
    assert torch.UntypedStorage.resize_ is original


def test_kinds(ledger: Ledger) -> None:
    logits = torch.empty(64, 8)
    gradient = kib(4)
    ledger.name([gradient], GRADIENTS)
    hidden = kib(2)
    found = ledger.peak(after=START).by_kind
    assert (found[LOGITS], found[GRADIENTS], found[ACTIVATIONS]) == (2 * KIB, 4 * KIB, 2 * KIB)
    ledger.name_rest(GRADIENTS)
    assert ledger.peak(after=START).by_kind[GRADIENTS] == 8 * KIB
    del logits, gradient, hidden


def test_preparations_are_held_but_are_no_peak() -> None:
    fake = FakeTensorMode()
    with fake, Ledger(fake, ()) as ledger:
        kept = kib(4)
        passing = kib(100)
        del passing
        ledger.moment = "first"
        more = kib(1)
        peak = ledger.peak(after=START)
        assert (peak.total_bytes, peak.moment) == (5 * KIB, "first")
        del kept, more
