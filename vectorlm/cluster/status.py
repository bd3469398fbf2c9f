"""What can be known of runs from their own files and Slurm's queue, as plain data. Floor 1, used by
`status_view`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vectorlm.cluster import journal, progress, slurm
from vectorlm.cluster.journal import PastStart
from vectorlm.cluster.progress import CHECKPOINTS, METRICS, Checkpoint, Progress
from vectorlm.cluster.queue import Queue, ended_by, in_words
from vectorlm.cluster.script import POINT_NAME
from vectorlm.cluster.submit import CONFIG, SUBMITTED
from vectorlm.cluster.verdict import Seen, State, Verdict, ended, judge
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, Sweep
from vectorlm.config.sweep import sweep_points
from vectorlm.errors import ClusterError, ConfigError

RESULTS = ("final-model", "hf-model")
JOB = re.compile(r"\d+(_\d+)?")
RUN_OF_SWEEP = re.compile(r"\d{3,}")
SHOWN_RUNS = 20
# How long a run may go without a step before that is told: beside three times its usual interval.
UNHURRIED_S = 120.0
LOADING_S = 600.0


@dataclass(frozen=True)
class NotedJob:
    """A job and the folder it was noted to belong to."""

    job: str
    folder: str
    time: float
    log: str | None


@dataclass(frozen=True)
class StartFacts:
    """One of the starts of a run."""

    number: int
    time: float
    job: str | None
    host: str
    ranks: int
    resumed_from: int | None
    ended: str  # in words; empty while it lasts


@dataclass(frozen=True)
class Run:
    """A run as it stands. Times in seconds; None where nothing is known."""

    folder: str
    job: str | None
    state: State
    over: bool  # nothing more will happen by itself
    why: str | None
    step: int | None
    total_steps: int | None
    metrics: dict[str, float]  # the last logged step
    eta_s: float | None
    idle_s: float | None  # since the last logged step or the start
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    starts: list[StartFacts]
    nodes: str | None
    time_left: str | None  # until the job's time limit, as Slurm writes it
    log: str | None
    results: list[str]
    stalled: str | None  # that it has not logged a step for long
    silent: str | None  # why Slurm has no part in this, though the run is a job
    notes: list[str]
    kind: Literal["run"] = "run"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, with what the sweep gave it and what came of it."""

    name: str
    values: dict[str, Any]  # of the keys that the sweep varies
    best: float | None  # logged value of the sweep's metric
    best_step: int | None
    run: Run | None  # None: its folder is missing


@dataclass(frozen=True)
class SweepRuns:
    folder: str
    job: str | None
    metric: str
    goal: Literal["min", "max"]
    keys: list[str]
    runs: list[SweepRun]  # best first; those that failed or are missing, last
    notes: list[str]
    kind: Literal["sweep"] = "sweep"

    @property
    def over(self) -> bool:
        return all(entry.run is None or entry.run.over for entry in self.runs)


# --- one run --------------------------------------------------------------------------------------


def read_run(folder: Path, queue: Queue, jobs: list[NotedJob], thorough: bool = False) -> Run:
    """`jobs`: those noted for the folder, newest first. `thorough`: ask Slurm's accounts, too."""
    problem, notes = _unreadable(folder)
    starts = [] if problem else journal.past_starts(folder)
    made = Progress({}, None, None, None) if problem else progress.read_progress(folder)
    checkpoint = None if problem else _checkpoint(folder, notes)
    results = [] if problem else [name for name in RESULTS if os.path.isdir(folder / name)]
    seen = Seen(folder, starts, _current_job(starts, jobs, queue), queue, time.time())
    verdict = _verdict(seen, problem, results, thorough)
    notes += [note for note in (made.note, verdict.note) if note]
    log = next((entry.log for entry in jobs if entry.job == seen.job), None)
    return _run(seen, verdict, made, checkpoint, results, notes, log)


def _verdict(seen: Seen, problem: str | None, results: list[str], thorough: bool) -> Verdict:
    if problem:
        return Verdict("unknown", problem, over=False)
    verdict = judge(seen)
    if verdict.state == "unknown" and not seen.starts and RESULTS[0] in results:
        return Verdict("finished", "it kept no record of its starts")
    forgotten = verdict.state == "never started" and not seen.row(seen.job)
    if thorough and forgotten and seen.job:
        rows = slurm.accounting(seen.job) or []
        states = [row["State"] for row in rows if row.get("JobID") == seen.job]
        if states:
            return Verdict(verdict.state, ended_by(states[-1]))
    return verdict


