"""Jobs that are interrupted once, in circumstances of their own: by a real time limit, in a grace
time, by a cut network, as one task of an array, where the site forbids requeueing. They, too, end
as a job that never was interrupted. Where Slurm is slow, the processes are held meanwhile.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import make_rows, prepared
from tests.distributed.runs import Run
from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab
from tests.slurm.runs import JobRun, assert_same, held, preempt

STEPS = 240  # 3 epochs of 160 rows, 2 a step; a checkpoint every 10, an evaluation every 80
LIMIT_S = 300
SETTINGS = {
    "epochs": 3,
    "gradient_accumulation_steps": 1,
    "save_frequency": 0.125,
    "logging_steps": 80,
    "keep_checkpoints": 3,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("requeue")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(160)),
        "eval": prepared(folder / "eval", model, make_rows(40, seed=1)),
    }


@pytest.fixture(scope="module")
def uninterrupted(shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without Slurm: `vectorlm train` on two processes."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), shared, **SETTINGS)
    assert run.finish() == 0, run.log
    return run


def test_a_real_time_limit(
    slurm: Lab, shared: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """Slurm itself asks the run to stop, half a minute or a whole one before the limit."""
    run = JobRun(slurm, tmp_path, shared, {"signal_lead_s": 30}, **SETTINGS)
    run.submit()
    run.until_saved()
    with held(list(run.pids())):
        limit(run, soon(slurm.fields(run.job)["RunTime"]))
        run.until(lambda: run.restarts() == 1, "restart", 120)
    limit(run, 10)
    (limited,) = run.starts()[:1]
    assert limited.end is not None
    assert (limited.end.outcome, limited.end.signal) == ("stopped", "SIGUSR1")
    assert slurm.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(run.job)
    assert run.restarts() == 1
    assert_same(run, uninterrupted, STEPS)


def limit(run: JobRun, minutes: int) -> None:
    run.lab.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")


def soon(run_time: str) -> int:
    """The minutes after which at least half a one is left: Slurm looks every 30 s."""
    hours, minutes, seconds = map(int, run_time.split(":"))
    return (hours * 3600 + minutes * 60 + seconds + 30) // 60 + 1


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
    assert_same(run, uninterrupted, STEPS)


def test_one_task_of_an_array(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """Task 1, whose job's number is that of the whole array, is requeued: task 0 runs on."""
    run = JobRun(slurm, tmp_path, shared, {"processes_per_node": 1}, **SETTINGS)
    run.change(sweep={"grid": {"train_parameters.seed": [1, 2]}})
    array = submit(slurm, run)
    tasks = [JobRun.at(slurm, run.output / name, f"{array}_{i}") for i, name in enumerate(NAMES)]
    for task in tasks:
        task.until_saved()
    (undisturbed,) = tasks[0].pids()
    with held([undisturbed]):
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
    preempt(run)
    run.until_restarted(1)
    (before, *_) = run.starts()
    assert before.end is not None
    assert before.end.outcome == "stopped"
    assert slurm.wait(run.job, limit_s=LIMIT_S) == "COMPLETED", slurm.account(run.job)
    assert_same(run, uninterrupted, STEPS)


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
        cut_off = max(run.checkpoint_steps())
        run.until(lambda: max(run.checkpoint_steps()) > cut_off, "checkpoint of the cut-off node")
        with held(old):
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
    assert_same(run, uninterrupted, STEPS)
