"""What a step sends over the links, and which way of sharding that suggests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vectorlm.config.schema import Optimizer, TrainParameters
from vectorlm.plan.links import (
    Rates,
    Shape,
    advise,
    checkpoint_bytes,
    full_shard_s,
    held_bytes,
    hybrid_shard_s,
)
from vectorlm.plan.parameters import Parameters

SEVEN_B = Parameters(7_000_000_000, 7_000_000_000)
ADAPTERS = Parameters(7_000_000_000, 20_000_000)
# Two nodes of four A100s; 50 Gb/s between them, NVLink inside.
TWO_NODES = Shape(8, 4, 1, tokens=4096, peak_flops=312e12, gpu_bytes=80 << 30)
SLOW = Rates(inside=200e9, between=6e9, everywhere=6e9)
FAST = Rates(inside=200e9, between=180e9, everywhere=180e9)


def train(strategy: str = "FULL_SHARD", precision: str = "bf16-mixed", **keys: Any) -> Any:
    return TrainParameters(
        output_dir="out",
        max_seq_len=4096,
        sharding_strategy=strategy,
        precision=precision,
        **keys,
    )


def test_full_shard_gathers_twice_and_reduces_once_a_micro_batch() -> None:
    """An 8 M model in 32 bits on 2 nodes of 2: three times its 32 MB, less a quarter."""
    sizes, shape = Parameters(8_000_000, 8_000_000), Shape(4, 2, 1)
    rates = Rates(inside=1e12, between=25e6, everywhere=25e6)
    taken = full_shard_s(sizes, train(precision="32-true"), shape, rates)
    assert taken == pytest.approx(3 * 32e6 * 3 / 4 / 25e6)
    eight = replace(shape, micro_batches=8)
    assert full_shard_s(sizes, train(precision="32-true"), eight, rates) == pytest.approx(8 * taken)


def test_gradients_reduced_as_computed_are_half() -> None:
    sizes, shape = Parameters(8_000_000, 8_000_000), Shape(4, 2, 1)
    rates = Rates(inside=1e15, between=25e6, everywhere=25e6)
    half = train(reduce_dtype="compute")
    assert full_shard_s(sizes, half, shape, rates) == pytest.approx(3 * 16e6 * 3 / 4 / 25e6)
    assert hybrid_shard_s(sizes, half, shape, rates) == pytest.approx(16e6 / 25e6, rel=1e-3)


def test_hybrid_shard_crosses_nodes_once_a_step() -> None:
    """Whatever the accumulation: one all-reduce of the gradients, 32 MB."""
    sizes, shape = Parameters(8_000_000, 8_000_000), Shape(4, 2, 1)
    rates = Rates(inside=1e15, between=25e6, everywhere=25e6)
    for micro_batches in (1, 8):
        shape = replace(shape, micro_batches=micro_batches)
        taken = hybrid_shard_s(sizes, train(precision="32-true"), shape, rates)
        assert taken == pytest.approx(32e6 / 25e6, rel=1e-3)


def test_hybrid_shard_gathers_inside_the_node() -> None:
    sizes, shape = Parameters(1000, 1000), Shape(8, 4, 3)
    rates = Rates(inside=10.0, between=1e15, everywhere=1.0)
    taken = hybrid_shard_s(sizes, train(), shape, rates)  # bf16 there, 32 bits back
    assert taken == pytest.approx(3 * (2 * 2000 + 4000) * 3 / 4 / 10)
    alone = replace(shape, ranks_per_node=1)
    assert hybrid_shard_s(sizes, train(), alone, replace(rates, inside=None)) < 1e-9


def test_frozen_weights_are_gathered_but_not_reduced() -> None:
    shape, rates = Shape(4, 2, 1), Rates(1e9, 1e9, 1e9)
    taken = full_shard_s(ADAPTERS, train(), shape, rates)
    assert taken == pytest.approx((2 * 2 * 7e9 + 4 * 20e6) * 3 / 4 / 1e9)


def test_what_a_rank_holds() -> None:
    """16 bytes a parameter with AdamW under mixed precision, 8 in pure bf16."""
    assert held_bytes(SEVEN_B, train(), 4) == 16 * 7_000_000_000 // 4
    assert held_bytes(SEVEN_B, train(precision="bf16-true"), 4) == 8 * 7_000_000_000 // 4
    momentum = train(optimizer=Optimizer(name="SGD", kwargs={"momentum": 0.9}))
    assert held_bytes(SEVEN_B, momentum, 1) == 12 * 7_000_000_000
    assert held_bytes(SEVEN_B, train(optimizer=Optimizer(name="SGD")), 1) == 8 * 7_000_000_000
    frozen = 2 * (7_000_000_000 - 20_000_000)
    assert held_bytes(ADAPTERS, train(), 1) == frozen + 16 * 20_000_000


def test_checkpoint_leaves_frozen_weights_out() -> None:
    assert checkpoint_bytes(SEVEN_B, train()) == 12 * 7_000_000_000
    assert checkpoint_bytes(ADAPTERS, train()) == 12 * 20_000_000


def test_slow_links_ask_for_hybrid_shard() -> None:
    advice = advise(SEVEN_B, train("FULL_SHARD"), TWO_NODES, SLOW)
    assert advice.warns
    assert advice.text == (
        "HYBRID_SHARD suits: a step spends about 8.2 s on the links under FULL_SHARD, 4.9 s under "
        "HYBRID_SHARD (26.1 GiB a GPU before activations, which fits in 80 GiB); "
        "set train_parameters.sharding_strategy: HYBRID_SHARD"
    )
    chosen = advise(SEVEN_B, train("HYBRID_SHARD"), TWO_NODES, SLOW)
    assert not chosen.warns
    assert chosen.text.startswith("HYBRID_SHARD suits")
    assert "set train_parameters" not in chosen.text


def test_accumulation_widens_the_difference() -> None:
    text = advise(SEVEN_B, train(), replace(TWO_NODES, micro_batches=8), SLOW).text
    assert "65.3 s on the links under FULL_SHARD, 6.3 s under HYBRID_SHARD" in text


def test_copy_that_does_not_fit_a_node() -> None:
    small = replace(TWO_NODES, gpu_bytes=32 << 30)
    chosen = advise(SEVEN_B, train("HYBRID_SHARD"), small, SLOW)
    assert chosen.warns
    assert chosen.text.startswith("FULL_SHARD suits")
    assert "26.1 GiB a GPU before activations, which does not fit in 32 GiB" in chosen.text
    assert chosen.text.endswith("set train_parameters.sharding_strategy: FULL_SHARD")
    assert not advise(SEVEN_B, train("FULL_SHARD"), small, SLOW).warns


def test_fast_links_leave_the_choice() -> None:
    """What hides behind the computation is no reason to change anything."""
    busy = replace(TWO_NODES, tokens=400_000)
    for strategy in ("FULL_SHARD", "HYBRID_SHARD"):
        advice = advise(SEVEN_B, train(strategy), busy, FAST)
        assert not advice.warns
        assert advice.text.startswith("either suits")


def test_small_difference_is_no_warning() -> None:
    even = Rates(inside=6.2e9, between=40e9, everywhere=6e9)
    advice = advise(SEVEN_B, train("FULL_SHARD"), TWO_NODES, even)
    assert not advice.warns
    assert advice.text.startswith("HYBRID_SHARD suits")
    assert advice.text.endswith("FULL_SHARD, as configured, costs little more")


def test_full_shard_where_one_reduction_of_everything_costs_more() -> None:
    """Where links between nodes are as good as those inside."""
    flat = Rates(inside=1e9, between=1e9, everywhere=1e9)
    advice = advise(SEVEN_B, train("HYBRID_SHARD"), TWO_NODES, flat)
    assert advice.text.startswith("FULL_SHARD suits")
    assert advice.warns


@pytest.mark.parametrize(
    "other", [train("NO_SHARD"), train("SHARD_GRAD_OP"), train("HYBRID_SHARD", shard_group_size=2)]
)
def test_choices_it_does_not_know_are_left_alone(other: Any) -> None:
    """Whichever of the two would suit."""
    for shape in (TWO_NODES, replace(TWO_NODES, gpu_bytes=32 << 30)):
        advice = advise(SEVEN_B, other, shape, SLOW)
        assert not advice.warns
        assert "set train_parameters" not in advice.text


def test_on_a_cpu_memory_is_not_known() -> None:
    shape = replace(TWO_NODES, gpu_bytes=None, peak_flops=None)
    advice = advise(SEVEN_B, train(), shape, SLOW)
    assert "26.1 GiB a rank before activations; whether that fits is not known on a CPU" in (
        advice.text
    )
    assert advice.warns
    tiny = Parameters(100_000, 100_000)
    assert advise(tiny, train(), shape, SLOW).text.startswith("either suits")
