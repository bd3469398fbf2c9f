"""What to change when a run does not fit, each change planned like the run itself. Floor 1, called
by `plan_door` and `check`.

A change is a patch of dotted keys. Those that fit come first, the fastest of them on top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vectorlm.config.schema import Config, ShardingStrategy
from vectorlm.plan.gpus import Gpu
from vectorlm.plan.outlook import Outlook, make_outlook
from vectorlm.plan.shapes import ModelShape, read_shape

SHORTEST = 256
MOST_GPUS = 256
GPUS_A_NODE = 8
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
STRATEGIES: tuple[ShardingStrategy, ...] = (
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "HYBRID_SHARD",
    "NO_SHARD",
)
LARGEST_BATCH = 4096
# What a change costs beside time; of changes that are alike, those with less of it come first.
FREE, LEARNS_OTHERWISE, LEARNS_LESS = 0, 1, 2

Patch = dict[str, Any]
_STRATEGY = "train_parameters.sharding_strategy"


@dataclass(frozen=True)
class Change:
    """`slower`: the time a token takes, as a multiple of what it takes now."""

    title: str
    patch: Patch
    outlook: Outlook
    slower: float | None
    price: int

    @property
    def fits(self) -> bool | None:
        return self.outlook.fits

    @property
    def peak_bytes(self) -> int:
        return self.outlook.peak_bytes

    @property
    def seconds_per_step(self) -> float | None:
        return self.outlook.seconds_per_step

    @property
    def words(self) -> str:
        return told(self.patch)


@dataclass(frozen=True)
class _Idea:
    title: str
    patch: Patch
    price: int = FREE
    count: int | None = None


def find_changes(
    config: Config, now: Outlook, gpu: Gpu | None = None, count: int | None = None
) -> list[Change]:
    """Every change that helps, best first."""
    shape = read_shape(config.model)

    def planned(idea: _Idea) -> Change:
        changed = patched(config, idea.patch)
        outlook = make_outlook(changed, gpu, idea.count or count, shape=shape)
        return Change(idea.title, idea.patch, outlook, _slower(now, outlook), idea.price)

    found = [planned(idea) for idea in _ideas(config, now)]
    if not any(change.fits and change.price == FREE for change in found):
        enough = (planned(idea) for idea in _together(config, now))
        found += itertools.islice((change for change in enough if change.fits), 1)
    helpful = [change for change in found if change.outlook.needed_bytes < now.needed_bytes]
    return sorted(helpful, key=_rank)


def _rank(change: Change) -> tuple[int, int, float]:
    order = {True: 0, None: 1, False: 2}
    return order[change.fits], change.price, change.slower or change.outlook.needed_bytes / 2**40


def _slower(now: Outlook, then: Outlook) -> float | None:
    if not now.seconds_per_step or not then.seconds_per_step:
        return None
    per_token = then.seconds_per_step / then.tokens_per_step
    return per_token / (now.seconds_per_step / now.tokens_per_step)


# --- ideas ----------------------------------------------------------------------------------------


def _ideas(config: Config, now: Outlook) -> Iterator[_Idea]:
    """Single changes, then all of those together that change nothing in what is learned."""
    train = config.train_parameters
    harmless: Patch = {}
    for title, patch in _harmless(config, now):
        harmless |= patch
        yield _Idea(title, patch)
    if len(harmless) > 1:
        yield _Idea("all of these that learn the same", harmless)
    if train.effective_precision == "32-true" and _bf16(now):
        patch = {"train_parameters.precision": "bf16-mixed"}
        yield _Idea("compute in bf16, masters in 32 bits", patch, LEARNS_OTHERWISE)
    if _narrows(config, now):
        patch = {"train_parameters.precision": "bf16-true"}
        if train.use_mp:  # short for another precision
            patch["train_parameters.use_mp"] = False
        yield _Idea("pure bf16, states too: less accurate", patch, LEARNS_LESS)
    if train.optimizer.name != "SGD":
        sgd: Patch = {"train_parameters.optimizer.name": "SGD"}
        sgd |= {f"train_parameters.optimizer.{key}": None for key in ("betas", "eps", "kwargs")}
        yield _Idea("SGD, which keeps no state", _given(config, sgd), LEARNS_LESS)
    if train.lora_peft_config is None:
        patch = {"train_parameters.lora_peft_config": dict(LORA)}
        yield _Idea("LoRA: train adapters only", patch, LEARNS_LESS)
        if not train.use_activation_checkpointing:
            both = patch | {"train_parameters.use_activation_checkpointing": True}
            yield _Idea("LoRA and activation checkpointing", both, LEARNS_LESS)
    if train.max_seq_len // 2 >= SHORTEST:
        patch = {"train_parameters.max_seq_len": train.max_seq_len // 2}
        yield _Idea("rows half as long (prepare the data again)", patch, LEARNS_LESS)
    for factor in (2, 4):
        yield from _more_gpus(config, now, factor, {})


def _together(config: Config, now: Outlook) -> Iterator[_Idea]:
    """What learns the same, on ever more GPUs."""
    harmless: Patch = {}
    for _, patch in _harmless(config, now):
        harmless |= patch
    harmless[_STRATEGY] = "FULL_SHARD"
    for power in range(1, 7):
        for idea in _more_gpus(config, now, 2**power, harmless):
            yield replace(idea, title=f"{idea.title}, and all that learns the same")


def _harmless(config: Config, now: Outlook) -> Iterator[tuple[str, Patch]]:
    train, ranks = config.train_parameters, now.hardware.ranks
    if not train.use_activation_checkpointing:
        yield (
            "activation checkpointing",
            {"train_parameters.use_activation_checkpointing": True},
        )
    if ranks > 1 and train.sharding_strategy != "FULL_SHARD":
        patch: Patch = {_STRATEGY: "FULL_SHARD"}
        if train.shard_group_size:
            patch["train_parameters.shard_group_size"] = None
        yield "share everything among all ranks", patch
    elif ranks == 1 and train.sharding_strategy in ("NO_SHARD", "SHARD_GRAD_OP"):
        patch = {_STRATEGY: "FULL_SHARD"}
        yield "gather block by block", patch
    if config.dataset and config.dataset.train_bs > 1:
        rows, times = config.dataset.train_bs, train.gradient_accumulation_steps
        smaller = max(part for part in range(1, rows) if rows % part == 0)
        for part in dict.fromkeys((smaller, 1)):
            patch = {
                "dataset.train_bs": part,
                "train_parameters.gradient_accumulation_steps": times * rows // part,
            }
            yield f"micro-batches of {part}, more of them", patch
    if config.dataset and config.dataset.eval_bs > 1 and now.moment == "evaluation":
        yield "evaluate row by row", {"dataset.eval_bs": 1}


def _more_gpus(config: Config, now: Outlook, factor: int, besides: Patch) -> Iterator[_Idea]:
    """Only where they share; the batch grows unless there is accumulation to give back."""
    patch = dict(besides)
    key = "train_parameters.gradient_accumulation_steps"
    times = patch.get(key, config.train_parameters.gradient_accumulation_steps)
    ranks = now.hardware.ranks * factor
    shares = patch.get(_STRATEGY, config.train_parameters.sharding_strategy) != "NO_SHARD"
    if not shares or ranks > MOST_GPUS:
        return
    if times % factor == 0:
        patch[key] = times // factor
    if config.slurm is None:  # the file does not say how many there are
        yield _Idea(f"{ranks} GPUs", dict(besides), count=ranks)
    elif now.hardware.ranks_per_node * factor <= GPUS_A_NODE:
        patch["slurm.gpus_per_node"] = config.slurm.gpus_per_node * factor
        count = now.hardware.ranks_per_node * factor
        yield _Idea(f"{ranks} GPUs", patch, count=count)
    else:
        patch["slurm.nodes"] = config.slurm.nodes * factor
        yield _Idea(f"{config.slurm.nodes * factor} nodes", patch)


def _bf16(now: Outlook) -> bool:
    return now.hardware.gpu is None or now.hardware.gpu.has_bf16


def _narrows(config: Config, now: Outlook) -> bool:
    """Whether pure bf16 saves anything: beside adapters, the weights are in the compute type."""
    train = config.train_parameters
    precision, adapters = train.effective_precision, train.lora_peft_config is not None
    return _bf16(now) and precision != "bf16-true" and (precision == "32-true" or not adapters)


def _given(config: Config, patch: Patch) -> Patch:
    """Without the removals (None) of keys that are not given."""
    given = config.train_parameters.optimizer.model_fields_set
    return {
        key: value
        for key, value in patch.items()
        if value is not None or key.rpartition(".")[2] in given
    }


# --- applying -------------------------------------------------------------------------------------


def patched(config: Config, patch: Patch) -> Config:
    """The configuration with these keys; None gives a key its default back."""
    values = config.model_dump(exclude_unset=True)
    for key, value in patch.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return Config.model_validate(values)


def told(patch: Patch) -> str:
    """To be done by hand."""
    return ", ".join(
        f"{key}: {'(remove it)' if value is None else yaml_value(value)}"
        for key, value in patch.items()
    )


def yaml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)


# --- searching ------------------------------------------------------------------------------------


def largest_batch(config: Config, gpu: Gpu | None, count: int | None) -> tuple[int, Outlook]:
    """(rows, outlook) of the largest micro-batch that fits, with accumulation as it then should be;
    0 and that of one row, if none does. No larger than what the data has for a rank.
    """
    shape = read_shape(config.model)

    def planned(rows: int) -> Outlook:
        key = "train_parameters.gradient_accumulation_steps"
        changed = patched(config, {key: accumulation_for(config, rows)})
        return make_outlook(changed, gpu, count, rows, shape)

    now = planned(1)
    most = min(LARGEST_BATCH, max((now.rows or LARGEST_BATCH) // now.hardware.ranks, 1))
    good, bad = 0, 1
    while bad <= most and planned(bad).fits:
        good, bad = bad, bad * 2
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if planned(middle).fits:
            good = middle
        else:
            bad = middle
    return good, planned(max(good, 1))


def compared(config: Config, gpu: Gpu | None, count: int | None) -> Iterator[tuple[str, Outlook]]:
    """Every strategy, with and without activation checkpointing."""
    shape: ModelShape = read_shape(config.model)
    for strategy in STRATEGIES:
        for recompute in (False, True):
            patch: Patch = {
                _STRATEGY: strategy,
                "train_parameters.use_activation_checkpointing": recompute,
            }
            if strategy != "HYBRID_SHARD":
                patch["train_parameters.shard_group_size"] = None
            name = strategy + (" + checkpointing" if recompute else "")
            yield name, make_outlook(patched(config, patch), gpu, count, shape=shape)


def accumulation_for(config: Config, rows: int) -> int:
    """Micro-batches of that size that keep the rows of an optimizer step as they are, or above."""
    old = config.dataset.train_bs if config.dataset else 1
    return math.ceil(old * config.train_parameters.gradient_accumulation_steps / rows)
