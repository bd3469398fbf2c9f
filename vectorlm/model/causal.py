"""CausalModel: a sharded causal language model as the trainer sees it. Floor 2, made by `load`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from vectorlm.batch import Batch
from vectorlm.model import attention, lora
from vectorlm.model.loss import token_loss_sum


@dataclass(frozen=True)
class CausalModel:
    module: Any  # an nn.Module that FSDP2 has made an FSDPModule too
    attention: attention.Attention
    vocab_size: int
    device: torch.device
    adapters: LoraConfig | None
    mesh: DeviceMesh

    def trainable(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, torch.Tensor]:
        """Everything a model file holds, tied tensors once: parameters and the buffers that are
        saved.
        """
        stored = set(self.module.state_dict(keep_vars=True))
        buffers = {key: buffer for key, buffer in self.module.named_buffers() if key in stored}
        return {**dict(self.module.named_parameters()), **buffers}

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool) -> Iterator[torch.Tensor]:
        """The loss sum of a batch; its backward pass belongs inside.

        Gradients are reduced inside a shard group every time (they would not fit otherwise), but
        between replicas, the slow links, only with the step's last micro-batch.
        """
        self.module.set_requires_all_reduce(last)
        batch = batch.to(self.device)
        with attention.documents(batch):
            yield self.loss_sum(batch)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        if self.attention.padded:
            input_ids, targets = batch.padded()
            logits = self.module(input_ids=input_ids, use_cache=False).logits
        else:
            targets = batch.targets
            logits = self.module(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
        return token_loss_sum(logits, targets, self.vocab_size, batch.ignore_index)

    def evaluate(self, batch: Batch) -> float:
        batch = batch.to(self.device)
        with torch.no_grad(), attention.documents(batch):
            return float(self.loss_sum(batch))

    def result(self) -> dict[str, torch.Tensor]:
        """What training makes: all weights, or the adapters."""
        return self.weights() if self.adapters is None else dict(self.trainable())

    def result_names(self) -> dict[str, str]:
        """Each name in the result -> its name in the exported model or adapter."""
        if self.adapters is None:
            return {name: name for name in self.weights()}
        return lora.adapter_names(self.module)
