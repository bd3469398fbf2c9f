"""NCCL's flight recorders: which collective did not end, and which rank was not in it. Floor 1,
used by `evidence` and `collectives`.

Each rank writes its last operations to a file when one of them times out: a pickle of plain values
(torch 2.11 to 2.13, version 2.10 of the format), or JSON. Nothing else than plain values is read.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LARGEST_BYTES = 32 << 20  # of one rank
ALL_BYTES = 256 << 20
_RANK = re.compile(r"(\d+)(?:\.json|\.pickle)?$")
_ALL_RANKS = "default_pg"  # torch's name for the group of all ranks
# Of these, all ranks give tensors of one size.
_EQUAL_SIZES = {"all_reduce", "broadcast", "_all_gather_base", "_reduce_scatter_base"}


@dataclass(frozen=True)
class Operation:
    """One collective as one rank saw it."""

    number: int  # within its group
    name: str  # such as all_reduce
    sizes: str
    place: str | None  # where in VectorLM it was asked for


@dataclass(frozen=True)
class Group:
    """What one rank did in a group of ranks."""

    name: str
    description: str
    ranks: frozenset[int]  # empty: all
    enqueued: int
    completed: int
    operations: dict[int, Operation]


@dataclass(frozen=True)
class Flight:
    rank: int
    groups: dict[str, Group]

    @property
    def waits(self) -> bool:
        return any(group.completed < group.enqueued for group in self.groups.values())


@dataclass(frozen=True)
class Lag:
    """A collective that did not end."""

    operation: Operation
    group: str  # its description
    waiting: list[int]
    late: list[int]  # that were not in it
    differing: dict[int, Operation] = field(default_factory=dict)  # that were in another one


class _Plain(pickle.Unpickler):
    """Builds numbers, texts, lists, tuples and dictionaries; a name of anything else is refused."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}: no plain value")


def read_flights(folder: Path) -> dict[int, Flight]:
    """What can be read of a start's recorders, by rank."""
    flights: dict[int, Flight] = {}
    left = ALL_BYTES
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        match = _RANK.search(path.name)
        content = _content(path, min(left, LARGEST_BYTES)) if match else None
        if content is None or match is None:
            continue
        left -= len(content)
        flight = _flight(int(match[1]), content)
        if flight:
            flights[flight.rank] = flight
    return flights


def _content(path: Path, largest: int) -> bytes | None:
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= largest:
            return None
        return path.read_bytes()
    except OSError:
        return None


def _flight(rank: int, content: bytes) -> Flight | None:
    try:
        plain = json.loads(content) if content[:1] == b"{" else _Plain(io.BytesIO(content)).load()
        return Flight(rank, _groups(plain))
    # A damaged pickle may fail in many ways; none of them may end a diagnosis.
    except Exception:
        return None


def _groups(dump: dict[str, Any]) -> dict[str, Group]:
    """The numbers of groups are each rank's own; their names are common to all."""
    config = dump.get("pg_config") or {}
    entries = [e for e in dump.get("entries") or [] if not e.get("is_p2p")]
    names = {str(e["pg_id"]): tuple(e["process_group"]) for e in entries}
    found = {}
    for number, status in (dump.get("pg_status") or {}).items():
        name, description = map(str, names.get(str(number), (number, "")))
        ranks = str((config.get(name) or {}).get("ranks", ""))
        operations = {
            int(e["collective_seq_id"]): _operation(e)
            for e in entries
            if str(e["pg_id"]) == str(number)
        }
        found[name] = Group(
            name,
            description,
            frozenset(map(int, re.findall(r"\d+", ranks))),
            int(status["last_enqueued_collective"]),
            int(status["last_completed_collective"]),
            operations,
        )
    return found


def _operation(entry: dict[str, Any]) -> Operation:
    frames = entry.get("frames") or []
    own = [f for f in frames if re.search(r"\bvectorlm/", str(f.get("filename")))]
    place = None
    if own:
        file = str(own[0]["filename"]).rpartition("vectorlm/")[2]
        place = f"{own[0].get('name')} in vectorlm/{file}:{own[0].get('line')}"
    name = str(entry.get("profiling_name", "?")).rpartition(":")[2]
    return Operation(
        int(entry["collective_seq_id"]), name[:60], str(entry.get("input_sizes", ""))[:80], place
    )


def find_lag(flights: dict[int, Flight], ranks: int | None) -> Lag | None:
    """The collective that ranks wait in while others are not there, or are in another one.

    A rank that is late for one and waits in none is what held up all others; where every late rank
    waits elsewhere, the first such collective is told.
    """
    everybody = frozenset(range(ranks)) if ranks else frozenset(flights)
    lags = [lag for name in _names(flights) if (lag := _lag(flights, name, everybody))]
    idle = {rank for rank in everybody if rank not in flights or not flights[rank].waits}
    for lag in lags:
        root = [rank for rank in lag.late if rank in idle]
        if root:
            return Lag(lag.operation, lag.group, lag.waiting, root)
    return min(lags, key=lambda lag: not (lag.late or lag.differing), default=None)


def _names(flights: dict[int, Flight]) -> list[str]:
    return list(dict.fromkeys(name for flight in flights.values() for name in flight.groups))


def _lag(flights: dict[int, Flight], name: str, everybody: frozenset[int]) -> Lag | None:
    seen = {rank: flight.groups[name] for rank, flight in flights.items() if name in flight.groups}
    waiting = {rank: group for rank, group in seen.items() if group.completed < group.enqueued}
    if not waiting:
        return None
    number = min(group.completed for group in waiting.values()) + 1
    asked = {r: g.operations[number] for r, g in waiting.items() if number in g.operations}
    first = next(iter(waiting.values()))
    operation = _usual(asked) or Operation(number, "a collective", "", None)
    members = first.ranks or everybody
    late = sorted(r for r in members if r not in seen or seen[r].enqueued < number)
    differing = {rank: op for rank, op in asked.items() if _kind(op) != _kind(operation)}
    description = "all ranks" if first.description in ("", _ALL_RANKS) else first.description
    present = sorted(r for r, g in waiting.items() if g.enqueued >= number)
    return Lag(operation, description, present, late, {} if late else differing)


def _usual(asked: dict[int, Operation]) -> Operation | None:
    """What most ranks asked for; the others are the odd ones."""
    kinds = Counter(map(_kind, asked.values()))
    return max(asked.values(), key=lambda operation: kinds[_kind(operation)], default=None)


def _kind(operation: Operation) -> tuple[str, str]:
    return operation.name, operation.sizes if operation.name in _EQUAL_SIZES else ""