def _run(
    seen: Seen,
    verdict: Verdict,
    made: Progress,
    checkpoint: Checkpoint | None,
    results: list[str],
    notes: list[str],
    log: str | None,
) -> Run:
    last, row = seen.last, seen.row(seen.job)
    idle = _idle(seen, made)
    stalled = _stalled(seen, made, idle) if verdict.state == "running" else None
    running = row if row and row.alive else None
    return Run(
        folder=str(seen.folder),
        job=seen.job,
        state=verdict.state,
        over=verdict.over,
        why=verdict.why,
        step=_step(last, made),
        total_steps=last.start.total_steps if last else None,
        metrics=made.values,
        eta_s=_eta(last, made, idle) if verdict.state == "running" and not stalled else None,
        idle_s=idle,
        checkpoint_step=checkpoint.step if checkpoint else None,
        checkpoint_age_s=max(0.0, seen.now - checkpoint.time) if checkpoint else None,
        starts=list(_history(seen.starts, verdict)),
        nodes=running.nodes if running else None,
        time_left=running.time_left if running else None,
        log=(last.start.log if last and last.start.job == seen.job else None) or log,
        results=results,
        stalled=stalled,
        silent=seen.queue.silent if seen.job and verdict.state != "finished" else None,
        notes=notes,
    )


def _unreadable(folder: Path) -> tuple[str | None, list[str]]:
    """Why nothing of a folder can be read, and notes on what of it cannot."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # a job that waits has none yet
        return None, []
    except OSError as error:
        return f"its folder cannot be read: {error.strerror}", []
    if not os.access(folder, os.X_OK):
        return "its folder cannot be entered: Permission denied", []
    if journal.STARTS in names and not os.access(folder / journal.STARTS, os.R_OK | os.X_OK):
        return None, [f"{journal.STARTS}/ cannot be read: Permission denied"]
    return None, []


def _checkpoint(folder: Path, notes: list[str]) -> Checkpoint | None:
    try:
        return progress.newest_checkpoint(folder)
    except OSError as error:
        notes.append(f"{CHECKPOINTS}/ cannot be read: {error.strerror}")
        return None


def _current_job(starts: list[PastStart], jobs: list[NotedJob], queue: Queue) -> str | None:
    """The job that has the run, or will: a later one waits while that of the last start lives."""
    newest = jobs[0] if jobs else None
    if not starts:
        return newest.job if newest else None
    last = starts[-1].start
    row = queue.jobs.get(last.job) if last.job else None
    if newest is None or (row and row.alive) or newest.time <= last.time:
        return last.job
    return newest.job


def _step(last: PastStart | None, made: Progress) -> int | None:
    if last and last.end and last.end.step is not None:
        return last.end.step
    if "step" in made.values:
        return int(made.values["step"])
    return last.start.resumed_from if last else None


def _idle(seen: Seen, made: Progress) -> float | None:
    signs = [seen.last.start.time] if seen.last else []
    signs += [made.written] if made.written else []
    return max(0.0, seen.now - max(signs)) if signs else None


def _stalled(seen: Seen, made: Progress, idle: float | None) -> str | None:
    """That a run has logged nothing for much longer than it uses to take."""
    if idle is None or seen.last is None:
        return None
    stepped = made.written is not None and made.written > seen.last.start.time
    if idle < 3 * (made.interval_s or 0.0) + (UNHURRIED_S if stepped else LOADING_S):
        return None
    return f"no step for {in_words(idle)}" + ("" if stepped else ", since it was started")


def _eta(last: PastStart | None, made: Progress, idle: float | None) -> float | None:
    step = _step(last, made)
    total = last.start.total_steps if last else None
    if step is None or total is None or made.seconds_per_step is None:
        return None
    return max(0.0, (total - step) * made.seconds_per_step - (idle or 0.0))


def _history(starts: list[PastStart], verdict: Verdict) -> Iterator[StartFacts]:
    for past in starts:
        start, own = past.start, past.end or past.failures or past.killed
        lasts = past is starts[-1] and not own and not verdict.over
        end = ended(past) if own else Verdict("cut off")
        words = "" if lasts else f"{end.state} {end.why or ''}".strip()
        yield StartFacts(
            start.number,
            start.time,
            start.job,
            start.host,
            len(start.hosts) or 1,
            start.resumed_from,
            words,
        )


# --- a sweep --------------------------------------------------------------------------------------


def read_sweep(folder: Path, queue: Queue, noted: list[NotedJob]) -> SweepRuns:
    config = _frozen_config(folder)
    points = sweep_points(config) if config else []
    sweep = (config.sweep if config else None) or Sweep()
    names = dict.fromkeys([*(POINT_NAME % i for i in range(len(points))), *_run_folders(folder)])
    runs = []
    for name in names:
        path, number = folder / name, int(name)
        run = read_run(path, queue, jobs_of(path, noted)) if path.is_dir() else None
        best, best_step = progress.best(path, sweep.metric, sweep.goal) or (None, None)
        values = points[number] if number < len(points) else {}
        runs.append(SweepRun(name, values, best, best_step, run))
    runs.sort(key=lambda entry: _rank(entry, sweep.goal))
    notes = [] if points else [f"{SUBMITTED}/*/{CONFIG} says nothing of the sweep"]
    job = next((entry.job for entry in jobs_of(folder, noted)), None)
    keys = list(dict.fromkeys(key for point in points for key in point))
    return SweepRuns(str(folder), job, sweep.metric, sweep.goal, keys, runs, notes)


def _run_folders(folder: Path) -> list[str]:
    try:
        names = sorted(filter(RUN_OF_SWEEP.fullmatch, os.listdir(folder)), key=int)
    except OSError:
        return []
    return [name for name in names if os.path.isfile(folder / name / CONFIG)]


def _frozen_config(folder: Path) -> Config | None:
    """As it was when the sweep was last submitted; None where it cannot be read."""
    frozen = sorted(folder.glob(f"{SUBMITTED}/[0-9]*/{CONFIG}"))
    try:
        return load_config(frozen[-1]) if frozen else None
    except ConfigError:  # of another version, or cut
        return None


def _rank(entry: SweepRun, goal: str) -> tuple[int, float]:
    lost = ("failed", "cut off", "never started", "unknown")
    if entry.run is None or entry.run.state in lost:
        return 2, 0.0
    if entry.best is None:
        return 1, 0.0
    return 0, entry.best if goal == "min" else -entry.best


# --- which runs -----------------------------------------------------------------------------------


def noted_jobs() -> list[NotedJob]:
    """Newest first."""
    known = journal.known_jobs()
    return [
        NotedJob(
            job,
            os.path.abspath(str(facts["output_dir"])),
            float(facts.get("time", 0)),
            facts.get("log"),
        )
        for job, facts in known.items()
    ]


def jobs_of(folder: Path, noted: list[NotedJob]) -> list[NotedJob]:
    return [entry for entry in noted if entry.folder == str(folder)]


def find(given: str) -> Path:
    """The folder of a job or of a path; a job's number wins over a folder of that name."""
    number = JOB.fullmatch(given)
    folder = _folder_of(given) if number else None
    if folder is not None:
        return folder
    if os.path.isdir(given):
        return _checked(given)
    if number:
        raise ClusterError(
            f"job {given}: nothing is noted of a run under this number; `vectorlm status` lists "
            "your jobs that are known, or give the run's output_dir"
        )
    raise ClusterError(
        f"{given}: no such folder; give the output_dir of a run or of a sweep, or a job's number"
    )


