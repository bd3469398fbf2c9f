"""What ranks and srun have said of an end: the first exception, and how tasks left. Floor 1, used
by `evidence`.

When one rank fails, the others fail of that: what they say is a consequence, and weak evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vectorlm.cluster.joblog import Line, clean
from vectorlm.cluster.journal import RankRecord

_EXCEPTION = re.compile(
    r"(?:\[rank(\d+)\]: ?|\s*(\d+): )?(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?::(?: (.*))?)?$"
)
# What C++ threads say before they abort: NCCL's watchdog, and the handler of last resort.
_ABORT = re.compile(
    r"(?:\[rank(\d+)\]:\[E\S* \S+ \S+\] \[.*?Rank \d+\]\s+"
    r"|\s*what\(\):\s+(?:\[.*?Rank (\d+)\]\s+)?)"
    r"Process group watchdog thread terminated with exception: (.*)$"
)
_TIMED_OUT = re.compile(r"\[Rank \d+\] Watchdog caught collective operation timeout")
_LABEL = re.compile(r"\[rank\d+\]: ?|\s*\d+: ")
_NOT_MESSAGE = re.compile(r"srun: |slurmstepd|== |Traceback |step \d")
_BEGIN = re.compile(r"(?:\[rank\d+\]: ?|\s*\d+: )?Traceback \(most recent call last\):")
_HARMLESS = re.compile(r"(?:\[rank\d+\]: ?|\s*\d+: )?Exception ignored in")
_CONSEQUENCES = {
    "RankLostError",
    "KeyboardInterrupt",
    "DistNetworkError",
    "DistStoreError",
    "ConnectionError",
    "ConnectionResetError",
    "ConnectionRefusedError",
    "ConnectionAbortedError",
    "BrokenPipeError",
    "EOFError",
}
_CONSEQUENCE = re.compile(
    r"gloo/transport|Connection (?:closed|reset) by peer|Broken pipe|Socket Timeout"
    r"|is killed by signal: (?:Killed|Terminated)|cannot reach the others at"
)
_GPU = re.compile(r"cuda (?:failure|error)|out of memory", re.I)
_TASKS = re.compile(r"\s*srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$")
_ENDING = re.compile(
    r"srun: (?:launch/slurm: \S+ )?(?:Terminating|Force Terminated|Job step aborted|forcing)"
    r"|slurmstepd\S* error: \*\*\* (?:STEP|JOB) .*CANCELLED"
)


@dataclass(frozen=True)
class Fault:
    """An exception that ended a rank."""

    kind: str
    message: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    time: float | None = None
    code: int | None = None
    recorded: bool = False  # by the rank itself, not only seen in the log
    proof: Sequence[Line] = field(default=())

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.message}"

    @property
    def weak(self) -> bool:
        """Whether it may well be the consequence of another rank's end."""
        if self.kind in _CONSEQUENCES or _CONSEQUENCE.search(self.message):
            return True
        return self.kind == "DistBackendError" and not _GPU.search(self.message)

    @property
    def mute(self) -> bool:
        """Whether it says of another rank's end that there was one, and no more."""
        return self.kind in ("RankLostError", "KeyboardInterrupt")


@dataclass(frozen=True)
class TaskEnd:
    """How srun saw tasks leave; a task's number is its rank."""

    host: str
    ranks: list[int]
    words: str  # Killed, Exited with exit code 2, ...
    line: Line
    first: bool  # before anything began to end the others


def first_fault(records: Sequence[RankRecord], lines: Sequence[Line]) -> Fault | None:
    """The first exception that is not a consequence of another; a rank's own record is trusted more
    than the log. Where there are consequences only, the first of them.
    """
    own = [_recorded(record) for record in sorted(records, key=lambda record: record.time)]
    logged = list(_logged(lines))
    # A stable order: within each kind the first stays the first.
    found = sorted([*own, *logged], key=lambda fault: (fault.weak, fault.mute))
    return found[0] if found else None


def _recorded(record: RankRecord) -> Fault:
    source = f"rank-{record.rank}.json"
    frames = re.findall(r'^  File ".*$', record.traceback, re.M)
    said = [f"{record.kind}: {record.message}".strip().splitlines()[0], *frames[-1:]]
    return Fault(
        kind=record.kind,
        message=record.message,
        rank=record.rank,
        host=record.host,
        step=record.step,
        time=record.time,
        code=record.code,
        recorded=True,
        proof=[Line(clean(text.strip().encode()), source) for text in said],
    )


def _logged(lines: Sequence[Line]) -> Iterator[Fault]:
    """The exceptions that a log shows: the last line of each traceback, and what C++ says."""
    opened = harmless = False
    for i, line in enumerate(lines):
        if _BEGIN.match(line.text):
            opened = True
        elif _HARMLESS.match(line.text):
            harmless = True
        elif abort := _ABORT.match(line.text):
            if not _TIMED_OUT.match(abort[3]):
                yield Fault("Error", abort[3], _number(abort[1] or abort[2]), proof=[line])
        elif opened and (match := _EXCEPTION.match(line.text)):
            if not harmless:
                message = "\n".join([match[4] or "", *_more(line, lines[i + 1 : i + 8])])
                yield Fault(match[3], message, _number(match[1] or match[2]), proof=[line])
            opened = harmless = False


def _more(line: Line, following: Sequence[Line]) -> Iterator[str]:
    """The rest of a message of several lines."""
    mark = match[0] if (match := _LABEL.match(line.text)) else ""
    for other in following:
        text = other.text.removeprefix(mark)
        foreign = not other.text.startswith(mark) or _LABEL.match(text) or _NOT_MESSAGE.match(text)
        if foreign or not text:
            return
        yield text


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def task_ends(lines: Sequence[Line]) -> list[TaskEnd]:
    found = []
    ending = False
    for line in lines:
        match = _TASKS.match(line.text)
        if match:
            first = not ending and match[3] != "Terminated"
            found.append(TaskEnd(match[1], _ranks(match[2]), match[3], line, first))
        ending = ending or bool(_ENDING.match(line.text.strip()))
    return found


def _ranks(text: str) -> list[int]:
    """`0-1,3` -> [0, 1, 3]."""
    ranks: list[int] = []
    for part in text.split(",")[:1000]:
        first, _, last = part.partition("-")
        if first.isdecimal():
            begin = int(first)
            ranks += range(begin, min(int(last) if last.isdecimal() else begin, begin + 9999) + 1)
    return ranks
