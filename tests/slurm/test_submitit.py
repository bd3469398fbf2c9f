"""`slurm.launcher: submitit` against a real Slurm: submitted, interrupted, and its results."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core.utils import FailedJobError

from tests.distributed.cases import make_rows, prepared
from tests.distributed.runs import Run
from tests.slurm.lab import Lab
from tests.slurm.runs import JobRun, assert_same

STEPS = 80  # 2 epochs of 160 rows, 4 a step; a checkpoint every 10
SETTINGS = {"epochs": 2, "save_frequency": 0.25, "logging_steps": 40, "keep_checkpoints": 3}


class SubmititRun(JobRun):
    """A run that goes through submitit, by the user's door."""

    def __init__(self, lab: Lab, folder: Path, shared: dict[str, Any], **slurm: Any) -> None:
        super().__init__(lab, folder, shared, {"launcher": "submitit", **slurm}, **SETTINGS)

    def submit(self, *flags: str, environ: dict[str, str] | None = None) -> str:
        command = ["vectorlm", "submit", "--config", self.config.name, *flags]
        said = self.lab.run(*command, cwd=self.folder).stdout
        found = re.search(r"^Job (\d+) trains", said, re.M)
        assert found, said
        self.job = found[1]
        return self.job

    @property
    def by_submitit(self) -> Path:
        return self.output / "submitted/0001/submitit"

    def known_to_submitit(self, name: str = "", processes: int = 2) -> submitit.SlurmJob[Any]:
        """As a user of submitit gets hold of a job."""
        job = name or self.job
        return submitit.SlurmJob(folder=self.by_submitit, job_id=job, tasks=range(processes))

    def has_result(self) -> bool:
        return any(self.by_submitit.glob("*_result.pkl"))

    def until_step(self, step: int) -> None:
        self.until(lambda: max([*self.checkpoint_steps(), 0]) >= step, f"checkpoint {step}")

    def pids(self, rank: int | None = None) -> Iterator[int]:
        wanted = f"SLURM_JOB_ID={self.lab.fields(self.job)['JobId']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environ = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[1:4] == [b"-u", b"-m", b"submitit.core._submit"] and wanted in environ:
                yield int(folder.name)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("submitit")
    model = model_folder("llama")
    return {
        "model": model,
        "data": prepared(folder / "data", model, make_rows(160)),
        "eval": prepared(folder / "eval", model, make_rows(40, seed=1)),
    }


