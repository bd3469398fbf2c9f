"""What Slurm does to jobs is named right, from what a real Slurm and a real log say of it.

The jobs' ranks are stand-ins: what they would train does not matter here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab

# Begins as the rendered script does; the ranks leave a record of their start, as they do.
SCRIPT = """\
trap : TERM USR1
start=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "== vectorlm: job $SLURM_JOB_ID, start $start, $(date -Is), on $SLURM_JOB_NODELIST"
"""
RANKS = "srun --kill-on-bad-exit=1 --wait=30"
RECORD = """\
import sys
from dataclasses import replace
from vectorlm.cluster import journal
record = replace(journal.new_start(""), hosts=["n1", "n2"], resumed_from=100)
diary, record = journal.Journal.begin(sys.argv[1], record)
journal.remember_job(record.job, sys.argv[1], sys.argv[2])
print("ready", flush=True)
"""


class Job:
    """A submitted stand-in, and what `vectorlm why` says of it."""

    def __init__(self, lab: Lab, folder: Path, ranks: str, *flags: str) -> None:
        self.lab, self.output = lab, folder / "output"
        record = folder / "record.py"
        record.write_text(RECORD)
        worker = folder / "rank.sh"
        worker.write_text(f"#!/bin/bash\n{ranks}\n")
        worker.chmod(0o755)
        begin = f"python {record} {self.output} {folder}/vectorlm-$SLURM_JOB_ID.log"
        script = folder / "job.sh"
        script.write_text(f"#!/bin/bash\n{SCRIPT}{begin}\n{RANKS} {worker}\nexit $?\n")
        log = f"--output={folder}/vectorlm-%j.log"
        self.id = lab.sbatch("-N2", "-n2", "--open-mode=append", log, *flags, script)

    def ready(self) -> Job:
        self.lab.wait_log(self.id, "ready")
        self.lab.wait_log(self.id, "rank", limit_s=20)
        return self

    def why(self, given: str | None = None) -> list[str]:
        return self.lab.run("vectorlm", "why", given or self.id).stdout.splitlines()


SLEEP = "echo rank; sleep 60"


@pytest.fixture(scope="module", autouse=True)
def limited(slurm_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Its time limit, of a minute at least, passes while the other tests run: the last one asks.
    On a cluster of its own, where nothing happens to it.
    """
    folder = tmp_path_factory.mktemp("limited")
    return Job(slurm_lab(nodes=1), folder, "echo rank; sleep 300", "-N1", "--time=1")


