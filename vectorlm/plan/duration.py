"""How long a step and a run take, and how often a time limit cuts it. Floor 1, called by `outlook`.

compute     operations of a micro-batch / (the GPU's peak x an assumed utilisation);
            the head works on learned tokens only, and is never recomputed
links       bytes of its collectives / what a rank sends a second; hidden behind computing but
            for the first gather and the last reduction
update      the optimizer reads and writes what a rank holds, at the memory's bandwidth
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vectorlm.config.schema import Slurm, TrainParameters
from vectorlm.plan.flops import train_flops_per_token
from vectorlm.plan.gpus import Gpu
from vectorlm.plan.links import COMPUTE_BYTES, MASTER_BYTES, reduced_bytes
from vectorlm.plan.lora import Adapters
from vectorlm.plan.memory import shard_group
from vectorlm.plan.optimizers import keeps
from vectorlm.plan.shapes import ModelShape

UTILISATION = 0.42  # of the peak in half precision, large matrices, no fused kernels
UTILISATION_FULL = 0.7  # in 32 bits, where matrices take longer and the rest counts less
UTILISATION_SMALL = 0.3  # models below a billion parameters a rank keep a GPU less busy
SMALL_PARAMETERS = 1e9
BANDWIDTH_SHARE = 0.7
START_S = 180.0  # from the start of a job to its first step: libraries, weights, the last position
DISK_BYTES = 1e9  # a second, to a shared file system


@dataclass(frozen=True)
class Work:
    """A step of a rank: `micro_batches` of `tokens`, documents of `context` tokens, of which the
    share `learned` is learned."""

    micro_batches: int
    tokens: int
    context: float
    ranks: int
    ranks_per_node: int
    learned: float = 1.0


@dataclass(frozen=True)
class StepTime:
    compute_s: float
    links_s: float  # if nothing hid them
    update_s: float
    waits_s: float  # of the links, what computing does not hide

    @property
    def total_s(self) -> float:
        return self.compute_s + self.waits_s + self.update_s


def step_time(
    shape: ModelShape,
    train: TrainParameters,
    adapters: Adapters | None,
    work: Work,
    gpu: Gpu,
    between_bytes: float,
) -> StepTime:
    """`between_bytes`: what a node sends to others, a second."""
    compute = work.micro_batches * _compute_s(shape, train, adapters, work, gpu)
    micro, once = _links_s(shape, train, adapters, work, gpu, between_bytes)
    links = work.micro_batches * micro + once
    hidden = 1 - 2 / (shape.layers + 1)  # the first block and the last wait for the links
    waits = max(links - compute * hidden, links * (1 - hidden)) if links else 0.0
    trained = shape.parameters if adapters is None else adapters.parameters(shape)
    group = shard_group(train, work.ranks, work.ranks_per_node)
    own = trained * MASTER_BYTES[train.effective_precision] / group
    touched = own * (3 + 2 * keeps(train.optimizer).states + 2)  # clipping reads gradients twice
    update = touched / (gpu.bandwidth_bytes * BANDWIDTH_SHARE)
    return StepTime(compute, links, update, waits)


def _compute_s(
    shape: ModelShape, train: TrainParameters, adapters: Adapters | None, work: Work, gpu: Gpu
) -> float:
    head = shape.embedding_parameters
    below = shape.multiplied_parameters - head
    parameters = round(below + head * work.learned)
    attended = shape.heads * shape.head_dim
    flops = train_flops_per_token(
        parameters, shape.layers, attended, work.context, adapters is None
    )
    if train.use_activation_checkpointing:
        flops += 2 * below + 4 * shape.layers * attended * work.context / 2
    precision = train.effective_precision
    share = UTILISATION_FULL if precision == "32-true" else UTILISATION
    if below + head < SMALL_PARAMETERS:
        share = min(share, UTILISATION_SMALL)
    return work.tokens * flops / (gpu.peak_flops(precision) * share)


def _links_s(
    shape: ModelShape,
    train: TrainParameters,
    adapters: Adapters | None,
    work: Work,
    gpu: Gpu,
    between_bytes: float,
) -> tuple[float, float]:
    """(a micro-batch, once a step), as `plan.links` counts the bytes."""
    group = shard_group(train, work.ranks, work.ranks_per_node)
    copies = max(work.ranks // group, 1)
    trained = shape.parameters if adapters is None else adapters.parameters(shape)
    gathers = 2 if train.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD") else 1
    gathered = gathers * shape.parameters * COMPUTE_BYTES[train.effective_precision]
    share = (group - 1) / group
    rate = _rate(group, work, gpu, between_bytes)
    micro = (gathered + trained * reduced_bytes(train)) * share / rate
    once = 0.0
    if copies > 1:
        nodes = max(work.ranks // work.ranks_per_node, 1)
        crosses = between_bytes / work.ranks_per_node if nodes > 1 else gpu.link_bytes
        once = 2 * trained / group * reduced_bytes(train) * (copies - 1) / copies / crosses
    return micro, once


def _rate(group: int, work: Work, gpu: Gpu, between_bytes: float) -> float:
    """What a rank of a group sends a second: a ring that leaves the node crosses its link once."""
    if group <= work.ranks_per_node:
        return gpu.link_bytes
    return min(gpu.link_bytes, between_bytes)


# --- the run --------------------------------------------------------------------------------------


def requeues(train_s: float, slurm: Slurm | None, checkpoint_bytes: int) -> int | None:
    """How often the time limit cuts the run: each start trains until the signal, less what it
    takes to begin and to save. None: it never ends, for no start gets so far as to train."""
    if slurm is None:
        return 0
    until_signal = slurm.time_s - slurm.signal_lead_s
    useful = until_signal - least_start_s(checkpoint_bytes)
    if useful <= 0:
        return 0 if START_S + train_s <= until_signal else None
    return max(math.ceil(train_s / useful) - 1, 0)


def least_start_s(checkpoint_bytes: int) -> float:
    """What a start takes without any training."""
    return START_S + checkpoint_bytes / DISK_BYTES
