"""In which state a run is: what its starts, its processes and Slurm's queue say together. Floor 1,
used by `status`.

A run is running only when Slurm, its process or its owner.json says so: a start without an end.json
that none of them vouches for was cut off.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vectorlm.cluster import journal
from vectorlm.cluster.claim import OWNER
from vectorlm.cluster.journal import PastStart, StartRecord
from vectorlm.cluster.queue import Job, Queue, ended_by, in_words, waiting_for

State = Literal[
    "pending",
    "requeued",
    "starting",
    "running",
    "suspended",
    "ending",
    "finished",
    "stopped",
    "failed",
    "cut off",
    "never started",
    "unknown",
]
SILENT_S = 60.0  # an owner of a folder touches its owner.json every few seconds
CLOCKS_DIFFER_S = 2.0
NOTED_LATE_S = 10.0
MESSAGE_CHARACTERS = 200


@dataclass(frozen=True)
class Verdict:
    state: State
    why: str | None = None
    over: bool = True  # nothing more will happen by itself
    note: str | None = None


@dataclass(frozen=True)
class Seen:
    """Everything a verdict is made of; `job` has the run now, or will have it."""

    folder: Path
    starts: list[PastStart]
    job: str | None
    queue: Queue
    now: float

    @property
    def last(self) -> PastStart | None:
        return self.starts[-1] if self.starts else None

    def row(self, job: str | None) -> Job | None:
        return self.queue.jobs.get(job) if job else None


def judge(seen: Seen) -> Verdict:
    row, last = seen.row(seen.job), seen.last
    if row and row.waits:
        before = any(past.start.job == row.id for past in seen.starts)
        return Verdict("requeued" if before else "pending", waiting_for(row), over=False)
    if row and row.alive and not _belongs(last, row):
        if row.state == "COMPLETING":
            return Verdict("ending", over=False)
        return Verdict("starting", _begun(row, seen.now), over=False)
    if last is None:
        return _without_start(seen)
    verdict = _of_start(seen, last)
    if seen.job == last.start.job:
        return verdict
    later = _without_start(seen)
    return replace(verdict, note=f"a later job of it, {seen.job}: {later.state}, {later.why}")


def _belongs(last: PastStart | None, row: Job) -> bool:
    """Whether the last start is of what the job does now, not of what it did before a requeue."""
    if last is None or last.start.job != row.id:
        return False
    # Of a job that completes, squeue tells the end where it tells the start of others.
    unknown = row.start is None or row.state == "COMPLETING"
    return unknown or last.start.time >= (row.start or 0.0) - CLOCKS_DIFFER_S


def _begun(row: Job, now: float) -> str:
    since = f" {in_words(now - row.start)} ago" if row.start else ""
    return f"its job began{since}, training has not yet"


def _without_start(seen: Seen) -> Verdict:
    """The job of the folder has never got to training, and is not alive in the queue."""
    row = seen.row(seen.job)
    if row:
        return Verdict("never started", ended_by(row.state))
    if seen.job and not seen.queue.silent:
        return Verdict("never started", f"Slurm does not know job {seen.job} any more")
    return Verdict("unknown", "there is no record of a start", over=False)


def _of_start(seen: Seen, last: PastStart) -> Verdict:
    row = seen.row(last.start.job)
    if not (last.end or last.failures or last.killed):
        return _unended(seen, last, row)
    verdict = ended(last)
    if row and row.alive:
        return replace(verdict, over=False, note=f"job {row.id} still holds its nodes")
    return verdict


def ended(past: PastStart) -> Verdict:
    """How a start ended by its own account."""
    end = past.end
    if end and end.outcome == "finished":
        return Verdict("finished")
    if end and end.outcome == "stopped":
        by = f"by {end.signal} " if end.signal else ""
        return Verdict(
            "stopped", f"{by}at step {end.step}, " + ("saved" if end.saved else "nothing was saved")
        )
    return Verdict("failed", _cause(past))


def _cause(past: PastStart) -> str | None:
    """The first rank that failed by itself: those it left behind fail after it."""
    if past.killed:
        return f"rank {past.killed.rank} on {past.killed.host} was ended by {past.killed.signal}"
    own = [failure for failure in past.failures if failure.kind != "RankLostError"]
    for failure in own or past.failures:
        text = " ".join(f"{failure.kind}: {failure.message}".split())
        short = text if len(text) <= MESSAGE_CHARACTERS else text[:MESSAGE_CHARACTERS] + "..."
        return f"rank {failure.rank} on {failure.host}: {short}"
    return None


def _unended(seen: Seen, last: PastStart, row: Job | None) -> Verdict:
    """A start that has written no end: does it live?"""
    start = last.start
    life, why = sign_of_life(seen.folder, start, seen.now)
    if row and row.alive:
        if row.state in ("SUSPENDED", "STOPPED"):
            return Verdict("suspended", over=False)
        if row.state == "COMPLETING" or life is False:
            return Verdict("ending", why, over=False)
        return Verdict("running", over=False)
    if row:
        return Verdict("cut off", ended_by(row.state))
    gone = None
    if start.job and not seen.queue.silent:
        gone = f"Slurm does not know job {start.job} any more"
    if life:
        return Verdict("running", over=False, note=gone and f"{gone}, but its processes live")
    if gone or life is False:
        return Verdict("cut off", gone or why)
    return Verdict("unknown", why, over=False)


# --- signs of life --------------------------------------------------------------------------------


def sign_of_life(folder: Path, start: StartRecord, now: float) -> tuple[bool | None, str | None]:
    """Whether the first rank of a start lives; None when that cannot be told from here."""
    here = start.host == socket.gethostname()
    if here and not process_lives(start.pid, start.time):
        return False, f"its process {start.pid} is gone"
    owner, touched = _owner(folder)
    if owner.get("id") != start.id:
        here_only = f"it was started on {start.host}, which cannot be asked from here"
        return (True, None) if here else (None, here_only)
    if owner.get("ended"):
        return False, "it has left its folder without a word"
    if now - touched > SILENT_S:
        return False, f"no sign of life from {start.host} for {in_words(now - touched)}"
    return True, None


def _owner(folder: Path) -> tuple[dict[str, object], float]:
    """Which start has the folder, and when it last touched the file that says so."""
    path = folder / OWNER
    with suppress(OSError), open(path) as file:  # opened: a network file system then asks anew
        return journal.read_json(path) or {}, os.fstat(file.fileno()).st_mtime
    return {}, 0.0


def process_lives(pid: int, noted: float) -> bool:
    """Whether the process that was there at `noted` still is; not another with its number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no /proc, or a process that is not shown to others
        return True
    ticks = os.sysconf("SC_CLK_TCK")
    began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(facts[19]) / ticks
    return facts[0] not in "ZX" and began <= noted + NOTED_LATE_S
