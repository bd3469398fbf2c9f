"""Claiming an output folder: one start at a time, none refused for a dead one's sake, and a start
that lost its folder writes no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vectorlm.cluster import claim
from vectorlm.cluster.journal import StartRecord, new_start
from vectorlm.errors import ClusterError, ConfigError

LIMIT_S = 30
HOLD = """
import json, os, sys
from vectorlm.cluster import claim
from vectorlm.cluster.journal import StartRecord
claim.BEAT_S = 0.05
def leave(loss):
    print(loss, flush=True)
    os._exit(3)
start = StartRecord(**json.loads(sys.argv[2]))
held = claim.take(sys.argv[1], start)
held.watch(leave)
print("held", flush=True)
if input() == "release":
    held.release()
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    monkeypatch.setattr(claim, "SILENCE_S", 1.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@contextmanager
def holder(folder: Path, start: StartRecord) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder as `start`."""
    command = [sys.executable, "-c", HOLD, str(folder), json.dumps(asdict(start))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def job(job_id: str, restart: int = 0, host: str | None = None) -> StartRecord:
    start = new_start("config.yaml")
    return replace(start, job=job_id, job_id=job_id, restart=restart, host=host or start.host)


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = new_start("config.yaml")
    with holder(tmp_path / "out", first):
        words = rf"in use by a run on this machine \(process {first.pid}\)"
        with pytest.raises(ClusterError, match=words):
            claim.take(tmp_path / "out", new_start("config.yaml"))
    claim.take(tmp_path / "out", new_start("config.yaml")).release()


def test_a_run_that_has_only_locked_the_folder_counts(tmp_path: Path) -> None:
    with holder(tmp_path, new_start("config.yaml")):
        (tmp_path / claim.OWNER).unlink()
        with pytest.raises(ClusterError, match="a run that is just starting"):
            claim.take(tmp_path, new_start("config.yaml"))


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_a_later_start_of_the_same_job_takes_over_and_the_earlier_one_leaves(
    tmp_path: Path, host: str
) -> None:
    """A node was cut off, its job started elsewhere, and now the node is back."""
    with holder(tmp_path, job("17", restart=0, host=host or None)) as process:
        started = time.monotonic()
        held = claim.take(tmp_path, job("17", restart=1))
        assert time.monotonic() - started < claim.SILENCE_S / 2
        assert process.wait(timeout=LIMIT_S) == 3
        assert process.stdout is not None
        assert "now belongs to another start of the run, job 17" in process.stdout.read()
        assert held.loss() is None
        held.release()


def test_an_earlier_start_never_takes_over(tmp_path: Path) -> None:
    with (
        holder(tmp_path, job("17", restart=1)),
        pytest.raises(ClusterError, match="in use by job 17"),
    ):
        claim.take(tmp_path, job("17", restart=0))


def test_a_job_takes_over_from_the_one_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, job("17")) as process:
        with pytest.raises(ClusterError, match="in use by job 17"):
            claim.take(tmp_path, job("18"))
        monkeypatch.setenv("VECTORLM_CONTINUES", "17")
        claim.take(tmp_path, job("18")).release()
        assert process.wait(timeout=LIMIT_S) == 3


def test_another_machine_is_obeyed_while_it_shows_life(tmp_path: Path) -> None:
    elsewhere = replace(new_start("config.yaml"), host="elsewhere")
    with holder(tmp_path, elsewhere) as process:
        words = rf"in use by a run on elsewhere \(process {elsewhere.pid}\)"
        with pytest.raises(ClusterError, match=words):
            claim.take(tmp_path, new_start("config.yaml"))
        process.kill()
        process.wait()
        claim.take(tmp_path, new_start("config.yaml")).release()


def test_a_run_that_has_ended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENCE_S", 60.0)
    claim.take(tmp_path, replace(new_start("config.yaml"), host="elsewhere")).release()
    started = time.monotonic()
    claim.take(tmp_path, new_start("config.yaml")).release()
    assert time.monotonic() - started < 10


def test_the_release_of_a_lost_folder_leaves_its_new_owner_alone(tmp_path: Path) -> None:
    lost = claim.take(tmp_path, job("17"))
    held = claim.take(tmp_path, job("17", restart=1))
    lost.release()
    assert "ended" not in json.loads((tmp_path / claim.OWNER).read_text())
    held.release()
    assert "ended" in json.loads((tmp_path / claim.OWNER).read_text())


def test_an_owner_that_cannot_be_read_is_no_loss(tmp_path: Path) -> None:
    held = claim.take(tmp_path, new_start("config.yaml"))
    (tmp_path / claim.OWNER).write_text("{")
    assert held.loss() is None
    held.release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output_dir: .*file cannot be written"):
        claim.take(tmp_path / "file", new_start("config.yaml"))
