"""A job's log, start by start: what Slurm, srun and the ranks have printed. Floor 1, used by
`evidence`.

A log may be long, cut in the middle of a character, or full of what no terminal should see: little
of it is read, and lines are cleaned before they are shown.
"""

from __future__ import annotations

import mmap
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# What the job script prints first, at every start of the job.
BANNER = re.compile(rb"== vectorlm: job (\S{1,40}), start (\d{1,6})(?:, (\S{1,40}?))?(?:,|\s|$)")
BANNER_START = b"== vectorlm: job "
CONCLUSION = "vectorlm: "  # how the lines of `conclude` begin: they repeat the cause
TAIL_BYTES = 256 << 10
SCANNED_BYTES = 64 << 20
LINE_CHARACTERS = 1000
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")


@dataclass(frozen=True)
class Line:
    text: str
    source: str  # such as vectorlm-17.log:812


@dataclass(frozen=True)
class Section:
    """The part of a log that one start has written."""

    path: Path
    begin: int
    end: int
    line: int | None  # the number of its first line, where it was counted
    job: str | None = None
    number: int | None = None  # of the start, from 1
    time: float | None = None

    def lines(self, tail_bytes: int = TAIL_BYTES) -> list[Line]:
        """Its last lines, up to where the job script began to conclude."""
        begin = max(self.begin, self.end - tail_bytes)
        try:
            with open(self.path, "rb") as file:
                skipped = self._skip(file.fileno(), begin) if self.line else None
                data = os.pread(file.fileno(), self.end - begin, begin)
        except OSError:
            return []
        texts = data.split(b"\n")
        if texts[-1] == b"":
            texts.pop()
        found = []
        for i, text in enumerate(texts):
            line = clean(text)
            if line.startswith(CONCLUSION):
                break
            number = "" if skipped is None or not self.line else f":{self.line + skipped + i}"
            found.append(Line(line, f"{self.path.name}{number}"))
        return found

    def _skip(self, descriptor: int, begin: int) -> int:
        """How many lines of this section stand before what is read."""
        count, at = 0, self.begin
        while at < begin:
            block = os.pread(descriptor, min(1 << 20, begin - at), at)
            if not block:
                break
            count += block.count(b"\n")
            at += len(block)
        return count


def clean(data: bytes) -> str:
    """A line as it may be shown; of a progress bar that was drawn over itself, the last state."""
    text = data[: 16 * LINE_CHARACTERS].decode("utf-8", "replace")
    parts = [part for part in text.split("\r") if part.strip()]
    text = _ESCAPES.sub("", parts[-1] if parts else "")
    text = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text)
    return text[:LINE_CHARACTERS].rstrip()


def sections(path: Path) -> list[Section]:
    """The starts that wrote into a log, in its order; one without a job where it says nothing."""
    try:
        if not path.is_file():
            return []
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return []
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _sections(path, data, size)
    except (OSError, ValueError):  # gone, or cut meanwhile
        return []


def _sections(path: Path, data: mmap.mmap, size: int) -> list[Section]:
    first = max(0, size - SCANNED_BYTES)
    banners = _banners(data, first)
    if not banners:
        return [Section(path, 0, size, 1)]
    ends = [at for at, _ in banners[1:]] + [size]
    found: list[Section] = []
    line, counted = 1, 0
    for (at, banner), end in zip(banners, ends, strict=True):
        if first == 0:
            line, counted = line + data[counted:at].count(b"\n"), at
        job, number, time = banner.groups()
        found.append(
            Section(
                path,
                at,
                end,
                line if first == 0 else None,
                job.decode("utf-8", "replace"),
                int(number),
                _time(time),
            )
        )
    return found


def _banners(data: mmap.mmap, first: int) -> list[tuple[int, re.Match[bytes]]]:
    found = []
    at = data.find(BANNER_START, first)
    while at >= 0:
        match = BANNER.match(data[at : at + 200])
        if match and (at == 0 or data[at - 1 : at] == b"\n"):
            found.append((at, match))
        at = data.find(BANNER_START, at + 1)
    return found


def _time(text: bytes | None) -> float | None:
    with suppress(ValueError):
        return datetime.fromisoformat((text or b"").decode("ascii", "replace")).timestamp()
    return None
