"""The folder beside a prepared one, in which it is made: who works in it, how far it is, and how it
takes its place. Floor 2, without torch; called by `data.store`.

    .NAME.tmp/             what is being written; left there by an interruption
    .NAME.tmp/progress.npz how far it is, replaced whenever a shard is complete
    .NAME.tmp/owner.json   who writes; touched every few seconds
    .NAME.lock             held while somebody writes, where the file system has locks
    .NAME.old-PID          the former folder, between the two renames

One run at a time: a lock tells on one machine, and between machines where the file system does; an
owner on another machine that still touches owner.json keeps the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from vectorlm import __version__
from vectorlm.errors import DataError
from vectorlm.files import DISK_FULL, sync, sync_folder, write_synced
from vectorlm.manifest import MANIFEST_NAME, Manifest, read_manifest

OWNER = "owner.json"
PROGRESS = "progress.npz"
BEAT_S = 5.0
SILENCE_S = 4 * BEAT_S  # after which an owner on another machine counts as gone


class Workplace:
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # A symlink (to a scratch file system, say) keeps pointing where it does: its target is
        # replaced.
        self.folder = Path(os.path.realpath(folder))
        self.temporary = self.folder.parent / f".{self.folder.name}.tmp"
        self.lock_path = self.folder.parent / f".{self.folder.name}.lock"
        self.lock: IO[str] | None = None
        self.left = threading.Event()
        self.was_there = False
        self.why_anew: str | None = None  # why an unfinished attempt is not gone on with

    def enter(self) -> None:
        with explained(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock, sure = take_lock(self.lock_path)
            if self.lock is None:
                raise DataError(busy(self.folder, read_owner(self.temporary)))
            try:
                self.claim(sure)
            except BaseException:
                self.unlock()
                raise

    def claim(self, sure: bool) -> None:
        existing_manifest(self.folder)
        refuse_live_owner(self.folder, self.temporary, sure)
        # Once a complete folder has the final name, what was moved aside for it is of no use.
        for aside in asides(self.folder) if (self.folder / MANIFEST_NAME).exists() else []:
            shutil.rmtree(aside, ignore_errors=True)
        self.was_there = self.temporary.exists()
        self.temporary.mkdir(exist_ok=True)
        self.sign()

    def sign(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        try:
            write_synced(self.temporary / OWNER, json.dumps(owner))
        except OSError:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise
        threading.Thread(target=self.beat, daemon=True, name="workplace").start()

    def beat(self) -> None:
        while not self.left.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self.temporary / OWNER)

    def leave(self, keep: bool) -> None:
        """`keep` what the next run can go on from."""
        self.left.set()
        if not (keep and (self.temporary / PROGRESS).exists()):
            shutil.rmtree(self.temporary, ignore_errors=True)
        self.unlock()

    def unlock(self) -> None:
        if self.lock:
            self.lock_path.unlink(missing_ok=True)
            self.lock.close()
            self.lock = None

    # --- how far it is ---

    def record(self, made_from: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        arrays, plain = take_apart(state)
        facts = {"version": __version__, "made_from": made_from, "state": plain}
        content = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        fresh = self.temporary / f"{PROGRESS}.new"
        with open(fresh, "wb") as file:
            np.savez(file, allow_pickle=False, facts=content, **arrays)
            sync(file)
        os.replace(fresh, self.temporary / PROGRESS)
        sync_folder(self.temporary)

    def recorded(self, made_from: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """What was recorded last by a run that made the same; None if there is none."""
        facts = self.read_progress()
        if facts is None:
            self.why_anew = "it had not come far enough to be gone on with"
        elif facts["version"] != __version__:
            self.why_anew = f"version {facts['version']} of VectorLM began it"
        elif facts["made_from"] != json.loads(json.dumps(made_from())):
            self.why_anew = "its source, tokenizer or options were others"
        else:
            return dict(facts["state"])
        self.why_anew = self.why_anew if self.was_there else None
        return None

    def read_progress(self) -> dict[str, Any] | None:
        try:
            with (
                open(self.temporary / PROGRESS, "rb") as raw,
                np.load(raw, allow_pickle=False) as file,
            ):
                facts = json.loads(file["facts"].tobytes())
                facts["state"] = put_together(facts["state"], file)
                return dict(facts)
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile):
            return None

    def keep_only(self, sizes: Mapping[str, int], kept: Collection[str] = ()) -> bool:
        """Removes what came after the last record; whether all that was recorded is there."""
        for path in self.temporary.iterdir():
            if path.name not in {*sizes, OWNER, PROGRESS, *kept}:
                path.unlink()
        there = {name: self.temporary / name for name in sizes}
        whole = all(p.is_file() and p.stat().st_size == sizes[n] for n, p in there.items())
        self.why_anew = None if whole else "its files are damaged"
        return whole

    def clear(self) -> None:
        for path in self.temporary.iterdir():
            if path.name != OWNER:
                path.unlink()

    # --- the end ---

    def tidy(self) -> None:
        self.left.set()
        for name in (PROGRESS, OWNER):
            (self.temporary / name).unlink(missing_ok=True)

    def put_in_place(self) -> None:
        """The old folder makes way only now that the new one is complete."""
        aside = self.folder.parent / f".{self.folder.name}.old-{os.getpid()}"
        if self.folder.exists():
            os.rename(self.folder, aside)
        os.rename(self.temporary, self.folder)
        sync_folder(self.folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def take_apart(state: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by their path, and the rest with their paths in their places."""
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            arrays[f"{path}{name}"] = value
            plain[name] = {"array": f"{path}{name}"}
        elif isinstance(value, Mapping):
            inner, plain[name] = take_apart(value, f"{path}{name}.")
            arrays |= inner
        else:
            plain[name] = value
    return arrays, plain


