"""Recognizes what ended the talk between ranks: a collective that timed out, the network, a meeting
that did not come about, a rank that fell silent. Floor 1, used by `causes`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vectorlm.cluster.evidence import Evidence, Finding
from vectorlm.cluster.faults import at_step, brief, told, who
from vectorlm.cluster.flight import Lag, Operation, find_lag
from vectorlm.cluster.joblog import Line

# NCCL's watchdog, as torch 2.11 to 2.13 has it. The first number is the rank; the one in the second
# brackets counts within the group.
_TIMEOUT = re.compile(
    r"(?:\[rank(\d+)\]:\[\S+ \S+ \S+\] )?\[.*?Rank (\d+)\] +Watchdog caught collective operation "
    r"timeout: WorkNCCL\(SeqNum=(\d+), OpType=(\w+),.*?Timeout\(ms\)=(\d+)"
)
_STATUS = re.compile(
    r"\[rank(\d+)\]:\[\S+ \S+ \S+\] \[PG ID \S+ PG GUID (\S+?)(?:\((.*?)\))? Rank \d+\] +failure "
    r"detected by watchdog at work sequence id: (\d+)"
)
_DUMP = re.compile(
    r"\[rank(\d+)\]:\[\S+ \S+ \S+\] \[PG ID .*?PG GUID (\S+?)(?:\(.*?\))? Rank \d+\] +Received a "
    r"dump signal .*? Last enqueued NCCL work: (-?\d+), last completed NCCL work: (-?\d+)"
)
_NETWORK = re.compile(
    r"ncclSystemError|ncclRemoteError|unhandled system error|remote process exited"
    r"|Connection (?:closed|reset) by peer|Socket Timeout|No route to host|Network is unreachable"
    r"|ibv_|NET/IB|Connection timed out"
)
_NETWORK_LINE = re.compile(
    r"(?:(\S+?):\d+:\d+ )?.*NCCL WARN (.*(?:Call to ibv_\w+ failed|NET/(?:IB|Socket)"
    r"|socket\w* .*(?:failed|closed)|Connection (?:closed|reset|refused|timed out)).*)"
)
_MEETING = re.compile(
    r"cannot reach the others at|Timed out after .* waiting for clients|client socket has (?:timed"
    r" out|failed)|connectFullMesh|the first rank, on \S+, was not there|are all in use; set MASTER"
    r"|cannot reach \S+ at \S+ \(interface|did not answer within \d+ s, while"
)


def timed_out(evidence: Evidence) -> Finding | None:
    seen = evidence.search(_TIMEOUT)
    lag = find_lag(evidence.flights, evidence.ranks) or _lag_of_log(evidence)
    if lag is None or not (seen or evidence.flights):
        return None
    minutes = f" within {int(seen[0][5]) / 60000:.0f} min" if seen else ""
    name = f"{lag.operation.name} number {lag.operation.number} of {lag.group}"
    late = lag.late[0] if lag.late else min(lag.differing, default=None)
    return Finding(
        f"the collective {name} did not end{minutes}: {_blame(evidence, lag)}",
        _proof(evidence, lag, seen[1] if seen else None),
        late,
        evidence.host_of(late),
        evidence.last_step,
        cure=None if late is not None else _NOBODY_LATE,
    )


_NOBODY_LATE = (
    "All ranks were in it, so the network or a GPU did not carry it: set slurm.network_interface, "
    "try slurm.disable_infiniband: true, or leave a suspicious node out with slurm.exclude"
)


def _blame(evidence: Evidence, lag: Lag) -> str:
    if lag.late:
        verb = "were" if len(lag.late) > 1 else "was"
        return f"{_names(evidence, lag.late)} {verb} not in it{_instead(evidence, lag)}"
    if lag.differing:
        rank, other = min(lag.differing.items())
        return (
            f"{_names(evidence, [rank])} asked for {_asked(other)} where others asked for "
            f"{_asked(lag.operation)}"
        )
    return "every rank was in it"


def _asked(operation: Operation) -> str:
    return f"{operation.name} {operation.sizes}".strip()


def _names(evidence: Evidence, ranks: Sequence[int]) -> str:
    named = [
        f"{rank}" + (f" on {host}" if (host := evidence.host_of(rank)) else "")
        for rank in ranks[:4]
    ]
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}{more}"


def _instead(evidence: Evidence, lag: Lag) -> str:
    """What the late rank did, if it says so."""
    rank = lag.late[0]
    for failure in evidence.start.failures if evidence.start else []:
        if failure.rank == rank and failure.kind != "RankLostError":
            return f"; it had failed of {failure.kind}: {' '.join(failure.message.split())[:200]}"
    flight = evidence.flights.get(rank)
    last = [o for g in flight.groups.values() for o in g.operations.values()] if flight else []
    places = [operation for operation in last if operation.place]
    if places:
        operation = max(places, key=lambda operation: operation.number)
        return f"; it was last seen in {operation.name} from {operation.place}"
    return "" if flight or not evidence.flights else "; it wrote no record either"


def _proof(evidence: Evidence, lag: Lag, line: Line | None) -> list[Line]:
    found = [line] if line else []
    for rank in [*lag.waiting[:1], *lag.late[:1]]:
        flight = evidence.flights.get(rank)
        if flight is None:
            continue
        texts = [
            f"{group.description or group.name}: last begun {group.enqueued}, last ended "
            f"{group.completed}"
            for group in flight.groups.values()
        ]
        found.append(Line("; ".join(texts[:3]), f"flight-recorder rank {rank}"))
    return found


def _lag_of_log(evidence: Evidence) -> Lag | None:
    """From the watchdogs' lines alone: who timed out, and who had not got that far."""
    waiting: dict[int, Operation] = {}
    places: dict[int, int] = {}  # of a rank within the group
    begun: dict[int, int] = {}  # the last of a rank's collectives of all ranks
    group = "a group of ranks"
    for line in evidence.lines:
        if match := _TIMEOUT.match(line.text):
            rank = int(match[1] or match[2])
            places.setdefault(rank, int(match[2]))
            waiting.setdefault(rank, Operation(int(match[3]), _name(match[4]), "", None))
        elif (match := _STATUS.match(line.text)) and match[3]:
            group = "all ranks" if match[3] == "default_pg" else match[3]
        elif (match := _DUMP.match(line.text)) and match[2] == "0":
            begun[int(match[1])] = int(match[3])
    if not waiting:
        return None
    operation = min(waiting.values(), key=lambda operation: operation.number)
    if group == "all ranks":
        missing = set(range(evidence.ranks or 0)) | set(begun)
        late = [rank for rank in missing - set(waiting) if begun.get(rank, 0) < operation.number]
    else:
        late = _between(places)
    return Lag(operation, group, sorted(waiting), sorted(late))


