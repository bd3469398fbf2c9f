"""What a run writes down about its starts and ends, for `status`, `why` and the requeue. Floor 1.

    output_dir/starts/0003/
        start.json    by the first rank, when the folder is claimed
        rank-2.json   by a rank that fails: what, where, at which step
        end.json      by the first rank: finished, stopped or failed
    killed.json   by the launcher of one machine: the rank that a signal ended

A start without an end.json was cut off. ~/.local/state/vectorlm/jobs/JOB.json says which folder a
job belongs to. All of it is small, private, and never needed to train: a disk that refuses it does
not end a run.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vectorlm.cluster import slurm

Outcome = Literal["finished", "stopped", "failed"]
STARTS = "starts"


@dataclass(frozen=True)
class StartRecord:
    """One start of a run."""

    number: int
    id: str  # of this start alone
    time: float
    job: str | None  # as Slurm's commands name it: 17, or 17_3 in an array
    job_id: str | None  # the number alone
    restart: int
    host: str
    pid: int
    hosts: list[str] = field(default_factory=list)  # a name for each rank
    log: str | None = None
    config: str = ""
    total_steps: int | None = None
    resumed_from: int | None = None  # step


@dataclass(frozen=True)
class RankRecord:
    """How a rank failed."""

    rank: int
    host: str
    time: float
    kind: str  # the exception's class
    message: str
    traceback: str
    code: int
    step: int | None = None


@dataclass(frozen=True)
class EndRecord:
    """How a start ended, as the first rank saw it."""

    time: float
    outcome: Outcome
    step: int | None
    signal: str | None = None
    saved: bool = True


@dataclass(frozen=True)
class KilledRecord:
    """A rank that a signal ended, as its launcher saw it; under Slurm the log has srun's word."""

    rank: int
    host: str
    time: float
    signal: str


@dataclass(frozen=True)
class PastStart:
    """A start as it can be read afterwards."""

    folder: Path
    start: StartRecord
    failures: list[RankRecord]
    end: EndRecord | None
    killed: KilledRecord | None = None


def new_start(config: str, log: str | None = None) -> StartRecord:
    """This process as the beginning of a start; its number is given when the folder is claimed."""
    return StartRecord(
        number=0,
        id=uuid.uuid4().hex,
        time=time.time(),
        job=slurm.own_job(),
        job_id=os.environ.get("SLURM_JOB_ID"),
        restart=slurm.restarts(),
        host=socket.gethostname(),
        pid=os.getpid(),
        log=log,
        config=config,
    )


class Journal:
    """The folder of one start, to write into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def begin(cls, output_dir: str | Path, record: StartRecord) -> tuple[Journal, StartRecord]:
        """A folder of its own for this start, with the next number."""
        root = Path(output_dir) / STARTS
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        number = max((int(path.name) for path in _folders(output_dir)), default=0) + 1
        while True:
            folder = root / f"{number:04d}"
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # another start, at the same moment
                number += 1
                continue
            record = StartRecord(**{**asdict(record), "number": number})
            journal = cls(folder)
            journal.started(record)
            return journal, record

    def started(self, record: StartRecord) -> None:
        write_json(self.folder / "start.json", asdict(record))

    def failed(self, record: RankRecord) -> None:
        write_json(self.folder / f"rank-{record.rank}.json", asdict(record))

    def ended(self, record: EndRecord) -> None:
        write_json(self.folder / "end.json", asdict(record))

    def killed(self, record: KilledRecord) -> None:
        write_json(self.folder / "killed.json", asdict(record))


def past_starts(output_dir: str | Path) -> list[PastStart]:
    """Every start of a run that can be read, oldest first."""
    found = []
    for folder in _folders(output_dir):
        start = _read(folder / "start.json", StartRecord)
        if start is None:
            continue
        failures = [_read(path, RankRecord) for path in sorted(folder.glob("rank-*.json"))]
        sound = sorted((f for f in failures if f is not None), key=lambda f: f.time)
        end = _read(folder / "end.json", EndRecord)
        killed = _read(folder / "killed.json", KilledRecord)
        found.append(PastStart(folder, start, sound, end, killed))
    return found


def remember_job(job_id: str, output_dir: str | Path, log: str | None) -> None:
    """Note which folder a job belongs to, so that `status JOB` and `why JOB` find it."""
    with suppress(OSError):
        folder = _jobs_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = {"output_dir": str(Path(output_dir).absolute()), "log": log, "time": time.time()}
        write_json(folder / f"{_safe(job_id)}.json", content)


def job_facts(job_id: str) -> dict[str, Any] | None:
    """What `remember_job` noted: output_dir, log, time."""
    return read_json(_jobs_folder() / f"{_safe(job_id)}.json")


def known_jobs() -> dict[str, dict[str, Any]]:
    """Every job noted, by its id, newest first."""
    folder = _jobs_folder()
    facts = {path.stem: read_json(path) for path in folder.glob("*.json")}
    sound = {job: fact for job, fact in facts.items() if fact and "output_dir" in fact}
    return dict(sorted(sound.items(), key=lambda item: -float(item[1].get("time", 0))))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, readable by its owner alone."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read(path: Path, kind: Any) -> Any:
    content = read_json(path)
    if content is None:
        return None
    known = {name: value for name, value in content.items() if name in kind.__dataclass_fields__}
    try:
        return kind(**known)
    except TypeError:  # cut short, or of another version
        return None


def _folders(output_dir: str | Path) -> list[Path]:
    root = Path(output_dir) / STARTS
    return sorted(path for path in root.glob("[0-9]*") if path.name.isdecimal())


def _jobs_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "vectorlm" / "jobs"


def _safe(job_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", job_id)
