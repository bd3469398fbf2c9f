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
from torch.distributed.fsdp import FSDPModule

from vectorlm.batch import Batch
from vectorlm.model import attention, lora
from vectorlm.model.head import Head


@dataclass(frozen=True)
class CausalModel:
    module: Any  # an nn.Module that FSDP2 has made an FSDPModule too
    attention: attention.Attention
    head: Head
    vocab_size: int
    device: torch.device
    adapters: LoraConfig | None
    mesh: DeviceMesh

    def trainable(self) -> dict[str, nn.Parameter]:
        self._give_back()
        return {k: p for k, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, torch.Tensor]:
        """Everything a model file holds, tied tensors once: parameters and the buffers that are
        saved.
        """
        self._give_back()
        stored = set(self.module.state_dict(keep_vars=True))
        buffers = {key: buffer for key, buffer in self.module.named_buffers() if key in stored}
        return {**dict(self.module.named_parameters()), **buffers}

    @contextmanager
    def micro_batch(self, batch: Batch, last: bool, factor: float = 1.0) -> Iterator[torch.Tensor]:
        """The loss sum of a batch; its backward pass belongs inside. `factor` is what the caller
        will multiply it with before.

        Gradients are reduced inside a shard group every time (they would not fit otherwise), but
        between replicas, the slow links, only with the step's last micro-batch.
        """
        self.module.set_requires_all_reduce(last)
        batch = batch.to(self.device)
        with attention.documents(batch):
            yield self.loss_sum(batch, factor)

    def loss_sum(self, batch: Batch, factor: float = 1.0) -> torch.Tensor:
        targets = batch.learned_targets
        loss: torch.Tensor
        if self.attention.padded:
            input_ids, learned = batch.padded()
            loss = self.module(input_ids, None, learned, targets, factor)
        else:
            loss = self.module(batch.input_ids, batch.position_ids, batch.learned, targets, factor)
        return loss

    def evaluate(self, batch: Batch) -> float:
        batch = batch.to(self.device)
        with torch.no_grad(), attention.documents(batch):
            return float(self.loss_sum(batch))

    def _give_back(self) -> None:
        """Units that an evaluation left gathered have whole parameters, not this rank's."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def result(self) -> dict[str, torch.Tensor]:
        """What training makes: all weights, or the adapters."""
        return self.weights() if self.adapters is None else dict(self.trainable())

    def result_names(self) -> dict[str, str]:
        """Each name in the result -> its name in the exported model or adapter."""
        if self.adapters is None:
            return {name: name for name in self.weights()}
        return lora.adapter_names(self.module)
