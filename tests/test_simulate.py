"""The simulation: as much memory as real ranks hold, and what CUDA would hold where it differs."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planner_grid import (
    AMPERE,
    Point,
    by_depth,
    estimated,
    grid,
    measured,
    simulated,
)
from tests.tiny import FAMILIES
from vectorlm.config.schema import Config, DatasetConfig, Optimizer, TrainParameters
from vectorlm.errors import ConfigError, VectorLMError
from vectorlm.plan.memory import OPTIMIZER_STEP
from vectorlm.plan.simulated import Job, Simulated
from vectorlm.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
SMALL = Point("small", 2, precision="32-true", length=256, layers=3)


def with_train(job: Job, **changes: Any) -> Job:
    train = job.config.train_parameters.model_copy(update=changes)
    return replace(job, config=job.config.model_copy(update={"train_parameters": train}))


# --- against real ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [
        replace(SMALL, precision="bf16-mixed", recompute=True),
        replace(SMALL, strategy="NO_SHARD", lora=True, accumulation=2),
    ],
    ids=["sharded", "replicated"],
)
def test_real_ranks_hold_as_much(point: Point, tmp_path: Path) -> None:
    """By what the CPU's allocator did in a run of the real trainer."""
    found = simulate(point.job(tmp_path, gpu_capability=None)).peak_bytes
    assert found == pytest.approx(measured(point, tmp_path), rel=0.02)


def test_what_is_held_all_the_time_is_exact(tmp_path: Path) -> None:
    """16 bytes a parameter, spread evenly."""
    found = simulated(replace(SMALL, ranks=4), tmp_path)
    hidden, wide, vocabulary, layers = 512, 1408, 8192, 3
    count = 2 * vocabulary * hidden + hidden
    count += layers * (4 * hidden * hidden + 3 * hidden * wide + 2 * hidden)
    assert found.breakdown["parameters"] == pytest.approx(count * 4 / 4, rel=1e-3)
    assert found.breakdown["optimizer"] == pytest.approx(count * 8 / 4, rel=1e-3)
    assert found.moments[OPTIMIZER_STEP] == pytest.approx(count * 16 / 4, rel=1e-3)
    assert found.peak_bytes == sum(found.breakdown.values())


# --- what CUDA does otherwise ---------------------------------------------------------------------


def activations(point: Point, folder: Path, **changes: Any) -> int:
    """At the end of the forward pass nothing else grows with the rows' length."""
    found = simulate(with_train(point.job(folder), **changes))
    static = found.breakdown["parameters"] + found.breakdown["optimizer"]
    return found.moments["forward of block 3 of 3"] - static


@pytest.mark.parametrize(
    ("precision", "flash", "installed"),
    [
        ("bf16-mixed", True, False),
        ("bf16-mixed", True, True),
        ("bf16-mixed", False, False),
        ("32-true", True, False),
    ],
    ids=["varlen", "flash-attn", "sdpa", "32 bits"],
)
def test_no_scores_are_kept(
    precision: str, flash: bool, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores would grow with the square of the length; also of grouped heads."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: installed or None if name == "flash_attn" else find_spec(name, *rest),
    )
    point = replace(SMALL, model="small, grouped heads", precision=precision)
    sizes = [
        activations(replace(point, length=length), tmp_path, use_flash_attention=flash)
        for length in (1024, 2048, 3072)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.01)


def test_dropout_of_scores_keeps_none(tmp_path: Path) -> None:
    """The CPU's kernel has no dropout, and would keep all scores."""
    job = replace(SMALL, precision="bf16-mixed").job(tmp_path)
    file = Path(job.config.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.5}))
    sizes = [
        simulate(with_train(job, max_seq_len=length)).breakdown["activations"]
        for length in (1024, 2048, 3072)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.01)


def test_flash_attn_keeps_less_of_grouped_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes keys and values as they are; torch's kernel has them spread over all heads."""
    point = replace(SMALL, model="small, grouped heads", precision="bf16-mixed", length=2048)
    spread = activations(point, tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: True if name == "flash_attn" else find_spec(name, *rest),
    )
    heads, kv_heads, head, layers = 8, 2, 64, 3
    saved = 2 * (heads - kv_heads) * head * 2048 * 2 * layers
    assert spread - activations(point, tmp_path) == pytest.approx(saved, rel=0.1)


def test_dropout_keeps_a_byte_an_entry(tmp_path: Path) -> None:
    job = replace(SMALL, length=2048).job(tmp_path)
    plain, dropped = (
        simulate(
            with_train(
                job, lora_peft_config={"target_modules": ["up_proj"], "lora_dropout": dropout}
            )
        ).moments["backward of the loss"]
        for dropout in (0.0, 0.5)
    )
    # What is left is kept in the place of what was there. The first block needs no mask: no
    # gradient goes further.
    assert dropped - plain == 2 * 2048 * 512


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "states"), [("SGD", 0), ("RMSprop", 1), ("AdamW", 2), ("NAdam", 2)]
)
def test_optimizers_keep_their_states(name: str, states: int, tmp_path: Path) -> None:
    found = simulate(with_train(SMALL.job(tmp_path), optimizer=Optimizer(name=name)))
    expected = states * found.breakdown["parameters"]
    assert found.breakdown["optimizer"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("gpu", "copies"), [(AMPERE, 1.0), (None, 0.25)], ids=["GPU", "CPU"])
