"""What an optimizer step sends over the links between ranks, under each way of sharding. Floor 1.

Counted as FSDP2 sends it (bytes a rank sends in a ring; L: ranks that share a copy, R: copies):

    each micro-batch   parameters gathered for forward and again for backward,
                       gradients reduced (`reduce_dtype`)       (2 P + G) (L - 1) / L
    each step          gradients summed over the copies         2 G (R - 1) / R  a node

FULL_SHARD has one copy over all ranks, so the first line crosses the links between nodes.
HYBRID_SHARD has a copy a node, and only the second line crosses.
"""

from __future__ import annotations

from dataclasses import dataclass

from vectorlm.config.schema import Precision, TrainParameters
from vectorlm.plan.flops import train_flops_per_token
from vectorlm.plan.optimizers import keeps
from vectorlm.plan.parameters import Parameters

COMPUTE_BYTES: dict[Precision, int] = {
    "32-true": 4,
    "bf16-mixed": 2,
    "bf16-true": 2,
    "16-mixed": 2,
}
MASTER_BYTES: dict[Precision, int] = {
    "32-true": 4,
    "bf16-mixed": 4,
    "bf16-true": 2,
    "16-mixed": 4,
}
# The rest of a GPU belongs to activations, gathered blocks and the libraries.
HELD_SHARE = 0.8
USUAL_MFU = 0.4
LARGE_DIFFERENCE = 1.3
# Below this share of the time a step computes, communication hides behind it.
NEGLIGIBLE_SHARE = 0.1
NEGLIGIBLE_S = 0.1  # where the time to compute is not known


def reduced_bytes(train: TrainParameters) -> int:
    """Of a gradient on its way."""
    return COMPUTE_BYTES[train.effective_precision] if train.reduce_dtype == "compute" else 4


@dataclass(frozen=True)
class Rates:
    """Bytes a second, as measured."""

    inside: float | None  # a rank sends, inside its node; None: nodes of one rank
    between: float  # a node sends
    everywhere: float  # a rank sends, in a ring of all


@dataclass(frozen=True)
class Shape:
    """Ranks and the parts of a step."""

    ranks: int
    ranks_per_node: int
    micro_batches: int
    tokens: int | None = None  # of a step, a rank
    peak_flops: float | None = None
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class Advice:
    text: str
    warns: bool = False


def full_shard_s(sizes: Parameters, train: TrainParameters, shape: Shape, rates: Rates) -> float:
    return shape.micro_batches * _micro_bytes(sizes, train, shape.ranks) / rates.everywhere


def hybrid_shard_s(sizes: Parameters, train: TrainParameters, shape: Shape, rates: Rates) -> float:
    """With a copy in each node."""
    group, copies = shape.ranks_per_node, shape.ranks // shape.ranks_per_node
    inside = 0.0
    if group > 1 and rates.inside:
        inside = shape.micro_batches * _micro_bytes(sizes, train, group) / rates.inside
    return inside + 2 * sizes.trained * reduced_bytes(train) * (copies - 1) / copies / rates.between


def _micro_bytes(sizes: Parameters, train: TrainParameters, group: int) -> float:
    gathered = 2 * sizes.every * COMPUTE_BYTES[train.effective_precision]
    return (gathered + sizes.trained * reduced_bytes(train)) * (group - 1) / group


def held_bytes(sizes: Parameters, train: TrainParameters, group: int) -> int:
    """What each of the ranks that share a copy holds for good: parameters, gradients, optimizer."""
    master = MASTER_BYTES[train.effective_precision]
    trained = int(sizes.trained * master * (2 + keeps(train.optimizer).states))
    frozen = (sizes.every - sizes.trained) * COMPUTE_BYTES[train.effective_precision]
    return (trained + frozen) // group


def checkpoint_bytes(sizes: Parameters, train: TrainParameters) -> int:
    """Parameters (only adapters, under LoRA) and optimizer state."""
    master = MASTER_BYTES[train.effective_precision]
    return int(sizes.trained * master * (1 + keeps(train.optimizer).states))


def advise(sizes: Parameters, train: TrainParameters, shape: Shape, rates: Rates) -> Advice:
    """Which of FULL_SHARD and HYBRID_SHARD suits these links; a warning if the configuration chose
    the other and would wait for it.
    """
    seconds = {
        "FULL_SHARD": full_shard_s(sizes, train, shape, rates),
        "HYBRID_SHARD": hybrid_shard_s(sizes, train, shape, rates),
    }
    held = held_bytes(sizes, train, shape.ranks_per_node)
    fits = shape.gpu_bytes is None or held <= HELD_SHARE * shape.gpu_bytes
    faster = min(seconds, key=lambda name: seconds[name])
    suits = faster if fits else "FULL_SHARD"
    either = fits and max(seconds.values()) <= _negligible_s(sizes, shape)
    full_s = _s(seconds["FULL_SHARD"])
    text = (
        f"{'either' if either else suits} suits: a step spends about {full_s} on "
        f"the links under FULL_SHARD, {_s(seconds['HYBRID_SHARD'])} under HYBRID_SHARD"
        f"{_memory(held, fits, shape)}"
    )
    chosen = train.sharding_strategy
    if either or chosen == suits or chosen not in seconds or train.shard_group_size:
        return Advice(text)
    change = f"; set train_parameters.sharding_strategy: {suits}"
    if not fits:
        return Advice(text + change, warns=True)
    waits = seconds[chosen] >= LARGE_DIFFERENCE * seconds[suits]
    if not waits or seconds[chosen] <= _negligible_s(sizes, shape):
        return Advice(f"{text}; {chosen}, as configured, costs little more")
    return Advice(text + change, warns=True)


def _negligible_s(sizes: Parameters, shape: Shape) -> float:
    if not shape.peak_flops or not shape.tokens:
        return NEGLIGIBLE_S
    a_token = train_flops_per_token(sizes.every, 0, 0, 0.0, sizes.trained == sizes.every)
    return NEGLIGIBLE_SHARE * a_token * shape.tokens / (shape.peak_flops * USUAL_MFU)


def _memory(held: int, fits: bool, shape: Shape) -> str:
    share = f"{held / 2**30:.1f} GiB a GPU before activations"
    if shape.gpu_bytes is None:
        return f" ({share.replace('a GPU', 'a rank')}; whether that fits is not known on a CPU)"
    verdict = "fits" if fits else "does not fit"
    return f" ({share}, which {verdict} in {shape.gpu_bytes / 2**30:.0f} GiB)"


def _s(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
