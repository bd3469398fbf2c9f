"""Disk for what a run writes, and host memory of a node. Floor 1, called by `outlook`."""

from __future__ import annotations

from dataclasses import dataclass

from vectorlm.config.schema import TrainParameters
from vectorlm.plan.links import MASTER_BYTES
from vectorlm.plan.lora import Adapters
from vectorlm.plan.memory import shard_group
from vectorlm.plan.optimizers import keeps
from vectorlm.plan.shapes import ModelShape

# Of a rank, beside what libraries' files map. Measured: 0.30 GiB that tiny models train with on a
# CPU. CUDA's and NCCL's share is a guess: it was never measured.
LIBRARIES_BYTES = int(0.35 * 2**30)
CUDA_HOST_BYTES = 2**30
PIECES_BYTES = 2**29  # of weights on their way, at most
ROW_BYTES = 8  # of a token: its id and its label
FLOAT = 4
FREE_SHARE = 0.8  # of free host memory: what copies of checkpoints may take, as `saver` has it


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
    shape: ModelShape,
    train: TrainParameters,
    adapters: Adapters | None,
    ranks_per_node: int,
    on_gpus: bool,
) -> int:
    """The first node's, at the worst moment: loading, or gathering the final model."""
    trained = shape.parameters if adapters is None else adapters.parameters(shape)
    gathering = trained * MASTER_BYTES[train.effective_precision]
    dora = bool((train.lora_peft_config or {}).get("use_dora"))
    # Without it the first rank reads all of the model, in 32 bits.
    loading = 0 if train.low_cpu_mem_usage and not dora else shape.parameters * FLOAT
    pieces = min(PIECES_BYTES, shape.parameters * FLOAT)
    return (
        running_bytes(ranks_per_node, on_gpus) + ranks_per_node * pieces + max(gathering, loading)
    )


def running_bytes(ranks_per_node: int, on_gpus: bool) -> int:
    """A node's, while it trains."""
    return ranks_per_node * (LIBRARIES_BYTES + on_gpus * CUDA_HOST_BYTES)


def copies_bytes(
    checkpoint_bytes: int, train: TrainParameters, ranks: int, ranks_per_node: int
) -> int:
    """A node's copies that checkpoints are written from while training goes on: of what each rank
    has. Where they find no room, training waits."""
    if not (train.checkpointing_enabled and train.async_checkpointing):
        return 0
    return ranks_per_node * checkpoint_bytes // shard_group(train, ranks, ranks_per_node)