def _folder_of(job: str) -> Path | None:
    """As noted when it was submitted or started."""
    facts = journal.job_facts(job)
    known = facts and facts.get("output_dir")
    return Path(os.path.abspath(str(known))) if known else None


def _checked(given: str) -> Path:
    path = Path(os.path.abspath(given))
    if not os.access(path, os.R_OK | os.X_OK):
        raise ClusterError(f"{given}: cannot be read: it belongs to another user; ask its owner")
    if holds_run(path) or _run_folders(path) or jobs_of(path, noted_jobs()):
        return path
    raise ClusterError(
        f"{given}: holds no run (starts/, metrics.jsonl or checkpoints/) and no sweep "
        "(000/, 001/, ...); give the output_dir of a run or of a sweep"
    )


def holds_run(folder: Path) -> bool:
    """Whether training has begun in it."""
    return any(os.path.lexists(folder / name) for name in (journal.STARTS, METRICS, CHECKPOINTS))


def owner_of(folder: Path) -> int:
    """Whose jobs to look for."""
    try:
        return folder.stat().st_uid
    except OSError:
        return os.getuid()


def look(
    folder: Path, queue: Queue, noted: list[NotedJob], thorough: bool = True
) -> Run | SweepRuns:
    if not holds_run(folder) and _run_folders(folder):
        return read_sweep(folder, queue, noted)
    return read_run(folder, queue, jobs_of(folder, noted), thorough)


def overview(queue: Queue, noted: list[NotedJob]) -> list[Run | SweepRuns]:
    """The user's newest runs; those of a sweep count as one."""
    folders = list(dict.fromkeys(entry.folder for entry in noted))
    known = set(folders)
    apart = [Path(f) for f in folders if os.path.dirname(f) not in known]
    found: list[Run | SweepRuns] = []
    for folder in apart[:SHOWN_RUNS]:
        entry = look(folder, queue, noted, thorough=False)
        others = _other_jobs(entry, queue, noted) if isinstance(entry, Run) else ()
        found += [entry, *others]
    return found


def _other_jobs(run: Run, queue: Queue, noted: list[NotedJob]) -> Iterator[Run]:
    """Jobs beside the one that has the run's folder: in the queue, or later ones that never got it.

    Those that had it before it are starts of the run.
    """
    folder = Path(run.folder)
    starts = journal.past_starts(folder)
    for entry in jobs_of(folder, noted):
        row = queue.jobs.get(entry.job)
        queued = row is not None and (row.waits or row.alive)
        own = [past for past in starts if past.start.job == entry.job]
        came_to_nothing = not own and not queue.silent and _later(entry.job, run.job)
        if entry.job == run.job or not (queued or came_to_nothing):
            continue
        seen = Seen(folder, own, entry.job, queue, time.time())
        note = f"shares its folder with job {run.job}, and a folder has one run at a time"
        nothing = Progress({}, None, None, None)
        yield _run(seen, judge(seen), nothing, None, [], [note] if run.job else [], entry.log)


def _later(job: str, than: str | None) -> bool:
    """Slurm counts its jobs up."""
    numbers = [int(name.partition("_")[0]) for name in (job, than or "") if name[:1].isdecimal()]
    return len(numbers) == 2 and numbers[0] > numbers[1]
