"""Seconds of a step and starts of a run, from plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm.config.schema import Slurm, TrainParameters
from vectorlm.plan.duration import START_S, UTILISATION, Work, requeues, step_time
from vectorlm.plan.gpus import Gpu, find_gpu
from vectorlm.plan.lora import adapters_of
from vectorlm.plan.shapes import shape_of

SHAPE = shape_of(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)


def a100() -> Gpu:
    gpu = find_gpu("a100")
    assert gpu
    return gpu


def train(**keys: Any) -> TrainParameters:
    given = {"output_dir": "o", "max_seq_len": 4096, "precision": "bf16-mixed"}
    return TrainParameters.model_validate(given | keys)


def taken(work: Work, between: float = 12.5e9, **keys: Any) -> Any:
    settings = train(**keys)
    adapters = adapters_of(settings.lora_peft_config, SHAPE)
    return step_time(SHAPE, settings, adapters, work, a100(), between)


ALONE = Work(1, 4096, 4096.0, 1, 1)
NODE = Work(1, 4096, 4096.0, 4, 4)
NODES = Work(1, 4096, 4096.0, 16, 4)


def test_six_operations_a_parameter_and_token() -> None:
    time = taken(ALONE)
    parameters = SHAPE.parameters - 32000 * 4096  # the embedding is looked up
    attention = 12 * 32 * 4096 * 4096 / 2
    flops = 4096 * (6 * parameters + attention)
    assert time.compute_s == pytest.approx(flops / (312e12 * UTILISATION))
    assert time.links_s == time.waits_s == 0
    assert time.total_s == time.compute_s + time.update_s


def test_recomputing_costs_about_a_third() -> None:
    ratio = taken(ALONE, use_activation_checkpointing=True).compute_s / taken(ALONE).compute_s
    assert 1.3 < ratio < 1.35


def test_the_head_works_on_learned_tokens_only() -> None:
    some = Work(1, 4096, 4096.0, 1, 1, learned=0.25)
    spared = taken(ALONE).compute_s - taken(some).compute_s
    assert spared == pytest.approx(0.75 * 6 * 32000 * 4096 * 4096 / (312e12 * UTILISATION))


def test_the_head_is_not_recomputed() -> None:
    again = taken(ALONE, use_activation_checkpointing=True).compute_s - taken(ALONE).compute_s
    below = SHAPE.parameters - 2 * 32000 * 4096
    flops = 4096 * (2 * below + 4 * 32 * 4096 * 4096 / 2)
    assert again == pytest.approx(flops / (312e12 * UTILISATION))


def test_gradients_reduced_as_computed_send_half() -> None:
    usual, half = (taken(NODES, reduce_dtype=kind).links_s for kind in ("float32", "compute"))
    assert half == pytest.approx(usual * (2 * 2 + 2) / (2 * 2 + 4))
    hybrid = [
        taken(NODES, reduce_dtype=kind, sharding_strategy="HYBRID_SHARD").links_s
        for kind in ("float32", "compute")
    ]
    assert hybrid[1] < 0.6 * hybrid[0]


def test_adapters_cost_two_thirds() -> None:
    ratio = taken(ALONE, lora_peft_config={"r": 8}).compute_s / taken(ALONE).compute_s
    assert 0.65 < ratio < 0.75


def test_32_bits_are_slow() -> None:
    assert taken(ALONE, precision="32-true").compute_s > 5 * taken(ALONE).compute_s


def test_links_inside_a_node_hide_and_slow_ones_between_nodes_do_not() -> None:
    inside, across = taken(NODE), taken(NODES, between=1e9)
    assert 0 < inside.waits_s < 0.1 * inside.compute_s
    assert across.waits_s > across.compute_s
    moved = (2 * 2 + 4) * SHAPE.parameters * 15 / 16
    assert across.links_s == pytest.approx(moved / 1e9)


def test_hybrid_sends_less_between_nodes() -> None:
    work = Work(8, 4096, 4096.0, 16, 4)
    full = taken(work, between=1e9)
    hybrid = taken(work, between=1e9, sharding_strategy="HYBRID_SHARD")
    assert hybrid.links_s < full.links_s / 5
    assert hybrid.total_s < full.total_s


def test_more_micro_batches_take_longer_but_update_once() -> None:
    once, twice = taken(ALONE), taken(Work(2, 4096, 4096.0, 1, 1))
    assert twice.compute_s == pytest.approx(2 * once.compute_s)
    assert twice.update_s == once.update_s


def slurm(**keys: Any) -> Slurm:
    return Slurm.model_validate({"time": "08:00:00"} | keys)


@pytest.mark.parametrize(("hours", "expected"), [(1, 0), (7.8, 0), (7.95, 1), (16, 2), (100, 12)])
def test_requeues(hours: float, expected: int) -> None:
    """Eight hours, less three minutes of lead and three to begin."""
    assert START_S == 180
    assert requeues(hours * 3600, slurm(), 0) == expected


def test_saving_takes_its_time_of_each_start() -> None:
    assert requeues(7.8 * 3600, slurm(), 0) == 0
    assert requeues(7.8 * 3600, slurm(), 10**12) == 1


def test_without_a_job_nothing_is_cut() -> None:
    assert requeues(1e9, None, 0) == 0


def test_a_limit_that_leaves_no_time() -> None:
    assert requeues(3600, slurm(time="00:05:00"), 0) is None
    assert requeues(60, slurm(time="00:08:00"), 10**12) == 0, "done before anything is cut"