def put_together(plain: Any, arrays: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    if set(plain) == {"array"}:
        return arrays[plain["array"]]
    return {name: put_together(value, arrays) for name, value in plain.items()}


# --- one at a time ------------------------------------------------------------------


def take_lock(path: Path) -> tuple[IO[str] | None, bool]:
    """None when another process holds it; and whether this is sure, or the file system has no
    locks."""
    while True:
        lock = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None, True
        except OSError:
            return lock, False
        # Its holder may have removed it after it was opened here: then it is no longer the lock.
        with suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock, True
        lock.close()


def read_owner(temporary: Path) -> dict[str, Any]:
    try:
        owner = json.loads((temporary / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def refuse_live_owner(folder: Path, temporary: Path, sure: bool) -> None:
    """The lock is ours; an owner elsewhere may live all the same, where locks do not reach."""
    owner = read_owner(temporary)
    if not owner or (sure and owner.get("host") == socket.gethostname()):
        return
    print(
        f"{folder}: {owner_name(owner)} has begun it; looking for {SILENCE_S:.0f} s whether it "
        "still works",
        flush=True,
    )
    before = touched(temporary)
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        if touched(temporary) != before:
            raise DataError(busy(folder, owner))


def touched(temporary: Path) -> int | None:
    try:
        with open(temporary / OWNER, "rb") as file:  # opened: a network file system then asks anew
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def busy(folder: Path, owner: Mapping[str, Any]) -> str:
    return (
        f"{folder}: {owner_name(owner)} is preparing it just now.\n"
        "Wait for it, end it, or choose another save_path."
    )


def owner_name(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another run"
    return f"a run on {owner.get('host')} (process {owner.get('pid')})"


# --- the folder's own place ---------------------------------------------------------


def existing_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """What stands under the final name: None if nothing; a DataError if it is not ours to
    replace."""
    path = Path(os.path.realpath(folder))
    restore_aside(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not path.is_dir() or not (path / MANIFEST_NAME).exists():
        raise DataError(
            f"{folder}: exists and is no prepared data of ours (it has no manifest.json), "
            "so it is left alone.\n"
            "Choose another save_path, or remove it yourself."
        )
    return read_manifest(path)


def asides(folder: Path) -> list[Path]:
    """Those of all runs; compared as text, because the name may hold characters special to glob."""
    prefix = f".{folder.name}.old-"
    try:
        return sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []


def restore_aside(folder: Path) -> None:
    """A run that died between the two renames left the good old folder under its other name."""
    for aside in asides(folder):
        if not folder.exists() and (aside / MANIFEST_NAME).exists():
            with suppress(OSError):
                os.rename(aside, folder)


# --- the disk -----------------------------------------------------------------------


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one message for the user."""
    try:
        yield
    except OSError as error:
        raise DataError(disk_message(folder, error)) from error


def disk_message(folder: Path, error: OSError) -> str:
    if error.errno not in DISK_FULL:
        return (
            f"{folder}: cannot be written: {error}.\n"
            "Check the permissions, or choose another save_path."
        )
    causes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota is used up"}
    return (
        f"{folder}: {causes.get(error.errno, 'the file size limit (ulimit -f) is reached')} "
        f"({free_space(folder)} free on this file system). What was half-written is removed.\n"
        "Prepared data takes about 8 bytes a token: free space, or set save_path to another file "
        "system."
    )


def free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB"
    except OSError:
        return "unknown space"
