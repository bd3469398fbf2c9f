"""What the trainer takes for a lack of memory."""

from __future__ import annotations

import pytest
import torch

from vectorlm.trainer import lacks_memory


def test_a_refused_allocation_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    assert lacks_memory(refused.value)


def test_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not lacks_memory(other.value)
