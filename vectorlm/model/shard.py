"""Spreading a model over ranks with FSDP2, and recomputing its blocks.
Floor 2, called by `load`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from vectorlm.config.schema import Precision, ShardingStrategy, TrainParameters
from vectorlm.errors import ConfigError, ModelError

COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}
MASTER_DTYPE: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float32,
}


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the elements of each outermost list of more than one
    module.
    """
    blocks = list(_outermost_lists(model))
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks, so it cannot be sharded block "
            "by block"
        )
    return blocks


def _outermost_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from child
        else:
            yield from _outermost_lists(child)


def make_mesh(
    strategy: ShardingStrategy, world: int, shard_group: int, device_type: str
) -> DeviceMesh:
    """One dimension to shard over, or two: replicas, and the ranks that share one copy."""
    if strategy == "NO_SHARD":
        shard_group = 1
    elif strategy != "HYBRID_SHARD":
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    if world % shard_group:
        raise ConfigError(
            f"train_parameters.shard_group_size: {world} ranks cannot be split into groups of "
            f"{shard_group}; allowed: a divisor of {world}"
        )
    shape = (world // shard_group, shard_group)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replica", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, train: TrainParameters) -> FSDPModule:
    compute = COMPUTE_DTYPE[train.effective_precision]
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute,
        reduce_dtype=compute if train.reduce_dtype == "compute" else torch.float32,
    )
    reshard = train.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")
    for block in find_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The backward pass begins with the root, so it would only be gathered again at once.
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing: keep a block's input only, and run it again in the backward
    pass.
    """
    for block in find_blocks(model):
        # Replacing `forward` (not wrapping the block) keeps parameter names, and FSDP's hooks
        # outside.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module) -> None:
    """Each block by torch.compile, once for batches of any length."""
    for block in find_blocks(model):
        block.forward = torch.compile(block.forward, dynamic=True)
