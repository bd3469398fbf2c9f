"""What is proposed when a run does not fit: each change is planned like the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_rows
from vectorlm.config.checks import problems
from vectorlm.config.schema import Config
from vectorlm.plan.changes import (
    LEARNS_LESS,
    Change,
    accumulation_for,
    compared,
    find_changes,
    largest_batch,
    patched,
    told,
)
from vectorlm.plan.gpus import Gpu, find_gpu
from vectorlm.plan.outlook import make_outlook

SEVEN_B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SEVENTY_B = SEVEN_B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def a100() -> Gpu:
    gpu = find_gpu("a100")
    assert gpu
    return gpu


def config(folder: Path, model: dict[str, Any] = SEVEN_B, rows: int = 4, **keys: Any) -> Config:
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    slurm = keys.pop("slurm", None)
    train = {"output_dir": "o", "max_seq_len": 4096, "use_mp": True} | keys
    return Config.model_validate(
        {
            "model": str(folder),
            "train_parameters": train,
            "dataset": {"train_ds": "absent", "train_bs": rows},
        }
        | ({"slurm": slurm} if slurm else {})
    )


def changes(planned: Config, count: int | None = 4) -> list[Change]:
    return find_changes(planned, make_outlook(planned, a100(), count), a100(), count)


def test_what_fits_comes_first_and_the_fastest_on_top(tmp_path: Path) -> None:
    found = changes(config(tmp_path))
    assert found[0].fits
    verdicts = [{True: 0, None: 1, False: 2}[change.fits] for change in found]
    assert verdicts == sorted(verdicts)
    alike = [c for c in found if c.fits and c.price == found[0].price]
    assert [c.slower for c in alike] == sorted(c.slower or 0 for c in alike)


def test_each_is_what_the_planner_says_of_the_patched_file(tmp_path: Path) -> None:
    planned = config(tmp_path)
    now = make_outlook(planned, a100(), 4)
    for change in changes(planned):
        assert change.outlook.needed_bytes < now.needed_bytes
        if "GPUs" not in change.title:
            assert make_outlook(patched(planned, change.patch), a100(), 4) == change.outlook


def test_micro_batches_keep_the_rows_of_a_step(tmp_path: Path) -> None:
    planned = config(tmp_path, gradient_accumulation_steps=3)
    for change in changes(planned):
        if change.title.startswith("micro-batches"):
            changed = patched(planned, change.patch)
            assert changed.dataset
            steps = changed.train_parameters.gradient_accumulation_steps
            assert changed.dataset.train_bs * steps == 12


def titles(found: list[Change]) -> str:
    return "\n".join(change.title for change in found)


def test_every_kind_of_change_is_thought_of(tmp_path: Path) -> None:
    wasteful = config(tmp_path, sharding_strategy="NO_SHARD", use_mp=False)
    found = titles(changes(wasteful))
    for words in (
        "activation checkpointing",
        "share everything",
        "micro-batches of 1",
        "all of these",
        "bf16",
        "SGD",
        "LoRA",
        "half as long",
    ):
        assert words in found, words
    assert "GPUs" in titles(changes(config(tmp_path)))


def test_what_is_so_already_is_not_proposed(tmp_path: Path) -> None:
    frugal = config(
        tmp_path,
        SEVENTY_B,
        1,
        use_activation_checkpointing=True,
        optimizer={"name": "SGD"},
        lora_peft_config={"r": 8},
    )
    found = titles(changes(frugal, 1))
    for words in ("checkpointing", "share", "micro-batches", "SGD", "LoRA", "bf16"):
        assert words not in found


@pytest.mark.parametrize("given", [{"use_mp": True}, {"precision": "bf16-mixed"}, {}], ids=str)
def test_pure_bf16_is_a_valid_change_that_names_its_price(
    given: dict[str, Any], tmp_path: Path
) -> None:
    planned = config(tmp_path, **{"use_mp": False} | given)
    now = make_outlook(planned, a100(), 4)
    change = next(c for c in changes(planned) if "pure bf16" in c.title)
    changed = patched(planned, change.patch)
    assert changed.train_parameters.effective_precision == "bf16-true"
    assert problems(changed) == []
    assert "less accurate" in change.title
    assert change.price == LEARNS_LESS
    states = now.breakdown["optimizer"]
    assert change.outlook.breakdown["optimizer"] == pytest.approx(states / 2, rel=1e-6)


def test_adapters_gain_nothing_by_pure_bf16(tmp_path: Path) -> None:
    assert "pure bf16" not in titles(changes(config(tmp_path, lora_peft_config={"r": 8})))
    full = config(tmp_path, use_mp=False, lora_peft_config={"r": 8})
    assert "pure bf16" in titles(changes(full))


def test_a_change_is_told_to_be_done_by_hand(tmp_path: Path) -> None:
    patch = {"train_parameters.shard_group_size": None, "train_parameters.use_mp": False}
    assert told(patch) == (
        "train_parameters.shard_group_size: (remove it), train_parameters.use_mp: false"
    )


def test_a_v100_is_not_sent_to_bf16(tmp_path: Path) -> None:
    gpu = find_gpu("v100-32")
    planned = config(tmp_path, use_mp=False)
    found = find_changes(planned, make_outlook(planned, gpu, 4), gpu, 4)
    assert "bf16" not in titles(found)


def test_a_model_too_large_for_a_node_is_told_how_many_it_takes(tmp_path: Path) -> None:
    slurm = {"gpus_per_node": 4, "gpu_type": "a100"}
    planned = config(tmp_path, SEVENTY_B, 1, slurm=slurm, gradient_accumulation_steps=8)
    best = changes(planned, None)[0]
    fewest = next(c for c in changes(planned, None) if "all that learns the same" in c.title)
    assert best.fits
    assert fewest.fits
    assert fewest.outlook.hardware.ranks == 32
    assert fewest.patch["slurm.nodes"] * 4 == 32
    assert fewest.patch["train_parameters.gradient_accumulation_steps"] == 1


def test_sgd_leaves_no_argument_that_it_does_not_know(tmp_path: Path) -> None:
    planned = config(tmp_path, optimizer={"name": "AdamW", "lr": 1e-5, "betas": [0.9, 0.95]})
    change = next(c for c in changes(planned) if "SGD" in c.title)
    optimizer = patched(planned, change.patch).train_parameters.optimizer
    assert optimizer.name == "SGD"
    assert optimizer.lr == 1e-5
    assert "betas" not in optimizer.model_fields_set


def test_largest_batch_is_the_last_that_fits(tmp_path: Path) -> None:
    planned = config(tmp_path, use_activation_checkpointing=True)
    rows, outlook = largest_batch(planned, a100(), 4)
    assert rows > 4
    assert outlook.micro_batch == rows
    assert make_outlook(planned, a100(), 4, rows).fits
    assert not make_outlook(planned, a100(), 4, rows + 1).fits
    assert accumulation_for(planned, rows) == 1
    assert accumulation_for(config(tmp_path, rows=8, gradient_accumulation_steps=5), 16) == 3


def test_largest_batch_is_planned_as_it_is_advised(tmp_path: Path) -> None:
    """With the accumulation that goes with it, and no larger than the data has for a rank."""
    planned = config(tmp_path, use_activation_checkpointing=True, gradient_accumulation_steps=8)
    rows, outlook = largest_batch(planned, a100(), 4)
    assert outlook.tokens_per_step == rows * accumulation_for(planned, rows) * 4 * 4096
    few = write_rows(tmp_path / "few", [[[5] * 8]] * 12, 4096)
    assert planned.dataset
    data = planned.dataset.model_copy(update={"train_ds": str(few)})
    assert largest_batch(planned.model_copy(update={"dataset": data}), a100(), 4)[0] == 3


def test_no_batch_fits(tmp_path: Path) -> None:
    rows, outlook = largest_batch(config(tmp_path), a100(), 1)
    assert rows == 0
    assert outlook.micro_batch == 1


def test_comparison_of_strategies(tmp_path: Path) -> None:
    own = config(tmp_path, sharding_strategy="HYBRID_SHARD", shard_group_size=2)
    rows = dict(compared(own, a100(), 4))
    assert len(rows) == 8
    assert rows["FULL_SHARD"].needed_bytes < rows["NO_SHARD"].needed_bytes
    recomputed = rows["FULL_SHARD + checkpointing"]
    assert recomputed.needed_bytes < rows["FULL_SHARD"].needed_bytes
