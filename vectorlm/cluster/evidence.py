"""What is known of how a start of a run ended: its own records, Slurm's, its log. Floor 1, used by
`why` and by everything that recognizes a cause.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

from vectorlm.cluster import flight, journal, slurm, status
from vectorlm.cluster.flight import Flight
from vectorlm.cluster.joblog import TAIL_BYTES, Line, Section, sections
from vectorlm.cluster.journal import PastStart
from vectorlm.cluster.progress import METRICS
from vectorlm.cluster.said import Fault, TaskEnd, first_fault, task_ends
from vectorlm.cluster.verdict import sign_of_life
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.errors import ClusterError, VectorLMError

JOB = re.compile(r"\d+(_\d+)?")
EARLIER_TAIL_BYTES = 64 << 10  # of the log of a start that is told in one line
_STEP = re.compile(r"step (\d+)/\d+  ")


@dataclass(frozen=True)
class Evidence:
    """All about one start of a run; what is not known is None or empty."""

    job: str | None = None  # as Slurm's commands name it
    number: int | None = None  # of the start within its job, from 1
    start: PastStart | None = None
    code: int | None = None  # what srun or the job script left with
    facts: dict[str, str] = field(default_factory=dict)  # scontrol, while this is the job's start
    rows: Sequence[dict[str, str]] = ()  # sacct, of this start: the job, then its steps
    lines: Sequence[Line] = ()
    flights: dict[int, Flight] = field(default_factory=dict)
    followed: bool = False  # by another start of the same job
    requeued: bool = False  # Slurm has counted the next start while this one concludes
    newest: bool = True  # of the run
    logs: Sequence[Path] = ()
    began: float | None = None
    now: float = field(default_factory=time.time)

    @property
    def state(self) -> str:
        """Slurm's word for it, such as TIMEOUT; empty where it says none."""
        said = self.facts.get("JobState") or (self.rows[0].get("State", "") if self.rows else "")
        return said.split()[0] if said else ""

    @property
    def over(self) -> bool:
        """Whether this start has ended. A job script that concludes has an exit code, and runs."""
        return self.code is not None or self.followed or not self._lives

    @property
    def _lives(self) -> bool:
        if self.state:
            return self.state in (slurm.ALIVE | {"PENDING", "REQUEUED"})
        return self.start is not None and self._shows_life

    @cached_property
    def _shows_life(self) -> bool:
        """Of a start that Slurm says nothing of."""
        assert self.start
        if self.start.end or self.start.failures or self.start.killed:
            return False
        return sign_of_life(self.folder or Path(), self.start.start, self.now)[0] is True

    @property
    def folder(self) -> Path | None:
        return self.start.folder.parents[1] if self.start else None

    @cached_property
    def fault(self) -> Fault | None:
        """What a rank failed of first, by its own word."""
        ended = self.over or bool(self.task_ends)
        return first_fault(self.start.failures if self.start else [], self.lines if ended else [])

    @cached_property
    def task_ends(self) -> list[TaskEnd]:
        return [*self._killed, *task_ends(self.lines)]

    @property
    def _killed(self) -> list[TaskEnd]:
        """What the launcher of one machine has seen."""
        record = self.start.killed if self.start else None
        number = getattr(signal, record.signal, None) if record else None
        if record is None or not isinstance(number, signal.Signals):
            return []
        line = Line(f"rank {record.rank} was ended by {record.signal}", "killed.json")
        words = signal.strsignal(number) or record.signal
        return [TaskEnd(record.host, [record.rank], words, line, first=True)]

    def search(self, pattern: re.Pattern[str]) -> tuple[re.Match[str], Line] | None:
        """The first line of the log that matches from its beginning."""
        for line in self.lines:
            match = pattern.match(line.text)
            if match:
                return match, line
        return None

    @cached_property
    def last_step(self) -> int | None:
        """The last step that is known to be done."""
        if self.start and self.start.end:
            return self.start.end.step
        steps = [f.step for f in (self.start.failures if self.start else []) if f.step is not None]
        logged = [int(m[1]) for line in self.lines if (m := _STEP.match(line.text))]
        begun = self.start.start.resumed_from if self.start else None
        return max([*steps, *logged, *([begun] if begun is not None else [])], default=None)

    def host_of(self, rank: int | None) -> str | None:
        hosts = self.start.start.hosts if self.start else []
        if rank is not None and 0 <= rank < len(hosts):
            return hosts[rank]
        return next((end.host for end in self.task_ends if rank in end.ranks), None)

    @property
    def ranks(self) -> int | None:
        return len(self.start.start.hosts) or None if self.start else None

    @cached_property
    def config(self) -> Config | None:
        """What the start was given, where that can still be read."""
        path = Path(self.start.start.config) if self.start else None
        try:
            return load_config(path) if path and path.is_file() else None
        except (VectorLMError, OSError):
            return None

    @property
    def silence_s(self) -> float | None:
        """Since anything was heard of a run."""
        touched = []
        for path in [*self.logs, *([self.folder / METRICS] if self.folder else [])]:
            with suppress(OSError):
                touched.append(path.stat().st_mtime)
        if self.start:
            touched.append(self.start.start.time)
        return max(0.0, self.now - max(touched)) if touched else None


