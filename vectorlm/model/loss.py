"""The loss of a batch: the SUM of its token losses, so that steps can be normalised over all
ranks. Floor 2.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def token_loss_sum(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, ignore_index: int
) -> torch.Tensor:
    """`logits` [..., V padded], `targets` [...]; in 32 bits, over the real vocabulary only."""
    real = logits[..., :vocab_size].flatten(0, -2).float()
    return cross_entropy(real, targets.flatten(), ignore_index=ignore_index, reduction="sum")