def test_requeued_again_and_again(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """By signals that submitit requeues at, and by Slurm itself: as a run that was left alone."""
    whole = Run(tmp_path / "whole", shared, **SETTINGS)
    process = whole.start()
    run = SubmititRun(slurm, tmp_path / "cut", shared, nodes=2, processes_per_node=1)
    run.submit()
    interruptions = [
        (
            "USR2 while Python loads",
            lambda: run.until(lambda: len(list(run.pids())) == 2, "processes"),
            lambda: slurm.signal(run.job, "USR2"),
        ),
        ("USR1 in a step", lambda: run.until_step(10), lambda: slurm.signal(run.job, "USR1")),
        ("requeue", lambda: run.until_step(40), lambda: slurm.requeue(run.job)),
    ]
    for number, (name, moment, interrupt) in enumerate(interruptions, start=1):
        moment()
        interrupt()
        run.until_restarted(number)
        assert not run.has_result(), name
    assert slurm.wait(run.job, limit_s=120) == "COMPLETED", slurm.account(run.job)
    ends = [past.end and (past.end.outcome, past.end.signal) for past in run.starts()]
    expected = [("stopped", s) for s in ("SIGUSR2", "SIGUSR1", "SIGTERM")]
    assert ends == [*expected, ("finished", None)]
    result = {"outcome": "finished", "output_dir": str(run.output), "step": STEPS}
    assert run.known_to_submitit().results() == [result, result]
    assert process.wait(timeout=120) == 0, whole.log
    assert_same(run, whole, STEPS)
    why = slurm.run("vectorlm", "why", run.job).stdout
    assert why.startswith(f"job {run.job}, start 4: finished, after step {STEPS}\n")
    assert "start 2: stopped on request by SIGUSR1; everything is saved" in why


def test_an_array_that_is_not_requeued(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """The task that is asked to stop leaves that as its result; the other one finishes."""
    run = SubmititRun(slurm, tmp_path, shared, processes_per_node=1, requeue=False)
    run.change(sweep={"grid": {"train_parameters.seed": [1, 2]}, "at_once": 2})
    array = run.submit()
    tasks = [JobRun.at(slurm, run.output / f"00{i}", f"{array}_{i}") for i in range(2)]
    run.until(lambda: bool(tasks[1].checkpoint_steps()), "checkpoint")
    slurm.signal(tasks[1].job, "USR2")
    for task in tasks:
        assert slurm.wait(task.job, limit_s=120) == "COMPLETED", slurm.account(task.job)
    finished, stopped = (run.known_to_submitit(task.job, processes=1).result() for task in tasks)
    outputs = [str(task.output) for task in tasks]
    steps = max(tasks[1].checkpoint_steps())
    assert finished == {"outcome": "finished", "output_dir": outputs[0], "step": 2 * STEPS}
    assert stopped == {"outcome": "stopped", "output_dir": outputs[1], "step": steps}
    assert steps < 2 * STEPS  # one process makes smaller steps
    assert "not started again: slurm.requeue is false" in slurm.log(tasks[1].job)
    status = slurm.run("vectorlm", "status", tasks[1].job).stdout
    assert "stopped" in status


def test_a_mistake_is_told_by_the_result(
    slurm: Lab, shared: dict[str, Any], tmp_path: Path
) -> None:
    run = SubmititRun(slurm, tmp_path, {**shared, "data": tmp_path / "nowhere"})
    run.output = tmp_path / "it's [x] $(touch canary)"
    run.submit(f"--set=train_parameters.output_dir={run.output}", "--force")
    assert slurm.wait(run.job) == "FAILED"
    with pytest.raises(FailedJobError, match=r"nowhere: (?s:.*)"):
        run.known_to_submitit().task(0).result()
    why = slurm.run("vectorlm", "why", run.job).stdout
    assert f"{tmp_path}/nowhere" in why, why
    assert run.restarts() == 0
    assert not list(tmp_path.rglob("canary"))


def test_a_refusal_names_the_key(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    run = SubmititRun(slurm, tmp_path, shared, partition="nope")
    command = ["vectorlm", "submit", "--force", "--config", run.config]
    done = slurm.run(*command, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert re.search(r"sbatch refused the job: .*\nchange slurm\.partition", done.stderr)
    assert "Traceback" not in done.stderr
    assert list((run.output / "submitted").iterdir()) == []


def test_prepared_before_and_cancelled(slurm: Lab, shared: dict[str, Any], tmp_path: Path) -> None:
    """Training waits for its data; what is cancelled is not requeued, and has no result."""
    run = SubmititRun(slurm, tmp_path, shared, preprocess={"cpus": 2, "mem": "2G"})
    (tmp_path / "raw.jsonl").write_text('{"text": "The quick brown fox jumps."}\n' * 400)
    source = {"load_path": "raw.jsonl", "save_path": "rows", "packing_type": "full"}
    run.change(dataset_preprocess=source, dataset={"train_ds": "rows"})
    run.submit("--with-preprocess")
    assert re.fullmatch(r"afterok:\d+\(unfulfilled\)", slurm.fields(run.job)["Dependency"])
    run.until(lambda: bool(run.starts()), "start", 120)
    slurm.cancel(run.job)
    assert slurm.wait(run.job) == "CANCELLED"
    assert run.restarts() == 0
    assert not run.has_result()
    for path in (run.by_submitit, run.by_submitit.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