@dataclass(frozen=True)
class Finding:
    """What a recognizer has found: the cause in a sentence, and what it was seen in."""

    sentence: str
    proof: Sequence[Line] = ()
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    cure: str | None = None  # where it is another than the cause's own
    may_pass: bool | None = None  # likewise


def state_line(evidence: Evidence) -> Line:
    """Slurm's word as it is quoted."""
    if evidence.state:
        return Line(f"JobState={evidence.state}", "scontrol" if evidence.facts else "sacct")
    return Line("its process shows signs of life", "owner.json")


def when(text: str | None) -> float | None:
    """A time as Slurm writes it."""
    with suppress(ValueError):
        return datetime.fromisoformat(text or "").timestamp()
    return None


# --- of a job that concludes ----------------------------------------------------------------------


def evidence_of_job(
    output_dir: str | Path, code: int, log: Path | None, facts: dict[str, str] | None
) -> Evidence:
    """Of this job's own start, which srun has just left with `code`; asked from its script."""
    job, number = slurm.own_job(), slurm.restarts() + 1
    starts = [past for past in journal.past_starts(output_dir) if past.start.job == job]
    start = next(
        (past for past in starts[-1:] if not job or past.start.restart + 1 == number), None
    )
    found = [section for section in (sections(log) if log else []) if _is_of(section, job, number)]
    return Evidence(
        job=job,
        number=number,
        start=start,
        code=code,
        facts=facts or {},
        lines=found[-1].lines() if found else [],
        flights=_flights(start),
        requeued=_is_counted(facts or {}),
        logs=[log] if log else [],
    )


def _is_counted(facts: dict[str, str]) -> bool:
    own = os.environ.get("SLURM_RESTART_COUNT", "0")
    counted = int(facts.get("Restarts", "0"))
    return facts.get("JobState") == "COMPLETING" and counted > int(own)


def _is_of(section: Section, job: str | None, number: int) -> bool:
    return section.job is None or (section.job == job and section.number == number)


def _flights(start: PastStart | None) -> dict[int, Flight]:
    if start is None:
        return {}
    name = f"{start.start.job_id or 'local'}.{start.start.restart}"
    return flight.read_flights(start.folder.parents[1] / "flight-recorder" / name)


# --- of a job or a folder -------------------------------------------------------------------------


def gather(given: str) -> list[Evidence]:
    """Of every start of a job, or of a run by its folder; the newest, or what follows, comes last.

    Slurm is asked about the newest job alone: it forgets the others.
    """
    job = given if JOB.fullmatch(given) and not _is_folder(given) else None
    facts = _facts(job) if job else {}
    job = _name_of_task(job, facts) if job else None
    folder, unknown = _folder(job or given)
    starts = journal.past_starts(folder) if folder else []
    jobs = [job] if job else _jobs_of(folder, starts)
    groups = [] if job else [[Evidence(start=s)] for s in starts if s.start.job is None]
    for name in jobs:
        own = [past for past in starts if past.start.job == name]
        facts = facts if job else _facts(name) if name == jobs[-1] else {}
        groups.append(_of_job(name, own, facts, last=name == jobs[-1]))
    found = [evidence for group in sorted(groups, key=_begun) for evidence in group]
    if not found:
        raise unknown or ClusterError(
            f"{given}: nothing was ever started there, and no job is noted for it; "
            "`vectorlm status` lists your runs"
        )
    newest = found[-1]
    return [
        *(replace(evidence, newest=False) for evidence in found[:-1]),
        replace(newest, flights=_flights(newest.start)),
    ]


