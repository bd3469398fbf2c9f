"""What Slurm's queue holds of a user's jobs, in one question. Floor 1, used by `status`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from vectorlm.cluster import slurm
from vectorlm.errors import ClusterError

PATIENCE_S = 10.0
_COLUMNS = "%i|%T|%S|%L|%N|%r"  # the reason last: it may hold anything
REASONS = {
    "None": "not looked at yet",
    "Priority": "other jobs come first",
    "Resources": "waits for free nodes",
    "Dependency": "waits for another job to end",
    "DependencyNeverSatisfied": "waits for a job that failed, so it will never start: scancel it",
    "BeginTime": "may not start yet",
    "JobArrayTaskLimit": "as many runs of the sweep are active as may be at once",
    "JobHeldUser": "held by its user: scontrol release starts it",
    "JobHeldAdmin": "held by an administrator",
    "Licenses": "waits for a licence",
    "PartitionConfig": "asks for more than the partition has",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is closed",
    "PartitionNodeLimit": "asks for more nodes than the partition allows",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "ReqNodeNotAvail": "nodes it asks for are down or reserved, perhaps for maintenance",
    "Reservation": "its reservation has not begun",
    "BadConstraints": "no node has what it asks for",
}
ENDINGS = {
    "BOOT_FAIL": "its nodes did not boot",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "its script ended",
    "DEADLINE": "its deadline passed",
    "FAILED": "its script failed",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "the memory of a node was used up",
    "PREEMPTED": "another job took its nodes",
    "TIMEOUT": "its time limit was reached",
}


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as squeue lists it."""

    id: str
    state: str
    start: float | None  # of this start, or expected
    time_left: str
    nodes: str
    reason: str

    @property
    def alive(self) -> bool:
        return self.state in slurm.ALIVE

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True)
class Queue:
    """The jobs by id, with those that ended minutes ago; `silent` says why it holds none."""

    jobs: dict[str, Job] = field(default_factory=dict)
    silent: str | None = None


def ask(uid: int) -> Queue:
    """The queue of one user; never an error, never long."""
    if not slurm.installed():
        return Queue(silent="there is no Slurm on this machine")
    command = ["squeue", "-u", str(uid), "-h", "-r", "-t", "all", "-o", _COLUMNS]
    try:
        text = slurm.call(command, PATIENCE_S)
    except ClusterError as error:
        return Queue(silent=f"Slurm cannot be asked: {error}")
    rows = [line.split("|", 5) for line in text.splitlines()]
    jobs = [Job(i, state, _time(start), *rest) for i, state, start, *rest in rows if len(rest) == 3]
    return Queue({job.id: job for job in jobs})


def waiting_for(job: Job) -> str:
    """Why a job has not started, in words, and when it is expected to."""
    word = job.reason.strip("()").split(",")[0].split(":")[0]
    text = REASONS.get(word)
    if text is None and word.startswith("QOS"):
        text = f"a limit of its quality of service is reached ({word})"
    elif text is None and word.startswith("Assoc"):
        text = f"a limit of its account is reached ({word})"
    text = text or job.reason
    if job.start is None:
        return text
    expected = datetime.fromtimestamp(job.start)
    days = (expected.date() - datetime.now().date()).days
    return f"{text}; start expected {expected:%H:%M:%S}" + (f" in {days} days" if days > 0 else "")


def ended_by(state: str) -> str:
    """Slurm's last word on a job, such as `CANCELLED by 1000`."""
    return ENDINGS.get(state.split()[0] if state else "", f"Slurm says {state or 'nothing'}")


def in_words(seconds: float) -> str:
    """A duration as one says it: 40 s, 12 min, 3 h 10 min, 2 days 4 h."""
    units: Sequence[tuple[int, str, int, str]] = (
        (86400, "days", 3600, "h"),
        (3600, "h", 60, "min"),
    )
    for size, name, small, small_name in units:
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            name = "day" if (whole, name) == (1, "days") else name
            return f"{whole} {name}" + (f" {rest // small} {small_name}" if rest >= small else "")
    return f"{int(seconds / 60)} min" if seconds >= 60 else f"{max(int(seconds), 0)} s"


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A
        return None