def _name(operation: str) -> str:
    return operation.lower().strip("_")


def _between(places: dict[int, int]) -> list[int]:
    """The ranks that are missing among those of a group, when these are evenly apart."""
    known = sorted(places.items(), key=lambda item: item[1])
    if len(known) < 2 or known[0][1] == known[-1][1]:
        return []
    (first, low), (last, high) = known[0], known[-1]
    apart, rest = divmod(last - first, high - low)
    if rest or any(rank != first + apart * (place - low) for rank, place in known):
        return []
    everybody = {first + apart * (place - low) for place in range(high + 1)}
    return sorted(everybody - set(places))


def network(evidence: Evidence) -> Finding | None:
    """Unless a time-out came first: what NCCL says after that is its own aborting."""
    timeout = evidence.search(_TIMEOUT)
    seen = evidence.search(_NETWORK_LINE)
    if seen and not (timeout and _before(evidence, timeout[1], seen[1])):
        where = f" on {seen[0][1]}" if seen[0][1] else ""
        return Finding(
            f"the network between ranks failed{where}{at_step(evidence.last_step)}: "
            f"{seen[0][2][:200]}",
            [seen[1]],
            host=seen[0][1],
            step=evidence.last_step,
        )
    fault = evidence.fault
    if timeout or fault is None or not fault.weak or not _NETWORK.search(fault.text):
        return None
    if fault.kind == "RankLostError":
        return None
    said = brief(fault)
    return told(evidence, fault, f"the network between ranks failed {who(evidence, fault)}: {said}")


def _before(evidence: Evidence, one: Line, other: Line) -> bool:
    lines = list(evidence.lines)
    return lines.index(one) < lines.index(other)


def no_meeting(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault is None or not _MEETING.search(fault.text):
        return None
    return told(
        evidence, fault, f"{who(evidence, fault)} could not reach the others: {brief(fault)}"
    )


def silent(evidence: Evidence) -> Finding | None:
    """Ranks that lost another one, which says nothing itself."""
    failures = evidence.start.failures if evidence.start else []
    if not failures or not evidence.ranks:
        return None
    told_of = {failure.rank for failure in failures}
    missing = [rank for rank in range(evidence.ranks) if rank not in told_of]
    proof = [Line(f"{f.kind}: {f.message.strip()}"[:200], f"rank-{f.rank}.json") for f in failures]
    proof += [end.line for end in evidence.task_ends if end.first]
    where = at_step(evidence.last_step)
    if not missing:
        return Finding(f"all ranks lost each other{where}", proof[:4], step=evidence.last_step)
    rank = missing[0]
    return Finding(
        f"{_names(evidence, missing)} left without a word{where}, and the others with it",
        proof[:4],
        rank,
        evidence.host_of(rank),
        evidence.last_step,
    )