def _is_folder(given: str) -> bool:
    return os.path.isdir(given) and journal.job_facts(given) is None


def _folder(given: str) -> tuple[Path | None, ClusterError | None]:
    try:
        return status.find(given), None
    except ClusterError as error:
        if not JOB.fullmatch(given):
            raise
        return None, error


def _facts(job: str) -> dict[str, str]:
    if not slurm.installed():
        return {}
    try:
        return slurm.show_job(job) or {}
    except ClusterError:  # what the run's own files say is told all the same
        return {}


def _name_of_task(job: str, facts: dict[str, str]) -> str:
    """A task of an array by its array's id: `17_3`, also when it was given as `20`."""
    array, task = facts.get("ArrayJobId"), facts.get("ArrayTaskId", "")
    if not array or "_" in job:
        return job
    if job == array or not task.isdecimal():
        raise ClusterError(
            f"job {job} is an array of many runs; give one of them, such as {array}_0"
        )
    return f"{array}_{task}"


def _jobs_of(folder: Path | None, starts: list[PastStart]) -> list[str]:
    """Oldest first."""
    noted = status.jobs_of(folder, status.noted_jobs()) if folder else []
    times = {entry.job: entry.time for entry in noted}
    for past in starts:
        if past.start.job:
            times[past.start.job] = max(past.start.time, times.get(past.start.job, 0.0))
    return sorted(times, key=lambda job: times[job])


def _of_job(job: str, starts: list[PastStart], facts: dict[str, str], last: bool) -> list[Evidence]:
    logs = _logs(job, starts, facts)
    written = [part for path in logs for part in sections(path)]
    parts = {part.number or 1: part for part in written if part.job in (None, job)}
    records = {past.start.restart + 1: past for past in starts}
    current = _current(set(parts) | set(records), facts)
    numbers = sorted({*parts, *records, *([current] if current else [])})
    rows = _rows(job, len(numbers)) if last and numbers else []
    found = []
    for i, number in enumerate(numbers):
        newest = number == numbers[-1]
        tail = TAIL_BYTES if last and newest else EARLIER_TAIL_BYTES
        found.append(
            Evidence(
                job=job,
                number=number,
                start=records.get(number),
                facts=facts if number == current else {},
                rows=rows[i] if rows else (),
                lines=parts[number].lines(tail) if number in parts else [],
                followed=not newest,
                logs=logs,
                began=parts[number].time if number in parts else None,
            )
        )
    return found


def _current(known: set[int], facts: dict[str, str]) -> int | None:
    """The number of the start that Slurm speaks of; one that waits has not written anything yet."""
    if not facts:
        return None
    current = max([int(facts.get("Restarts", "0")) + 1, *known])
    return current + 1 if facts.get("JobState") == "PENDING" and current in known else current


def _logs(job: str, starts: list[PastStart], facts: dict[str, str]) -> list[Path]:
    """Where the job's log may be, without doubles; those that exist."""
    noted = (journal.job_facts(job) or {}).get("log")
    named = [facts.get("StdOut"), noted, *(past.start.log for past in starts)]
    here = [*Path().glob(f"*-{job}.log"), *Path().glob(f"*-{job}.out")]
    paths = [*(Path(str(name)) for name in named if name), *here]
    real = {os.path.realpath(path): path for path in reversed(paths) if path.is_file()}
    return list(reversed(real.values()))


def _rows(job: str, starts: int) -> list[list[dict[str, str]]]:
    """sacct's rows start by start, if it has kept as many as there are."""
    groups: list[list[dict[str, str]]] = []
    for row in slurm.accounting(job) or [] if slurm.installed() else []:
        if row.get("JobID") == job:
            groups.append([])
        if groups:
            groups[-1].append(row)
    return groups if len(groups) == starts else []


def _begun(group: list[Evidence]) -> float:
    """When the first start of a job was; one that has not begun comes last."""
    times = [e.start.start.time if e.start else e.began for e in group]
    return min((time for time in times if time is not None), default=float("inf"))
