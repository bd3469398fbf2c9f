"""How far a run is, from the files it writes: metrics.jsonl and checkpoints/. Floor 1, used by
`status`; read without torch, and without reading a long file whole.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MANIFEST = "MANIFEST.json"
_TAIL_BYTES = 1 << 16
_RECENT_LINES = 5
_LARGEST = 1e300
_STEP = re.compile(r"step_(\d{8,})$")


@dataclass(frozen=True)
class Progress:
    """The last logged step, and the speed of the last few."""

    values: dict[str, float]  # by their names in metrics.jsonl
    seconds_per_step: float | None
    interval_s: float | None  # the longest between two of the last lines
    written: float | None  # when the last line was
    note: str | None = None

    def whole(self, name: str) -> int | None:
        value = self.values.get(name)
        return None if value is None else int(value)


@dataclass(frozen=True)
class Checkpoint:
    step: int
    time: float


def read_progress(output_dir: Path) -> Progress:
    path = output_dir / METRICS
    try:
        with open(path, "rb") as file:
            size, written = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except FileNotFoundError:
        return Progress({}, None, None, None)
    except OSError as error:
        return Progress({}, None, None, None, f"{METRICS} cannot be read: {error.strerror}")
    lines = tail.split(b"\n")[:-1]  # the last may be in the making
    if size > len(tail):
        lines = lines[1:]
    steps = [values for line in lines if (values := _values(line))]
    lost = len(lines) - len(steps)
    note = f"{lost} of the last {len(lines)} lines of {METRICS} are damaged" if lost else None
    return _progress(steps, written, note)


def _progress(steps: list[dict[str, float]], written: float, note: str | None) -> Progress:
    if not steps:
        return Progress({}, None, None, None, note)
    recent = [s for s in steps[-_RECENT_LINES:] if s.get("steps", 0) > 0 and "seconds" in s]
    seconds = [s["seconds"] for s in recent]
    speed = sum(seconds) / sum(s["steps"] for s in recent) if recent else None
    return Progress(steps[-1], speed, max(seconds, default=None), written, note)


def _values(line: bytes) -> dict[str, float] | None:
    """The numbers of a line; None where it is no logged step."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    numbers = {name: value for name, value in content.items() if _is_number(value)}
    return numbers if "step" in numbers else None


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -_LARGEST < value < _LARGEST  # neither NaN nor infinity


def newest_checkpoint(output_dir: Path) -> Checkpoint | None:
    """The newest that was published; its files are not read. OSError: the folder cannot be read."""
    root = output_dir / CHECKPOINTS
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = [(int(match[1]), name) for name in names if (match := _STEP.fullmatch(name))]
    for step, name in sorted(found, reverse=True):
        try:
            return Checkpoint(step, (root / name / MANIFEST).stat().st_mtime)
        except (FileNotFoundError, NotADirectoryError):  # unfinished, or pruned just now
            continue
    return None


def best(output_dir: Path, metric: str, goal: str) -> tuple[float, int] | None:
    """The best logged value of a metric and its step; the first of equal ones."""
    path = output_dir / METRICS
    try:
        facts = path.stat()
        return _best(path, metric, goal, (facts.st_ino, facts.st_size, facts.st_mtime_ns))
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _best(path: Path, metric: str, goal: str, version: tuple[int, ...]) -> tuple[float, int] | None:
    """`version`: a file that has not changed since is not read again."""
    sign = 1 if goal == "min" else -1
    least, step = math.inf, 0
    number = re.compile(re.escape(json.dumps(metric)).encode() + rb": *([-+.\deE]+)")
    with open(path, "rb") as file:
        for line in file:
            found = number.search(line)
            if found is None or not _is_less(sign, found[1], least):  # most lines: not parsed
                continue
            values = _values(line) or {}
            if metric in values:
                least, step = sign * values[metric], int(values["step"])
    return (sign * least, step) if least < math.inf else None


def _is_less(sign: int, text: bytes, least: float) -> bool:
    try:
        return sign * float(text) < least
    except ValueError:
        return False
