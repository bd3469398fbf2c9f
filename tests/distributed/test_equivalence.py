"""Sharded training gives what a plain single-process loop gives: losses, gradients and
parameters.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.distributed.cases import LORA, Case, make_rows, plain_loop, prepared, train_all
from tests.distributed.ranks import run_ranks
from tests.tiny import VOCABULARY

ON_TWO = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
KINDS = {"full": {}, "lora": {"lora_peft_config": LORA}}
LORA_OPTIONS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "init_lora_weights": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear", "bias": "lora_only"},
}
GRID = [
    (strategy, kind, recompute)
    for strategy, kind, recompute in product((*ON_TWO, "HYBRID_SHARD"), KINDS, (False, True))
]


def name_of(strategy: str, kind: str, recompute: bool) -> str:
    return f"{strategy}-{kind}-{'recompute' if recompute else 'plain'}"


def accumulation(strategy: str) -> int:
    """So that every case learns 4 rows a step."""
    return 2 if strategy in ON_TWO else 1


def adapters() -> dict[str, dict[str, Any]]:
    return {name: {"lora_peft_config": {**LORA, **option}} for name, option in LORA_OPTIONS.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    model = model_folder("llama")
    folder = tmp_path_factory.mktemp("equivalence")
    rows = make_rows()
    data = prepared(folder / "data", model, rows)

    def case(name: str, train_bs: int = 1, **train: Any) -> Case:
        return Case(str(model), str(data), str(folder / name), train, train_bs)

    two: dict[str, Case] = {}
    four: dict[str, Case] = {}
    for strategy, kind, recompute in GRID:
        name = name_of(strategy, kind, recompute)
        wanted = {
            "sharding_strategy": strategy,
            "use_activation_checkpointing": recompute,
            "gradient_accumulation_steps": accumulation(strategy),
            **KINDS[kind],
        }
        if strategy == "HYBRID_SHARD":
            four[name] = case(name, **wanted, shard_group_size=2)
        else:
            two[name] = case(name, **wanted)
    two["one micro-batch"] = case("one", train_bs=2)
    two["uneven micro-batches"] = case("uneven", train_bs=3, gradient_accumulation_steps=1)
    two["padded vocabulary"] = case(
        "padded", gradient_accumulation_steps=2, pad_vocab_to_multiple_of=96
    )
    two["whole loading"] = case("whole", gradient_accumulation_steps=2, low_cpu_mem_usage=False)
    two["added up in the compute type"] = case(
        "compute", gradient_accumulation_steps=2, reduce_dtype="compute"
    )
    tied = replace(
        case("tied", gradient_accumulation_steps=2), model=str(model_folder("llama", True))
    )
    two["tied"] = tied
    four["tied, hybrid"] = replace(
        case("tied4", sharding_strategy="HYBRID_SHARD", shard_group_size=2), model=tied.model
    )
    two["sgd"] = case(
        "sgd",
        gradient_accumulation_steps=2,
        optimizer={"name": "SGD", "lr": 0.1, "kwargs": {"momentum": 0.9}},
    )
    for name, option in adapters().items():
        two[name] = case(name, gradient_accumulation_steps=2, **option)
    four["hybrid, accumulated"] = case(
        "hybrid2",
        sharding_strategy="HYBRID_SHARD",
        shard_group_size=2,
        gradient_accumulation_steps=2,
    )
    results = run_ranks(2, train_all, two) | run_ranks(4, train_all, four)
    plain = {kind: plain_loop(case(kind, **KINDS[kind]), rows, 4) for kind in KINDS}
    plain |= {name: plain_loop(two[name], rows, 4) for name in LORA_OPTIONS}
    plain["tied"] = plain_loop(tied, rows, 4)
    plain["sgd"] = plain_loop(two["sgd"], rows, 4)
    plain["six rows"] = plain_loop(two["uneven micro-batches"], rows, 6)
    plain["eight rows"] = plain_loop(four["hybrid, accumulated"], rows, 8)
    return {"results": results, "plain": plain}


def assert_same(result: dict[str, Any], plain: dict[str, Any]) -> None:
    assert len(result["steps"]) == len(plain["steps"])
    for step, expected in zip(result["steps"], plain["steps"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, expected in plain["parameters"].items():
        parameter = result["parameters"][name][: expected.shape[0]]
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(("strategy", "kind", "recompute"), GRID)
def test_every_strategy_equals_the_plain_loop(
    made: dict[str, Any], strategy: str, kind: str, recompute: bool
) -> None:
    assert_same(made["results"][name_of(strategy, kind, recompute)], made["plain"][kind])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("one micro-batch", "full"),
        ("uneven micro-batches", "six rows"),
        ("padded vocabulary", "full"),
        ("whole loading", "full"),
        ("added up in the compute type", "full"),
        ("tied", "tied"),
        ("tied, hybrid", "tied"),
        ("sgd", "sgd"),
        ("hybrid, accumulated", "eight rows"),
    ],
)
def test_other_ways_to_the_same_batch(made: dict[str, Any], name: str, plain: str) -> None:
    assert_same(made["results"][name], made["plain"][plain])


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_options_of_lora(made: dict[str, Any], option: str) -> None:
    assert_same(made["results"][option], made["plain"][option])


def test_training_moves_what_it_should(made: dict[str, Any]) -> None:
    """Guards the comparison itself: parameters that nobody trains would agree as well."""
    full = made["results"]["FULL_SHARD-full-plain"]["parameters"]
    lora = made["results"]["FULL_SHARD-lora-plain"]["parameters"]
    for name, parameter in full.items():
        base = lora[adapted(name)]
        assert not torch.equal(parameter, base), name


def adapted(name: str) -> str:
    """The name of a base parameter inside a PEFT model."""
    layer, _, leaf = name.rpartition(".")
    targets = any(layer.endswith(target) for target in LORA["target_modules"])
    return f"base_model.model.{layer}{'.base_layer' if targets else ''}.{leaf}"


def test_padding_of_the_vocabulary_stays_zero(made: dict[str, Any]) -> None:
    padded = made["results"]["padded vocabulary"]["parameters"]["lm_head.weight"]
    assert padded.shape[0] == 384
    assert not padded[VOCABULARY:].any()
