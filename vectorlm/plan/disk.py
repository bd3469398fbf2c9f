"""Disk for what a run writes, and host memory of a node. Floor 1, called by `outlook`."""

from __future__ import annotations

from dataclasses import dataclass

from vectorlm.config.schema import TrainParameters
from vectorlm.plan.links import MASTER_BYTES
from vectorlm.plan.lora import Adapters
from vectorlm.plan.optimizers import keeps
from vectorlm.plan.shapes import ModelShape

LIBRARIES_BYTES = int(2.5 * 2**30)  # torch, CUDA's host side, transformers: a rank
PINNED_BYTES = 2**29  # pieces of weights on their way, and batches
ROW_BYTES = 8  # of a token: its id and its label
FLOAT = 4


@dataclass(frozen=True)
class Disk:
    """Bytes: a checkpoint, all of them at the worst moment, the final model, prepared data."""

    checkpoint_bytes: int
    checkpoints_bytes: int
    final_bytes: int
    data_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.checkpoints_bytes + self.final_bytes + self.data_bytes


def disk(
    shape: ModelShape, train: TrainParameters, adapters: Adapters | None, data_tokens: int
) -> Disk:
    trained = shape.parameters if adapters is None else adapters.parameters(shape)
    own = trained * MASTER_BYTES[train.effective_precision]
    checkpoint = int(own * (1 + keeps(train.optimizer).states))
    kept = train.keep_checkpoints + 1  # the new one is whole before an old one goes
    written = checkpoint * kept if train.checkpointing_enabled else 0
    # model.bin, and the same again as a Hugging Face folder.
    return Disk(checkpoint, written, 2 * own, data_tokens * ROW_BYTES)


def host_bytes(
    shape: ModelShape, train: TrainParameters, adapters: Adapters | None, ranks_per_node: int
) -> int:
    """The first node's, at the worst moment: loading, or gathering the final model."""
    trained = shape.parameters if adapters is None else adapters.parameters(shape)
    gathering = trained * MASTER_BYTES[train.effective_precision]
    dora = bool((train.lora_peft_config or {}).get("use_dora"))
    # Without it the first rank reads all of the model, in 32 bits.
    loading = 0 if train.low_cpu_mem_usage and not dora else shape.parameters * FLOAT
    return ranks_per_node * (LIBRARIES_BYTES + PINNED_BYTES) + max(gathering, loading)
