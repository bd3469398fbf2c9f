"""The peak and its moment: against the simulation, and what must come out whatever the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vectorlm.config.schema import Config, TrainParameters
from vectorlm.plan.gpus import find_gpu
from vectorlm.plan.memory import (
    BACKWARD_END,
    CHUNK_BYTES,
    FORWARD_END,
    PARTS,
    SLICE_BYTES,
    Load,
    Memory,
    choose_kernel,
    chunk_rows,
    peak,
    shard_group,
    slice_rows,
    stage,
)
from vectorlm.plan.shapes import ModelShape, read_shape, shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPE = shape_of(LLAMA)
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")


def train(**keys: Any) -> TrainParameters:
    given = {"output_dir": "o", "max_seq_len": 512, "precision": "bf16-mixed"}
    return TrainParameters.model_validate(given | keys)


def planned(
    settings: TrainParameters,
    shape: ModelShape = SHAPE,
    ranks: int = 4,
    rows: int = 2,
    accumulation: int = 1,
    evaluation: int = 0,
) -> Memory:
    kernel, _ = choose_kernel(shape, settings, find_gpu("a100"), flash_attn=False)
    load = Load(rows, settings.max_seq_len, accumulation, evaluation)
    return peak(shape, settings, load, ranks, min(ranks, 2), kernel)


# --- against the real code, simulated -------------------------------------------------------------

TIED = LLAMA | {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
LARGE = {"vocab_size": 160_000}  # 838 rows of logits at once
CAPPED = TIED | LARGE | {"model_type": "gemma2"}
RECOMPUTED = {"use_activation_checkpointing": True}
COPIES = {"sharding_strategy": "NO_SHARD", "gradient_accumulation_steps": 2}
POINTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank, 32 bits": (1, LLAMA, {"precision": "32-true"}),
    "shared, recomputed": (4, LLAMA, {"use_activation_checkpointing": True}),
    "gathered throughout": (2, LLAMA, {"sharding_strategy": "SHARD_GRAD_OP"}),
    "a copy a node, accumulated": (
        4,
        LLAMA,
        {"sharding_strategy": "HYBRID_SHARD", "gradient_accumulation_steps": 2},
    ),
    "a copy a rank, pure bf16": (
        2,
        LLAMA,
        {
            "sharding_strategy": "NO_SHARD",
            "precision": "bf16-true",
            "use_activation_checkpointing": True,
        },
    ),
    "adapters": (4, LLAMA, {"lora_peft_config": {"r": 8, "lora_dropout": 0.1}}),
    "tied embeddings": (4, TIED, RECOMPUTED),
    "a large vocabulary": (2, LLAMA | LARGE, RECOMPUTED),
    "a large vocabulary, tied": (2, TIED | LARGE, RECOMPUTED),
    "a large vocabulary, 32 bits": (2, LLAMA | LARGE, RECOMPUTED | {"precision": "32-true"}),
    "capped logits": (2, CAPPED, RECOMPUTED),
    "capped logits, 32 bits": (2, CAPPED, RECOMPUTED | {"precision": "32-true"}),
    "scaled logits": (2, TIED | LARGE | {"model_type": "granite"}, RECOMPUTED),
    "adapters in the head": (
        2,
        LLAMA,
        RECOMPUTED | {"lora_peft_config": {"r": 8, "target_modules": ["q_proj", "lm_head"]}},
    ),
    "reduced as computed": (4, LLAMA, RECOMPUTED | {"reduce_dtype": "compute"}),
    "copies, reduced as computed": (2, LLAMA, COPIES | RECOMPUTED | {"reduce_dtype": "compute"}),
}


@pytest.mark.parametrize("name", POINTS)
def test_as_simulated(name: str, tmp_path: Path) -> None:
    from vectorlm.plan.simulated import Job
    from vectorlm.simulate import simulate

    ranks, model, keys = POINTS[name]
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    settings = train(**keys)
    config = Config.model_validate(
        {
            "model": str(tmp_path),
            "train_parameters": settings.model_dump(exclude_unset=True),
            "dataset": {"train_ds": "d", "train_bs": 2},
        }
    )
    simulated = simulate(Job(config, ranks, min(ranks, 2)))
    accumulation = settings.gradient_accumulation_steps
    ours = planned(settings, read_shape(str(tmp_path)), ranks, accumulation=accumulation)
    assert ours.peak_bytes == pytest.approx(simulated.peak_bytes, rel=0.02)
    assert stage(ours.moment) == stage(simulated.moment)
    for moment in (FORWARD_END, BACKWARD_END):
        if moment in simulated.moments and moment in highest(ours):
            near = pytest.approx(simulated.moments[moment], rel=0.03)
            assert highest(ours)[moment] == near, moment


def highest(memory: Memory) -> dict[str, int]:
    """Of the moments that are one stage to the simulation."""
    found: dict[str, int] = {}
    for moment in memory.moments:
        name = stage(moment.name)
        found[name] = max(found.get(name, 0), moment.total_bytes)
    return found


def test_logits_are_cut_as_the_loss_cuts_them() -> None:
    from vectorlm.model import loss

    assert loss.CHUNK_BYTES == CHUNK_BYTES
    for vocabulary in (1000, 32_000, 128_256, 10_000_000):
        assert chunk_rows(vocabulary) == loss.chunk_rows(vocabulary)
        assert slice_rows(vocabulary) == loss.slice_rows(vocabulary, "cuda")


# --- what must come out ---------------------------------------------------------------------------


def test_parts_add_up_to_the_peak_which_is_the_highest_moment() -> None:
    memory = planned(train())
    assert tuple(memory.breakdown) == PARTS
    assert sum(memory.breakdown.values()) == memory.peak_bytes
    assert memory.peak_bytes == max(moment.total_bytes for moment in memory.moments)
    assert memory.moment in {moment.name for moment in memory.moments}


@pytest.mark.parametrize(
    ("keys", "each"),
    [
        ({}, 16),
        ({"precision": "32-true"}, 16),
        ({"precision": "bf16-true"}, 8),
        ({"optimizer": {"name": "SGD"}}, 8),
        ({"optimizer": {"name": "SGD", "kwargs": {"momentum": 0.9}}}, 12),
        ({"optimizer": {"name": "AdamW", "kwargs": {"amsgrad": True}}}, 20),
        ({"precision": "bf16-true", "optimizer": {"name": "SGD"}}, 4),
    ],
)
def test_what_a_rank_holds_at_the_end_of_a_step(keys: dict[str, Any], each: int) -> None:
    """Bytes a parameter: masters, gradients and states, divided among the ranks."""
    step = planned(train(**keys)).moments[-1]
    assert step.name == "the optimizer's step"
    held = sum(step.parts[name] for name in ("parameters", "gradients", "optimizer"))
    assert held == pytest.approx(each * SHAPE.parameters / 4, rel=1e-6)


def test_optimizers_that_step_through_copies() -> None:
    step = planned(train(optimizer={"name": "SGD", "weight_decay": 0.1})).moments[-1]
    assert step.parts["step"] == SHAPE.parameters * 4 // 4
    assert planned(train()).moments[-1].parts["step"] == 0  # AdamW is fused


@pytest.mark.parametrize(
    ("strategy", "group"),
    [("FULL_SHARD", 8), ("SHARD_GRAD_OP", 8), ("HYBRID_SHARD", 4), ("NO_SHARD", 1)],
)
def test_who_shares_a_copy(strategy: str, group: int) -> None:
    assert shard_group(train(sharding_strategy=strategy), 8, 4) == group
    own = train(sharding_strategy="HYBRID_SHARD", shard_group_size=2)
    assert shard_group(own, 8, 4) == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_strategies_in_the_order_of_what_they_hold(recompute: bool) -> None:
    peaks = [
        planned(
            train(sharding_strategy=name, use_activation_checkpointing=recompute), ranks=8
        ).peak_bytes
        for name in STRATEGIES
    ]
    full, grad_op, hybrid, none = peaks
    assert full < grad_op < none
    assert full < hybrid < none


def test_everything_that_costs_memory_costs_memory() -> None:
    usual = planned(train()).peak_bytes
    assert planned(train(), rows=4).peak_bytes > usual
    assert planned(train(max_seq_len=1024)).peak_bytes > usual
    assert planned(train(), ranks=2).peak_bytes > usual
    assert planned(train(use_activation_checkpointing=True)).peak_bytes < usual
    assert planned(train(lora_peft_config={"r": 8})).peak_bytes < usual
    assert planned(train(), accumulation=2).peak_bytes > usual  # gradients are there all the time


def test_one_rank_holds_a_gathered_copy_beside_its_masters() -> None:
    """FSDP copies what it computes with, also where nobody else has a part of it."""
    alone = planned(train(precision="32-true", sharding_strategy="NO_SHARD"), ranks=1)
    blockwise = planned(train(precision="32-true"), ranks=1)
    loss = {moment.name: moment.parts for moment in alone.moments}["softmax of the logits"]
    assert loss["communication"] == SHAPE.parameters * 4
    loss = {moment.name: moment.parts for moment in blockwise.moments}["softmax of the logits"]
    assert loss["communication"] == SHAPE.root_parameters * 4


def test_replicas_keep_what_they_add_up_in_32_bits() -> None:
    """Pure bf16 saves less where copies are added up: their buffers stay to the end."""
    keys: dict[str, Any] = {"precision": "bf16-true", "sharding_strategy": "NO_SHARD"}
    end = next(
        moment
        for moment in planned(train(**keys)).moments
        if moment.name == "reducing the gradients of the root"
    )
    blocks = SHAPE.layers * SHAPE.block_parameters
    assert end.parts["gradients"] == blocks * (2 + 4)


def test_a_larger_evaluation_batch_can_be_the_peak() -> None:
    memory = planned(train(use_activation_checkpointing=True), rows=1, evaluation=64)
    assert memory.moment == "evaluation"
    held = planned(train(use_activation_checkpointing=True), rows=1, evaluation=0).breakdown
    assert memory.breakdown["parameters"] == held["parameters"]
    assert planned(train(), rows=8, evaluation=1).moment != "evaluation"


def test_logits_of_a_large_vocabulary_are_bounded() -> None:
    """A chunk; of a slice of it a copy in 32 bits, and the softmax. More tokens make no more."""
    large = shape_of(LLAMA | {"vocab_size": 128_000})
    memory = planned(train(use_activation_checkpointing=True, max_seq_len=4096), large)
    assert memory.moment == "softmax of the logits"
    rows, slices = chunk_rows(128_000), slice_rows(128_000)
    assert memory.breakdown["logits"] == 128_000 * (rows * 2 + slices * (4 + 4))
    assert memory.breakdown["logits"] < CHUNK_BYTES / 2 + 2 * SLICE_BYTES
    more = planned(train(use_activation_checkpointing=True, max_seq_len=8192), large)
    assert more.breakdown["logits"] == memory.breakdown["logits"]


def test_whole_logits_where_adapters_are_in_the_head() -> None:
    """Three tensors of tokens x vocabulary in 32 bits."""
    large = shape_of(LLAMA | {"vocab_size": 128_000})
    for targets in (["q_proj", "lm_head"], ".*(q_proj|lm_head)"):
        adapters = {"lora_peft_config": {"r": 8, "target_modules": targets}}
        memory = planned(train(max_seq_len=4096, **adapters), large)
        assert memory.moment == "backward of the loss"
        assert memory.breakdown["logits"] == 3 * 4 * 2 * 4096 * 128_000
    elsewhere = {"lora_peft_config": {"r": 8, "target_modules": "all-linear"}}
    assert planned(train(max_seq_len=4096, **elsewhere), large).moment != "backward of the loss"


def test_gradients_reduced_as_computed_take_half() -> None:
    wide, half = (
        {m.name: m.parts for m in planned(train(reduce_dtype=kind)).moments}
        for kind in ("float32", "compute")
    )
    name = "reducing the gradients of the root"
    root = SHAPE.root_parameters
    # Whole gradients beside their copies, or, at the end, the last of them beside the shards.
    assert wide[name]["communication"] == root * (4 + 2)
    assert half[name]["communication"] == pytest.approx(root * (2 + 1) + root // 4 * 6, rel=0.01)


@pytest.mark.parametrize(
    ("model", "keys", "gpu", "kernel"),
    [
        ({}, {}, "a100", "varlen"),
        ({}, {}, None, "varlen"),
        ({}, {"precision": "32-true"}, "a100", "sdpa"),
        ({}, {"precision": "16-mixed"}, "v100", "sdpa"),
        ({}, {"use_flash_attention": False}, "a100", "sdpa"),
        ({"attention_dropout": 0.1}, {}, "a100", "sdpa"),
        ({"model_type": "gemma2"}, {}, "a100", "eager"),
        ({"model_type": "stablelm"}, {}, "a100", "plain"),
        ({"model_type": "stablelm"}, {"precision": "32-true"}, "a100", "math"),
        ({"model_type": "falcon", "multi_query": True}, {}, "a100", "math"),
        ({"model_type": "falcon", "alibi": True}, {}, "a100", "math"),
    ],
)
def test_which_attention_runs(
    model: dict[str, Any], keys: dict[str, Any], gpu: str | None, kernel: str
) -> None:
    found = find_gpu(gpu) if gpu else None
    assert choose_kernel(shape_of(LLAMA | model), train(**keys), found, False)[0] == kernel
    if kernel == "varlen":
        assert choose_kernel(shape_of(LLAMA | model), train(**keys), found, True)[0] == "flash"
