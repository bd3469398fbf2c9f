"""A run that is interrupted, however, ends as one that never was: same losses, same parameters,
same bits.

Runs are started through the user's door (`vectorlm train`), killed or signalled from outside, and
started again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_rows, prepared
from tests.distributed.ranks import LIMIT_S
from tests.distributed.runs import STEPS, Run, children, logged, rank_pid, saved, saving, wait_for
from vectorlm import checkpoint
from vectorlm.errors import EXIT_OK, EXIT_STOPPED

ROWS, EVAL_ROWS, MANY_EVAL_ROWS = 40, 16, 30


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(ROWS)),
        "eval": prepared(folder / "eval", model, make_rows(EVAL_ROWS, seed=1)),
        "long eval": prepared(folder / "long", model, make_rows(MANY_EVAL_ROWS, seed=2)),
    }


@pytest.fixture(scope="module")
def uninterrupted(shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), shared)
    assert run.finish() == EXIT_OK, run.log
    assert [step["step"] for step in run.steps()] == list(range(2, STEPS + 1, 2))
    return run


def assert_same(run: Run, expected: Run) -> None:
    assert run.facts() == expected.facts()
    model, wanted = run.model(), expected.model()
    assert model.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(model[name], tensor), name
    assert run.last_files() == expected.last_files()


def test_killed_at_random_steps(shared: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    """And the newest checkpoint that the first kill leaves is damaged: an older one is taken."""
    run = Run(tmp_path, shared)
    first, second = sorted(random.Random(7).sample(range(4, STEPS - 2, 2), 2))
    kill_at(run, first)
    newest = checkpoint.newest(run.output)
    assert newest is not None
    flip_a_bit(newest / "__1_0.distcp")
    kill_at(run, second)
    assert f"skipped checkpoint {newest.name}: __1_0.distcp is damaged" in run.log
    assert run.finish() == EXIT_OK, run.log
    assert_same(run, uninterrupted)


def kill_at(run: Run, step: int) -> None:
    process = run.start()
    wait_for(logged(run, step), process)
    os.kill(rank_pid(process.pid), signal.SIGKILL)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    assert "another rank has left or does not answer" in run.log
    assert "rank 1 was ended by SIGKILL" in run.log
    assert "Traceback" not in run.log


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_killed_while_saving(shared: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, shared)
    process = run.start()
    wait_for(saved(run, 2), process)
    pids = [rank_pid(process.pid, rank) for rank in (0, 1)]
    wait_for(saving(run), process)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert saving(run)(), "the kill came too late to leave a half-written checkpoint"
    assert run.finish() == EXIT_OK, run.log
    assert not saving(run)()
    assert_same(run, uninterrupted)


def test_saves_that_training_waits_for(
    shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """What is written in the background is what would have been written at once."""
    run = Run(tmp_path, shared, async_checkpointing=False)
    assert run.finish() == EXIT_OK, run.log
    assert_same(run, uninterrupted)
    assert both_newest(run) == both_newest(uninterrupted)


def both_newest(run: Run) -> list[dict[str, str]]:
    """The last save is waited for in any case, the one before is not."""
    folders = checkpoint.step_folders(run.output)
    assert [checkpoint.step_of(folder) for folder in folders] == [STEPS, STEPS - 2]
    return [run.files(folder) for folder in folders]


def test_asked_to_stop(shared: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    """At any moment: while libraries load, in a step, in an evaluation, in a save."""
    run = Run(tmp_path, shared)
    moments: list[tuple[signal.Signals, Callable[[], bool]]] = [
        (signal.SIGTERM, lambda: len(children(process.pid)) == 2),
        (signal.SIGUSR1, logged(run, 2)),
        (signal.SIGUSR2, logged(run, 8)),
        (signal.SIGTERM, saving(run)),
    ]
    for number, moment in moments:
        process = run.start()
        wait_for(moment, process)
        process.send_signal(number)
        assert process.wait(timeout=60) == EXIT_STOPPED, run.log
        assert f"stopped by {number.name}" in run.log
    assert run.finish() == EXIT_OK, run.log
    assert_same(run, uninterrupted)


def test_stopped_in_an_evaluation(shared: dict[str, Any], tmp_path: Path) -> None:
    """The evaluation steers the learning rate here, so it must count exactly once."""
    settings = {
        "epochs": 1,
        "logging_steps": 1,
        "save_frequency": 1.0,
        "lr_scheduler_type": "plateau-with-warmup",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
    }
    long = {**shared, "eval": shared["long eval"]}
    expected, run = (
        Run(tmp_path / "whole", long, **settings),
        Run(tmp_path / "cut", long, **settings),
    )
    assert expected.finish() == EXIT_OK
    process = run.start()
    wait_for(logged(run, 3), process)
    time.sleep(0.1)  # into the evaluation of step 4, which takes longer than the step
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_STOPPED
    folder = checkpoint.newest(run.output)
    assert folder is not None
    assert checkpoint.read_state(folder)["report_due"] is not None, folder
    assert run.finish() == EXIT_OK
    assert run.facts() == expected.facts()
    assert [fact[0] for fact in run.facts()] == list(range(1, STEPS // 2 + 1))
    assert len({fact[4] for fact in run.facts()}) > 1, "the learning rate never moved"
    for name, tensor in expected.model().items():
        assert torch.equal(run.model()[name], tensor), name


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_damaged_checkpoints_are_named_and_skipped(
    uninterrupted: Run, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "output"
    shutil.copytree(uninterrupted.output, output)
    newest, older = checkpoint.step_folders(output)
    target = newest / ("MANIFEST.json" if damage == "no manifest" else "__1_0.distcp")
    if damage == "flipped":
        flip_a_bit(target)
    elif damage == "truncated":
        os.truncate(target, target.stat().st_size - 1)
    else:
        target.unlink()
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.verify(newest)
    assert checkpoint.newest(output) == older


def test_other_numbers_of_ranks(shared: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    """2 ranks, then 1, then 4 under another strategy: same samples, same losses up to rounding."""
    run = Run(tmp_path, shared)
    stages: list[tuple[int, int, tuple[str, ...]]] = [
        (2, 6, ()),
        (1, 12, ()),
        (
            4,
            STEPS,
            (
                "train_parameters.sharding_strategy=HYBRID_SHARD",
                "train_parameters.shard_group_size=2",
            ),
        ),
    ]
    for ranks, until, overrides in stages:
        process = run.start(ranks, *overrides)
        if until < STEPS:
            wait_for(logged(run, until), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == EXIT_STOPPED, run.log
        else:
            assert process.wait(timeout=LIMIT_S) == EXIT_OK, run.log
    assert "the global batch stays 4 rows" in run.log
    assert len(run.steps()) == len(uninterrupted.steps())
    for step, expected in zip(run.steps(), uninterrupted.steps(), strict=True):
        assert step["tokens"] == expected["tokens"]
        assert step["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert step["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
