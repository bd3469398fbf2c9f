"""A job that is interrupted in every way Slurm knows ends as one that never was: same losses, same
parameters, same bits. Jobs that are interrupted once, in other circumstances: test_requeue.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import make_rows, prepared
from tests.distributed.runs import Run, saving
from tests.slurm.lab import Lab
from tests.slurm.runs import JobRun, assert_same, preempt
from vectorlm import checkpoint

STEPS = 480  # 6 epochs of 160 rows, 2 a step; a checkpoint every 10
EVALUATION = 120  # steps from one to the next
LIMIT_S = 300
SETTINGS = {
    "epochs": 6,
    "gradient_accumulation_steps": 1,
    "save_frequency": 0.125,
    "logging_steps": EVALUATION,
    "keep_checkpoints": 3,
}
TWO_NODES = {"nodes": 2, "processes_per_node": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("survival")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(160)),
        "eval": prepared(folder / "eval", model, make_rows(800, seed=1)),
    }


@pytest.fixture(scope="module")
def uninterrupted(shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without Slurm: `vectorlm train` on two processes."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), shared, **SETTINGS)
    assert run.finish() == 0, run.log
    return run


def test_ten_interruptions(
    slurm: Lab, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """While libraries load, while the model loads, in a step, in an evaluation, in a save; by
    signals, requeue, preemption, the kill of a rank and the loss of a node.
    """
    run = JobRun(slurm, tmp_path, shared, TWO_NODES, **SETTINGS)
    run.submit()
    interruptions: list[tuple[str, Callable[[int], None], Callable[[], None]]] = [
        ("USR1 while Python starts", run.until_begun, lambda: slurm.signal(run.job, "USR1")),
        ("USR2 while the model loads", run.until_claimed, lambda: slurm.signal(run.job, "USR2")),
        ("USR1 in a step", run.until_saved, lambda: slurm.signal(run.job, "USR1")),
        ("TERM in an evaluation", evaluating(run), lambda: slurm.signal(run.job, "TERM")),
        ("requeue in a step", run.until_saved, lambda: slurm.requeue(run.job)),
        ("USR1 in a save", in_a_save(run), lambda: slurm.signal(run.job, "USR1")),
        ("kill -9 of a rank", run.until_saved, lambda: run.kill(1)),
        ("preemption", run.until_saved, lambda: preempt(run)),
        ("a node starts anew at once", run.until_saved, lambda: crash(slurm, "n2", noticed=False)),
        ("crash of the first node", run.until_saved, lambda: crash(slurm, "n1", noticed=True)),
    ]
    for number, (name, moment, interrupt) in enumerate(interruptions, start=1):
        moment(number)
        interrupted = time.monotonic()
        interrupt()
        run.until_restarted(number)
        took = time.monotonic() - interrupted
        print(
            f"{name}: restart counted after {took:.1f} s, checkpoint {run.checkpoint_steps()[:1]}"
        )
        assert took < 60, name
        if name == "TERM in an evaluation":
            assert run.newest_state()["report_due"], "the signal did not come in an evaluation"
    assert slurm.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(run.job)
    assert run.restarts() == len(interruptions)
    assert_same(run, uninterrupted, STEPS)


def evaluating(run: JobRun) -> Callable[[int], None]:
    """As long after the checkpoint ten steps before as those took that led to it, and a little: the
    evaluation takes much longer than ten steps do.
    """

    def moment(start: int) -> None:
        run.until_saved(start)
        before = EVALUATION - 10
        run.until(lambda: run.checkpoint_steps()[0] % EVALUATION == before, "checkpoint before one")
        last, one_before = (saved_at(folder) for folder in checkpoint.step_folders(run.output)[:2])
        time.sleep(max(0.0, last + (last - one_before) + 0.2 - time.time()))

    return moment


def saved_at(folder: Path) -> float:
    return (folder / checkpoint.MANIFEST).stat().st_mtime


def in_a_save(run: JobRun) -> Callable[[int], None]:
    def moment(start: int) -> None:
        run.until_saved(start)
        run.until(saving(run), "save")

    return moment


def crash(slurm: Lab, node: str, noticed: bool) -> None:
    """Unless Slurm notices it, the job's step waits for processes that are gone."""
    slurm.crash(node)
    if noticed:
        slurm.until(lambda: slurm.node_state(node).startswith("down"), f"{node} down", 30)
    slurm.start(node)
