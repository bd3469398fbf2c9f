"""What the benchmarks share: where they ran, how rounds are told, and docs/performance.md."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "docs" / "performance.md"
COLUMNS = 120


def arguments(command: str, summary: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command, description=(summary or "").split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help=f"put the result into {PAPER.relative_to(ROOT)}"
    )
    return parser


def write(command: str, text: str, paper: Path = PAPER) -> None:
    """Replace what stands between the command's marks."""
    begin, end = f"<!-- begin: {command} --write -->", "<!-- end -->"
    head, rest = paper.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end, 1)[1]
    paper.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def circumstances(command: str, load: float, packages: Sequence[str], more: str = "") -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return wrapped(
        f"Measured on {time.strftime('%Y-%m-%d')} by `{command}`: {processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} of other work before it began; "
        f"{versions}, Python {platform.python_version()}.{' ' + more if more else ''}"
    )


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most in parentheses."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def wrapped(text: str) -> str:
    return textwrap.fill(text, COLUMNS, break_on_hyphens=False, break_long_words=False)


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def peak_bytes(pid: int) -> int:
    """The most memory a process has held; 0 where it has ended.

    Not its ru_maxrss, which begins with what the process that started it has held.
    """
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        values = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        return 1024 * int(values[0]) if values else 0
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
