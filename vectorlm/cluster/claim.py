"""Who may write into an output folder: one start of one run at a time. Floor 1, used by `attempt`.

`owner.json` names the start that owns the folder, and its owner touches the file every few seconds.
`run.lock` is held besides, where the file system has locks: it falls with the process. A start that
finds another's name in owner.json has lost the folder, and must not write any more.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from vectorlm.cluster import slurm
from vectorlm.cluster.journal import StartRecord, read_json, write_json
from vectorlm.errors import ClusterError, ConfigError

OWNER = "owner.json"
LOCK = "run.lock"
BEAT_S = 5.0
SILENCE_S = 3 * BEAT_S  # after which an owner that cannot be asked after counts as dead


class Claim:
    """The folder as one start holds it; also in the hands of its other ranks, who only look."""

    def __init__(self, output_dir: str | Path, start_id: str, lock: IO[str] | None = None) -> None:
        self.path = Path(output_dir) / OWNER
        self.start_id = start_id
        self._lock = lock
        self._done = threading.Event()

    def loss(self) -> str | None:
        """Who has the folder now, if that is another start; to be asked before publishing."""
        owner = read_json(self.path)
        if owner is None or owner.get("id") == self.start_id:
            return None
        return (
            f"{self.path.parent}: now belongs to another start of the run, {_name(owner)}; this "
            "one leaves without writing anything more"
        )

    def watch(self, on_loss: Callable[[str], None]) -> None:
        """Look every few seconds; the owner's first rank shows a sign of life, too."""

        def look() -> None:
            while not self._done.wait(BEAT_S):
                loss = self.loss()
                if loss is not None:
                    on_loss(loss)
                    return
                if self._lock is not None:
                    with suppress(OSError):
                        os.utime(self.path)

        threading.Thread(target=look, daemon=True, name="claim-watch").start()

    def release(self) -> None:
        self._done.set()
        if self._lock is None:
            return
        owner = read_json(self.path)
        if owner is not None and owner.get("id") == self.start_id:
            with suppress(OSError):  # a full disk: the lock falls all the same
                write_json(self.path, {**owner, "ended": time.time()})
        self._lock.close()


def take(output_dir: str | Path, start: StartRecord) -> Claim:
    """Take the folder for a start; ClusterError when another live run has it."""
    lock = _open_lock(output_dir)
    path = Path(output_dir) / OWNER
    owner = read_json(path)
    if not _may_take(owner, start, path, _try_lock(lock)):
        lock.close()
        raise ClusterError(
            f"train_parameters.output_dir: {output_dir} is in use by {_name(owner or {})}; wait "
            "for it, end it, or give another folder"
        )
    try:
        write_json(path, asdict(start))
    except OSError as error:
        lock.close()
        raise _unwritable(output_dir, error) from error
    return Claim(output_dir, start.id, lock)


def _may_take(
    owner: dict[str, object] | None, start: StartRecord, path: Path, locked: bool | None
) -> bool:
    if owner is None:
        return locked is not False
    if owner.get("ended") or _is_earlier(owner, start):
        return True
    if locked is not None and owner.get("host") == start.host:
        return locked
    alive = None if owner.get("job_id") == start.job_id else _job_is_alive(owner.get("job_id"))
    return not (_shows_life(path) if alive is None else alive)


def _is_earlier(owner: dict[str, object], start: StartRecord) -> bool:
    """An earlier start of the same job, or the job that this one continues."""
    if start.job_id is None:
        return False
    if owner.get("job_id") == start.job_id:
        return int(str(owner.get("restart", 0))) < start.restart
    return owner.get("job_id") == os.environ.get("VECTORLM_CONTINUES", "")


def _job_is_alive(job_id: object) -> bool | None:
    """None: there is no job, or Slurm cannot be asked."""
    if not isinstance(job_id, str) or not slurm.installed():
        return None
    try:
        job = slurm.show_job(job_id)
    except ClusterError:
        return None
    return job is not None and job.get("JobState") in slurm.ALIVE


def _shows_life(path: Path) -> bool:
    """Whether the owner touches its file, by the file system's own clock."""
    before = _touched(path)
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> float | None:
    try:
        with open(path, encoding="utf-8") as file:  # opened: a network file system then asks anew
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _open_lock(output_dir: str | Path) -> IO[str]:
    path = Path(output_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def _unwritable(output_dir: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"train_parameters.output_dir: {output_dir} cannot be written ({error}); give another "
        "folder"
    )


def _try_lock(lock: IO[str]) -> bool | None:
    """Whether no other living process of this machine holds it; None where there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _name(owner: dict[str, object]) -> str:
    if not owner:
        return "a run that is just starting"
    if owner.get("job"):
        return f"job {owner['job']} on {owner.get('host')}"
    if owner.get("host") == socket.gethostname():
        return f"a run on this machine (process {owner.get('pid')})"
    return f"a run on {owner.get('host')} (process {owner.get('pid')})"
