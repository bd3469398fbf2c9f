"""Contenders of a benchmark: runs of their own that train on and on, stopped unless it is their
turn; so what else goes on on the machine strikes all alike. Used by `train`, `scaling` and `gpu`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper import ROOT, peak_bytes

START_S, STEP_S, END_S = 300.0, 180.0, 30.0  # limits for waiting
POLL_S = 0.02
TOLD_CHARACTERS = 3000  # of a failed run's output


@dataclass
class Run:
    """A contender's processes; its log has a line a step, with the real tokens so far."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    output: Path
    rates: list[float] = field(default_factory=list)
    memory_gib: float = 0.0
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _read_bytes: int = 0

    def steps(self) -> list[dict[str, Any]]:
        """What is logged so far; only what is new is read."""
        with suppress(FileNotFoundError):
            if self.log.stat().st_size > self._read_bytes:
                with open(self.log, "rb") as file:
                    file.seek(self._read_bytes)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._read_bytes += len(whole)
                self._steps += map(json.loads, whole.splitlines())
        return self._steps

    def after(self, step: int, limit_s: float) -> tuple[int, float]:
        """Wait for the end of a step: the real tokens so far, and when it was seen."""
        deadline = time.monotonic() + limit_s
        while len(done := self.steps()) < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no step {step}:\n{self.said()}")
            time.sleep(POLL_S)
        return done[step - 1]["tokens"], time.monotonic()

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")[-TOLD_CHARACTERS:]

    def take_turn(self, steps: int, seconds: float = 0.0) -> list[dict[str, Any]]:
        """At least so many steps and so long, after the one that was begun in an earlier turn.
        Their lines of the log.
        """
        self.signal(signal.SIGCONT)
        first = last = len(self.steps()) + 1
        tokens, began = more, ended = self.after(first, STEP_S)
        while last - first < steps or ended - began < seconds:
            last += 1
            more, ended = self.after(last, STEP_S)
        self.signal(signal.SIGSTOP)
        self.rates.append((more - tokens) / (ended - began))
        self.memory_gib = max(map(peak_bytes, self.members())) / 2**30
        return self.steps()[first:last]

    def members(self) -> list[int]:
        """The process and all that it started; ranks have sessions of their own."""
        children = children_of_all()
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def signal(self, number: int) -> None:
        for pid in self.members():
            os.kill(pid, number)

    def end(self) -> None:
        """Also of what it started nothing is left."""
        members = self.members() if self.process.poll() is None else []
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + END_S
        while any(map(is_running, members)) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def children_of_all() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            found.setdefault(int(stat_of(int(name))[1]), []).append(int(name))
    return found


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return stat_of(pid)[0] != "Z"
    return False


def stat_of(pid: int) -> list[str]:
    """State, parent, and so on; the program's name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def begin(name: str, command: Sequence[str], folder: Path, threads: int | None = None) -> Run:
    """Started, logging to `folder/out/metrics.jsonl`; `threads` of each rank, where it is said."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "true",
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    output = folder / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
    return Run(name, process, folder / "out" / "metrics.jsonl", output)


def begin_stopped(name: str, command: Sequence[str], folder: Path, threads: int) -> Run:
    """Started, past its first steps, and stopped until its turn."""
    run = begin(name, command, folder, threads)
    try:
        run.after(2, START_S)
        run.signal(signal.SIGSTOP)
    except BaseException:
        run.end()
        raise
    return run


def vectorlm(config: dict[str, Any], folder: Path, ranks: int) -> list[str]:
    """The command that trains as this configuration says."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    train = [sys.executable, "-m", "vectorlm.cli", "train", "--config", str(file)]
    return [*train, "--nproc-per-node", str(ranks)]