def test_on_gpus_optimizers_step_through_all_tensors_at_once(
    gpu: tuple[int, int] | None, copies: float, tmp_path: Path
) -> None:
    """On a CPU through one after the other: the largest, an embedding, is a fourth of all."""
    found = simulate(with_train(SMALL.job(tmp_path, gpu), optimizer=Optimizer(name="RMSprop")))
    parameters = found.breakdown["parameters"]
    needs = found.moments[OPTIMIZER_STEP] - 3 * parameters
    assert needs == pytest.approx(copies * parameters, rel=0.1)


@pytest.mark.parametrize("name", ["Adafactor", "Rprop"])
def test_optimizers_that_cannot_update_shards_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is no optimizer"):
        simulate(with_train(SMALL.job(tmp_path), optimizer=Optimizer(name=name)))


def test_more_micro_batches_than_two_change_nothing(tmp_path: Path) -> None:
    """Between copies sums are kept from one to the next."""
    point = replace(SMALL, ranks=4, strategy="HYBRID_SHARD")
    one, two, three = (
        simulated(replace(point, accumulation=n), tmp_path).peak_bytes for n in (1, 2, 3)
    )
    assert one < two == three


def test_recomputed_blocks_keep_their_inputs_only(tmp_path: Path) -> None:
    point = replace(SMALL, length=2048)
    kept, recomputed = (
        activations(replace(point, recompute=again), tmp_path) for again in (False, True)
    )
    assert recomputed < 0.5 * kept


def test_moments_are_named(tmp_path: Path) -> None:
    found = simulated(SMALL, tmp_path)
    assert list(found.moments) == [
        "beginning of the forward pass",
        *(f"forward of block {k} of 3" for k in (1, 2, 3)),
        "end of the forward pass",
        "backward of the loss",
        *(f"backward of block {k} of 3" for k in (3, 2, 1)),
        "end of the backward pass",
        "the optimizer's step",
    ]
    assert found.moments[found.moment] == found.peak_bytes


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_simulated(family: str, model_folder: Any) -> None:
    config = Config(
        model=str(model_folder(family)),
        train_parameters=TrainParameters(output_dir="out", max_seq_len=64),
        dataset=DatasetConfig(train_ds="nowhere", train_bs=2),
    )
    found: Simulated = simulate(Job(config, 2, 2))
    assert found.breakdown["activations"] > 0


def test_a_real_process_group_is_not_touched(one_rank: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="fake process group"):
        simulated(SMALL, tmp_path)
    assert one_rank.sum([1.0]) == [1.0]


# --- the grid, and real sizes ---------------------------------------------------------------------


def test_a_few_layers_tell_of_many(tmp_path: Path) -> None:
    point = replace(grid()[5], model="small", layers=0)
    assert by_depth(point, tmp_path) == pytest.approx(
        simulated(point, tmp_path).peak_bytes, rel=1e-3
    )


def test_the_grid_is_what_it_should_be() -> None:
    points = grid()
    assert len(set(points)) >= 60
    asked = {"FULL_SHARD", "HYBRID_SHARD", "NO_SHARD"}
    assert {p.strategy for p in points} == asked
    for model in {p.model for p in points}:
        mine = [p for p in points if p.model == model]
        assert {p.ranks for p in mine} == {1, 4, 8}
        assert {(p.lora, p.recompute) for p in mine} == {
            (a, b) for a in (True, False) for b in (True, False)
        }


@pytest.mark.slow
@pytest.mark.parametrize("i", range(0, 72, 6))
def test_the_estimate_is_near_the_simulation(i: int, tmp_path: Path) -> None:
    """Every sixth point; all of them: benchmarks/planner_grid.py."""
    point = grid()[i + i // 12]
    assert estimated(point, tmp_path) == pytest.approx(by_depth(point, tmp_path), rel=0.10)


@pytest.mark.slow
def test_seven_billion_in_30_seconds_and_2_gib(tmp_path: Path) -> None:
    from vectorlm.plan.simulated import job_to_json

    job = Point("Llama 7B", 4, recompute=True, length=4096).job(tmp_path, AMPERE)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "vectorlm.simulate"],
        input=job_to_json(job),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert '"peak_bytes": 298' in done.stdout  # 27.8 GiB
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of a core's time: other work on the machine does not count.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 30
    assert after.ru_maxrss < 2 * 2**20


def test_errors_stay_what_they_are(tmp_path: Path) -> None:
    config = SMALL.job(tmp_path).config.model_copy(update={"model": "nowhere/at-all"})
    with pytest.raises(VectorLMError, match="neither a folder"):
        simulate(Job(config, 1, 1))
