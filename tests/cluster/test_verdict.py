"""In which state a run is, told by real processes and the files they leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import actor
from vectorlm.cluster import claim, journal
from vectorlm.cluster.journal import EndRecord, Journal, RankRecord, StartRecord
from vectorlm.cluster.queue import Job, Queue
from vectorlm.cluster.verdict import Seen, Verdict, judge, process_lives

NO_SLURM = Queue(silent="there is no Slurm on this machine")


def record(**given: Any) -> StartRecord:
    return replace(journal.new_start("config.yaml"), **given)


def begin(folder: Path, **given: Any) -> Journal:
    return Journal.begin(folder, record(**given))[0]


def verdict(folder: Path, job: str | None = None, queue: Queue = NO_SLURM) -> Verdict:
    return judge(Seen(folder, journal.past_starts(folder), job, queue, time.time()))


def failure(rank: int, when: float, kind: str, message: str) -> RankRecord:
    return RankRecord(rank, f"n{rank}", when, kind, message, "Traceback ...", 1)


def queued(state: str, start: float | None = None, job: str = "17", reason: str = "None") -> Queue:
    return Queue({job: Job(job, state, start, "10:00", "n1", reason)})


# --- without Slurm --------------------------------------------------------------------------------


def test_a_process_that_lives_and_is_killed(tmp_path: Path) -> None:
    process = actor.start(tmp_path)
    try:
        assert verdict(tmp_path) == Verdict("running", over=False)
        process.kill()
        until(lambda: verdict(tmp_path).state != "running")
        # Not waited for yet, so it is a zombie now; afterwards it is gone.
        dead = Verdict("cut off", f"its process {process.pid} is gone")
        assert verdict(tmp_path) == dead
    finally:
        process.kill()
        process.wait(timeout=10)
    assert verdict(tmp_path) == dead


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_process_with_the_number_of_a_dead_one(tmp_path: Path) -> None:
    begin(tmp_path, time=time.time() - 86400)
    assert verdict(tmp_path).state == "cut off"
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert process_lives(sleeper.pid, time.time())
        assert not process_lives(sleeper.pid, time.time() - 3600)
    finally:
        sleeper.communicate(b"\n", timeout=10)


def test_how_a_start_ended(tmp_path: Path) -> None:
    begin(tmp_path / "a").ended(EndRecord(time.time(), "finished", 40))
    assert verdict(tmp_path / "a") == Verdict("finished")
    begin(tmp_path / "b").ended(EndRecord(time.time(), "stopped", 12, "SIGUSR1"))
    assert verdict(tmp_path / "b") == Verdict("stopped", "by SIGUSR1 at step 12, saved")
    begin(tmp_path / "c").ended(EndRecord(time.time(), "stopped", 12, None, saved=False))
    assert verdict(tmp_path / "c") == Verdict("stopped", "at step 12, nothing was saved")


def test_the_first_rank_that_failed_by_itself(tmp_path: Path) -> None:
    diary = begin(tmp_path)
    diary.failed(failure(0, 10.0, "RankLostError", "rank 0: another rank has left"))
    diary.failed(failure(2, 11.0, "OutOfMemoryError", "CUDA out of memory.\nTried " + "x" * 300))
    diary.failed(failure(1, 12.0, "RuntimeError", "later"))
    found = verdict(tmp_path)
    assert found.state == "failed"
    assert found.why
    assert found.why.startswith("rank 2 on n2: OutOfMemoryError: CUDA out of memory. Tried xxx")
    assert found.why.endswith("x...")
    assert len(found.why) < 250


def test_a_later_start_counts(tmp_path: Path) -> None:
    begin(tmp_path).failed(failure(0, 1.0, "ValueError", "first"))
    begin(tmp_path).ended(EndRecord(time.time(), "finished", 40))
    assert verdict(tmp_path).state == "finished"
    begin(tmp_path)
    assert verdict(tmp_path).state == "running"


def test_a_run_on_another_machine_is_known_by_its_sign_of_life(tmp_path: Path) -> None:
    started = record(host="elsewhere")
    held = claim.take(tmp_path, started)
    Journal.begin(tmp_path, started)
    assert verdict(tmp_path).state == "running"
    old = time.time() - 3 * 3600
    os.utime(tmp_path / claim.OWNER, (old, old))
    assert verdict(tmp_path) == Verdict("cut off", "no sign of life from elsewhere for 3 h")
    held.release()
    assert verdict(tmp_path) == Verdict("cut off", "it has left its folder without a word")
    (tmp_path / claim.OWNER).unlink()
    found = verdict(tmp_path)
    assert found.state == "unknown"
    assert found.why == "it was started on elsewhere, which cannot be asked from here"


def test_a_folder_taken_by_another_start_is_no_sign_of_life(tmp_path: Path) -> None:
    Journal.begin(tmp_path, record(host="elsewhere"))
    claim.take(tmp_path, record(host="elsewhere")).release()
    assert verdict(tmp_path).state == "unknown"


# --- with what Slurm says -------------------------------------------------------------------------


def test_a_job_that_waits(tmp_path: Path) -> None:
    waits = queued("PENDING", reason="Resources")
    assert verdict(tmp_path, "17", waits) == Verdict("pending", "waits for free nodes", False)
    begin(tmp_path, job="16")
    assert verdict(tmp_path, "17", waits).state == "pending"
    begin(tmp_path, job="17")
    assert verdict(tmp_path, "17", waits).state == "requeued"


def test_a_job_whose_training_has_not_begun(tmp_path: Path) -> None:
    runs = queued("RUNNING", start=time.time() - 90)
    found = verdict(tmp_path, "17", runs)
    assert (found.state, found.over) == ("starting", False)
    assert found.why == "its job began 1 min ago, training has not yet"
    begin(tmp_path, job="17", time=time.time() - 600)  # before it was requeued
    assert verdict(tmp_path, "17", runs).state == "starting"
    begin(tmp_path, job="17", host="elsewhere")
    assert verdict(tmp_path, "17", runs) == Verdict("running", over=False)
    assert verdict(tmp_path, "17", queued("COMPLETING", time.time() + 9)).state == "ending"
    assert verdict(tmp_path, "17", queued("SUSPENDED", 0.0)).state == "suspended"


def test_a_job_that_outlives_its_first_process(tmp_path: Path) -> None:
    begin(tmp_path, job="17", pid=find_free_pid())
    found = verdict(tmp_path, "17", queued("RUNNING", 0.0))
    assert (found.state, found.over) == ("ending", False)
    assert "is gone" in (found.why or "")


def find_free_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    return process.pid


def test_a_run_that_has_ended_while_its_job_has_not(tmp_path: Path) -> None:
    begin(tmp_path, job="17").ended(EndRecord(time.time(), "finished", 40))
    found = verdict(tmp_path, "17", queued("RUNNING", 0.0))
    assert found == Verdict("finished", None, False, "job 17 still holds its nodes")
    assert verdict(tmp_path, "17", queued("COMPLETED", 0.0)) == Verdict("finished")


@pytest.mark.parametrize(
    ("queue", "why"),
    [
        (queued("CANCELLED"), "it was cancelled"),
        (queued("NODE_FAIL"), "a node failed"),
        (Queue(), "Slurm does not know job 17 any more"),
    ],
)
def test_a_job_that_is_gone(tmp_path: Path, queue: Queue, why: str) -> None:
    assert verdict(tmp_path, "17", queue) == Verdict("never started", why)
    begin(tmp_path, job="17", host="elsewhere")
    assert verdict(tmp_path, "17", queue) == Verdict("cut off", why)


def test_a_job_that_slurm_has_lost_but_that_lives(tmp_path: Path) -> None:
    begin(tmp_path, job="17")
    found = verdict(tmp_path, "17", Queue())
    assert (found.state, found.over) == ("running", False)
    assert found.note == "Slurm does not know job 17 any more, but its processes live"
    assert verdict(tmp_path, "17", NO_SLURM) == Verdict("running", over=False)
    assert verdict(tmp_path, "17", queued("CANCELLED")).state == "cut off"


def test_a_later_job_that_never_began(tmp_path: Path) -> None:
    begin(tmp_path, job="16").ended(EndRecord(time.time(), "stopped", 12))
    found = verdict(tmp_path, "17", queued("CANCELLED"))
    assert (found.state, found.note) == (
        "stopped",
        "a later job of it, 17: never started, it was cancelled",
    )


def test_a_process_here_is_asked_by_its_own_host_name(tmp_path: Path) -> None:
    begin(tmp_path)
    assert journal.past_starts(tmp_path)[0].start.host == socket.gethostname()
    assert verdict(tmp_path) == Verdict("running", over=False)