def test_cancel(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.cancel(job.id)
    assert slurm.wait(job.id, limit_s=30) == "CANCELLED"
    said = job.why()
    assert said[0] == f"job {job.id}, start 1: cancelled (scancel); there is no checkpoint"
    assert said[2] == "evidence:"
    assert job.why(str(job.output)) == said


def test_cancel_in_the_queue(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP, "--hold")
    assert "held by its user" in job.why()[0]
    assert f"scontrol release {job.id}" in job.why()[1]
    slurm.cancel(job.id)
    slurm.wait(job.id)
    assert "cancelled (scancel) before it began" in job.why()[0]


def test_cancelled_step(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.cancel(f"{job.id}.0")
    slurm.wait(job.id, limit_s=30)
    assert "its step was cancelled" in job.why()[0]


@pytest.mark.parametrize(
    ("flags", "words", "cure"),
    [
        (["--begin=now+1hour"], "may not start yet", "starts by itself"),
        (["--cpus-per-task=8", "--exclusive"], "waits for free nodes", "starts by itself"),
        (["--dependency=afterok:{job}"], "waits for another job to end", "starts by itself"),
    ],
)
def test_waiting(slurm: Lab, tmp_path: Path, flags: list[str], words: str, cure: str) -> None:
    hold = slurm.sbatch("-N2", "-n2", "--exclusive", "--wrap", "sleep 60")
    slurm.wait(hold, "RUNNING")
    job = Job(slurm, tmp_path, SLEEP, *(flag.format(job=hold) for flag in flags))
    slurm.until(lambda: words in job.why()[0], words, 20, job.id)
    assert cure in job.why()[1]


def test_dependency_that_failed(slurm: Lab, tmp_path: Path) -> None:
    failed = slurm.sbatch("--wrap", "exit 1")
    slurm.wait(failed)
    job = Job(slurm, tmp_path, SLEEP, f"--dependency=afterok:{failed}")
    slurm.until(lambda: "failed, so it will never start" in job.why()[0], "reason", 20, job.id)
    assert f"(vectorlm why {failed})" in job.why()[1]


def test_running(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    said = job.why()[0]
    assert said.startswith(f"job {job.id}, start 1: is running, after step 100, last heard of ")


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        ("KILL", "rank 1 on n2 was ended by SIGKILL (Killed), after step 100"),
        ("SEGV", "rank 1 on n2 was ended by SIGSEGV (Segmentation fault), after step 100"),
        ("BUS", "rank 1 on n2 ended with a bus error"),
    ],
)
def test_killed_rank(slurm: Lab, tmp_path: Path, signal: str, words: str) -> None:
    ranks = f'echo rank; [ "$SLURM_PROCID" = 0 ] || kill -{signal} $$; exec sleep 60'
    job = Job(slurm, tmp_path, ranks)
    assert slurm.wait(job.id, limit_s=30) == "FAILED"
    said = job.why()
    assert words in said[0]
    assert "srun: error: n2: task 1: " in said[3]


def test_program_that_is_not_there(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "exec no-such-python -m vectorlm.train")
    slurm.wait(job.id, limit_s=30)
    said = job.why()[0]
    assert "software is missing on a node" in said
    # srun ends at the first rank's exit code, at times before it has passed on what the shell says.
    (log,) = tmp_path.glob("vectorlm-*.log")
    words = "no-such-python: not found"
    assert words in said or (words not in log.read_text() and "exit code 127" in said)


def test_step_that_cannot_be(slurm: Lab, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{SCRIPT}srun -n 999 true\n")
    job = slurm.sbatch(f"--output={tmp_path}/vectorlm-%j.log", script, cwd=tmp_path)
    slurm.wait(job)
    said = slurm.run("vectorlm", "why", job, cwd=tmp_path).stdout
    assert "srun could not start the ranks: More processors requested than permitted" in said


def test_preemption(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.sbatch("-N2", "-n2", "--exclusive", "-p", "urgent", "--wrap", "sleep 3")
    slurm.until(lambda: slurm.fields(job.id)["Restarts"] == "1", "a restart", 20, job.id)
    said = job.why()
    assert said[0].startswith(f"job {job.id}, start 2: waits to start again")
    assert said[-2] == "earlier:"
    assert "start 1: preempted: another job took its nodes; " in said[-1]


def test_requeue(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.requeue(job.id)
    slurm.until(lambda: slurm.log(job.id).count("ready") == 2, "a second start", 30, job.id)
    said = job.why()
    assert said[0].startswith(f"job {job.id}, start 2: is running")
    assert "start 1: requeued (scontrol requeue); " in said[-1]


def test_node_of_the_script_fails_without_a_word(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.crash("n1")
    slurm.until(lambda: slurm.fields(job.id)["Restarts"] == "1", "a restart", 40, job.id)
    assert "start 1: its first node vanished" in job.why()[-1]


def test_node_failure_of_a_job_that_may_not_start_again(slurm: Lab, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SLEEP, "--no-requeue").ready()
    slurm.crash("n2")
    assert slurm.wait(job.id, limit_s=40) == "NODE_FAIL"
    assert "start 1: node n2 failed; there is no checkpoint" in job.why()[0]


def test_task_of_an_array(slurm: Lab, tmp_path: Path) -> None:
    log = f"--output={tmp_path}/vectorlm-%A_%a.log"
    job = slurm.sbatch("--array=0-1", log, "--wrap", "exit 3", cwd=tmp_path)
    slurm.wait(f"{job}_0")
    slurm.wait(f"{job}_1")
    said = slurm.run("vectorlm", "why", f"{job}_1", cwd=tmp_path).stdout
    assert said.startswith(f"job {job}_1, start 1: ")
    whole = slurm.run("vectorlm", "why", job, cwd=tmp_path, check=False)
    assert whole.returncode == 2
    assert f"job {job} is an array of many runs" in whole.stderr


def test_job_that_slurm_has_forgotten(slurm: Lab, tmp_path: Path) -> None:
    """Then the run's own files and the log are enough."""
    job = Job(slurm, tmp_path, SLEEP).ready()
    slurm.cancel(job.id)
    slurm.wait(job.id, limit_s=30)
    command = [Path(sys.executable).parent / "vectorlm", "why", job.id]
    said = slurm.run("env", "PATH=/nowhere", *command).stdout.splitlines()
    assert said[0].startswith(f"job {job.id}, start 1: cancelled (scancel); ")
    assert f"    vectorlm-{job.id}.log:" in said[3]


@pytest.mark.slow
def test_time_limit(limited: Job) -> None:
    assert limited.lab.wait(limited.id, limit_s=180) == "TIMEOUT"
    said = limited.why()
    assert "its time limit (00:01:00) was reached before it had saved" in said[0]
    assert "slurm.signal_lead_s" in said[1]
