"""Jobs that are interrupted in every way Slurm knows end as one that never was: same losses, same
parameters, same bits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_rows, prepared
from tests.distributed.runs import Run, saving
from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab
from tests.slurm.runs import JobRun

STEPS = 600  # 15 epochs of 160 rows, 4 a step; a checkpoint every 10, an evaluation every 200
LIMIT_S = 300
SETTINGS = {"epochs": 15, "save_frequency": 0.25, "logging_steps": 200, "keep_checkpoints": 3}
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


def assert_same(run: JobRun, expected: Run, steps: int = STEPS) -> None:
    assert run.facts() == expected.facts()
    model, wanted = run.model(), expected.model()
    assert model.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(model[name], tensor), name
    assert run.newest_state()["step"] == steps
    other = JobRun.newest_tensors(expected)  # type: ignore[arg-type]
    assert run.newest_tensors() == other


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
        ("preemption", run.until_saved, lambda: preempt(slurm)),
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
    assert_same(run, uninterrupted)


def evaluating(run: JobRun) -> Callable[[int], None]:
    """Ten steps before an evaluation, which takes much longer than they do."""

    def moment(start: int) -> None:
        run.until_saved(start)
        run.until(lambda: run.checkpoint_steps()[0] % 200 == 190, "checkpoint before an evaluation")
        time.sleep(1.2)

    return moment


def in_a_save(run: JobRun) -> Callable[[int], None]:
    def moment(start: int) -> None:
        run.until_saved(start)
        run.until(saving(run), "save")

    return moment


def preempt(slurm: Lab) -> None:
    urgent = slurm.sbatch("-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 2")
    slurm.wait(urgent)


def crash(slurm: Lab, node: str, noticed: bool) -> None:
    """Unless Slurm notices it, the job's step waits for processes that are gone."""
    slurm.crash(node)
    if noticed:
        slurm.until(lambda: slurm.node_state(node).startswith("down"), f"{node} down", 30)
    slurm.start(node)


def test_a_real_time_limit(
    slurm: Lab, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """Slurm itself asks the run to stop, half a minute before the limit of a minute; a run that
    starts too slowly to hear that is stopped at the limit, and has KillWait seconds to save.
    """
    late = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || sleep 10  # or it is done before the limit'
    run = JobRun(slurm, tmp_path, shared, {"signal_lead_s": 30, "setup": [late]}, **SETTINGS)
    run.submit("--time=1")
    run.until_restarted(1)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    (limited,) = run.starts()[:1]
    assert limited.end is not None
    assert limited.end.outcome == "stopped"
    assert limited.end.signal in ("SIGUSR1", "SIGTERM")
    assert slurm.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(run.job)
    assert run.restarts() == 1
    assert_same(run, uninterrupted)


def test_requeue_where_the_site_forbids_it(
    slurm: Lab, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """Slurm refuses `scontrol requeue`: the same script is submitted anew, and goes on."""
    run = JobRun(slurm, tmp_path, shared, {}, **SETTINGS)
    run.submit("--no-requeue", "--job-name=other-name", "--gres=lscratch:1")
    run.until_saved()
    slurm.signal(run.job, "USR1")
    assert slurm.wait(run.job) == "FAILED"
    assert slurm.fields(run.job)["ExitCode"] == "75:0"
    (following,) = slurm.queue()
    assert "Requested operation is presently disabled" in run.log
    assert f"submitted job {following}, which goes on" in run.log
    facts = slurm.fields(following)
    assert (facts["JobName"], facts["TimeLimit"]) == ("other-name", "00:30:00")
    assert facts["TresPerNode"] == "gres:lscratch:1"
    assert slurm.wait(following, limit_s=LIMIT_S) == "COMPLETED", slurm.account(following)
    assert [start.start.restart for start in run.starts()] == [0, 1]
    assert_same(run, uninterrupted)


def test_one_task_of_an_array(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """Task 1, whose job's number is that of the whole array, is requeued: task 0 runs on."""
    run = JobRun(slurm, tmp_path, shared, {"processes_per_node": 1}, **SETTINGS)
    run.change(sweep={"grid": {"train_parameters.seed": [1, 2]}})
    array = submit(slurm, run)
    tasks = [JobRun.at(slurm, run.output / name, f"{array}_{i}") for i, name in enumerate(NAMES)]
    for task in tasks:
        task.until_saved()
    (undisturbed,) = tasks[0].pids()
    slurm.signal(tasks[1].job, "USR1")
    tasks[1].until_restarted(1)
    assert list(tasks[0].pids()) == [undisturbed]
    for task in tasks:
        assert slurm.wait(task.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(task.job)
    assert [task.restarts() for task in tasks] == [0, 1]
    assert [len(task.starts()) for task in tasks] == [1, 2]
    assert all((task.output / "final-model" / "model.bin").exists() for task in tasks)


NAMES = ("000", "001")


def submit(slurm: Lab, run: JobRun) -> str:
    """Through the user's door."""
    said = slurm.run("vectorlm", "submit", "--config", run.config, cwd=run.folder).stdout
    match = re.search(r"Job (\d+)", said)
    assert match, said
    return match[1]


def test_preemption_with_grace(
    slurm: Lab, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """The signal comes while the job still counts as running; Slurm would not requeue it."""
    run = JobRun(slurm, tmp_path, shared, {"partition": "grace"}, **SETTINGS)
    run.submit()
    run.until_saved()
    preempt(slurm)
    run.until_restarted(1)
    (before, *_) = run.starts()
    assert before.end is not None
    assert before.end.outcome == "stopped"
    assert slurm.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(run.job)
    assert_same(run, uninterrupted)


def test_two_writers(
    slurm_lab: LabMaker, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """A node is cut off while it trains; Slurm starts the job on another one, and both write."""
    lab = slurm_lab(networks=True)
    run = JobRun(lab, tmp_path, shared, {}, **SETTINGS)
    run.submit()
    run.until_saved()
    node = lab.fields(run.job)["NodeList"]
    old = set(run.pids())
    assert len(old) == 2
    lab.unplug(node)
    try:
        run.until_restarted(1)
        run.until_claimed(2)
        claimed = time.monotonic()
        run.until(lambda: not old & set(run.pids()), "end of the old processes", 60)
        print(f"the old start left {time.monotonic() - claimed:.1f} s after the new one began")
        assert lab.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", lab.account(run.job)
    finally:
        lab.plug(node)
    lost, _ = run.starts()
    assert lost.end is None
    said = [failure.message for failure in lost.failures]
    assert any("now belongs to another start of the run" in message for message in said), said
    # The rank that sees it first leaves at once; the other may see no more than that.
    others = ("now belongs to another start of the run", "another rank has left")
    assert all(any(other in message for other in others) for message in said), said
    assert_same(run, uninterrupted)
