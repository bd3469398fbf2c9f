"""`status` asks a real Slurm: jobs that wait, run, are requeued, cancelled or forgotten."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.actor import ROOT, command
from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab
from vectorlm import status_view
from vectorlm.cli import main
from vectorlm.cluster import journal, queue, status
from vectorlm.cluster.queue import Queue
from vectorlm.cluster.slurm import call
from vectorlm.cluster.status import Run, SweepRuns
from vectorlm.errors import EXIT_OK, ClusterError

BOTH_NODES = ("-N2", "-c8", "--open-mode=append")
HELD = "held by its user: scontrol release starts it"


@pytest.fixture(autouse=True)
def _user(slurm: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a user of the cluster, with notes of its own."""
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def submit(slurm: Lab, folder: Path, *flags: str) -> str:
    """A job that acts as a run; it is noted as `vectorlm submit` notes it."""
    state = os.environ["XDG_STATE_HOME"]
    act = shlex.join(command(folder))
    job = slurm.sbatch(*flags, "--wrap", f"cd {ROOT} && XDG_STATE_HOME={state} exec {act}")
    journal.remember_job(job, folder, None)
    return job


def look(job: str) -> Run:
    found = status.look(status.find(job), queue.ask(os.getuid()), status.noted_jobs())
    assert isinstance(found, Run)
    return found


def until(slurm: Lab, condition: Callable[[], bool], what: str) -> None:
    slurm.until(condition, what, 30)


def test_a_job_from_the_queue_to_its_end(slurm: Lab, tmp_path: Path) -> None:
    first = submit(slurm, tmp_path / "first", *BOTH_NODES)
    second = submit(slurm, tmp_path / "second", *BOTH_NODES)
    until(slurm, lambda: look(first).step == 4, "steps")
    runs = look(first)
    assert (runs.state, runs.over, runs.job, runs.nodes) == ("running", False, first, "n[1-2]")
    assert runs.eta_s is not None
    assert re.fullmatch(r"\d+:\d\d", runs.time_left or "")
    assert runs.silent is None
    waits = look(second)
    assert (waits.state, waits.over, waits.step) == ("pending", False, None)
    assert re.match("waits for free nodes|other jobs come first", waits.why or "")

    slurm.requeue(first)
    slurm.cancel(second)
    until(slurm, lambda: look(first).state == "requeued", "requeue")
    assert (look(first).why or "").startswith("may not start yet; start expected ")
    until(slurm, lambda: look(second).over, "end of the second")
    gone = look(second)
    assert (gone.state, gone.over, gone.why) == ("never started", True, "it was cancelled")

    until(slurm, lambda: look(first).state == "running", "second start")
    assert [start.ended for start in look(first).starts] == ["cut off", ""]
    slurm.cancel(first)
    until(slurm, lambda: look(first).over, "end of the job")
    gone = look(first)
    assert (gone.state, gone.why, gone.nodes) == ("cut off", "it was cancelled", None)


def test_two_jobs_of_one_folder(slurm: Lab, tmp_path: Path) -> None:
    def seen() -> list[tuple[str | None, str]]:
        found = status.overview(queue.ask(os.getuid()), status.noted_jobs())
        return [(run.job, run.state) for run in found if isinstance(run, Run)]

    first = submit(slurm, tmp_path, *BOTH_NODES)
    until(slurm, lambda: look(first).step == 4, "steps")
    second = submit(slurm, tmp_path, *BOTH_NODES)
    assert seen() == [(first, "running"), (second, "pending")]
    slurm.cancel(second)
    until(slurm, lambda: seen()[1] == (second, "never started"), "end of the second")
    slurm.cancel(first)


def test_a_sweep_is_one_array(slurm: Lab, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:03d}").mkdir()
        (tmp_path / f"{number:03d}" / "config.yaml").touch()
    act = shlex.join(command(Path("FOLDER"))).replace(
        "FOLDER", f"{tmp_path}/00$SLURM_ARRAY_TASK_ID"
    )
    script = slurm.script(f"cd {ROOT}\nexec {act}")
    job = slurm.sbatch("--array=0-2%1", script)
    journal.remember_job(job, tmp_path, None)
    for number in range(3):
        journal.remember_job(f"{job}_{number}", tmp_path / f"{number:03d}", None)

    def states() -> dict[str, str | None]:
        found = status.look(status.find(job), queue.ask(os.getuid()), status.noted_jobs())
        assert isinstance(found, SweepRuns)
        assert found.job == job
        return {entry.name: entry.run and entry.run.state for entry in found.runs}

    wanted = {"000": "running", "001": "pending", "002": "pending"}
    until(slurm, lambda: states() == wanted, "the first of three")
    assert (look(f"{job}_1").why or "").startswith("as many runs of the sweep are active as may")
    slurm.cancel(f"{job}_0")
    wanted = {"000": "cut off", "001": "running", "002": "pending"}
    until(slurm, lambda: states() == wanted, "the second of three")


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often squeue was called since: it is the real one, behind one that counts."""
    counted = tmp_path / "bin" / "squeue"
    counted.parent.mkdir()
    log = tmp_path / "questions"
    counted.write_text(f'#!/bin/sh\necho >> {log}\nexec {shutil.which("squeue")} "$@"\n')
    counted.chmod(0o755)
    monkeypatch.setenv("PATH", f"{counted.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().count("\n") if log.exists() else 0


def test_slurm_is_asked_once_for_all_jobs_and_rarely(
    slurm: Lab,
    tmp_path: Path,
    questions: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [submit(slurm, tmp_path / str(number), "--hold") for number in range(4)]
    watcher = status_view.Watcher(None)
    found = watcher.look()
    assert isinstance(found, list)
    assert {entry.job for entry in found} == set(jobs)
    assert all(isinstance(e, Run) and (e.state, e.why) == ("pending", HELD) for e in found)
    watcher.look()
    assert questions() == 1
    monkeypatch.setattr(status_view, "QUEUE_REFRESH_S", 0.0)
    watcher.look()
    assert questions() == 2


def test_a_controller_that_does_not_answer(
    slurm: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(slurm, tmp_path / "out", "--hold")
    text = Path(slurm.env["SLURM_CONF"]).read_text()
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it takes the call, and says nothing
        port = mute.getsockname()[1]
        conf = tmp_path / "slurm.conf"
        conf.write_text(re.sub(r"(?m)^SlurmctldPort=.*", f"SlurmctldPort={port}", text))
        monkeypatch.setenv("SLURM_CONF", str(conf))
        monkeypatch.setattr(queue, "PATIENCE_S", 1.0)
        began = time.monotonic()
        assert main(["status", job]) == EXIT_OK
        assert time.monotonic() - began < 5
    said = capsys.readouterr().out
    assert "unknown" in said
    assert "Slurm cannot be asked: squeue did not answer within 1 s" in said


def test_a_job_that_only_the_accounts_know(
    slurm_lab: LabMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = slurm_lab(accounting=True)
    monkeypatch.setenv("SLURM_CONF", lab.env["SLURM_CONF"])
    job = submit(lab, tmp_path / "out", "--hold")
    lab.cancel(job)
    noted = status.noted_jobs()

    def why() -> str | None:
        found = status.look(tmp_path / "out", Queue(), noted)
        assert isinstance(found, Run)
        assert (found.state, found.over) == ("never started", True)
        return found.why

    until(lab, lambda: why() == "it was cancelled", "the accounts")


@pytest.mark.usefixtures("slurm")
@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="this machine has a cluster")
def test_no_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's programs are there, and no cluster: a workstation."""
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(ClusterError, match=r"squeue finds no controller of Slurm .*login node"):
        call(["squeue"])
