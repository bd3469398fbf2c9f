"""Does the cluster have what the job asks for? Floor 1, called by `everything`. Silent where there
is no Slurm, and about whatever Slurm does not answer.

Slurm itself refuses only part of this: a job that no node can run is often taken, and waits for
ever.
"""

from __future__ import annotations

import getpass
import grp
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import chain

from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.cluster import slurm
from vectorlm.cluster.refusal import explained
from vectorlm.cluster.script import render
from vectorlm.cluster.submit import environment
from vectorlm.config.job_text import duration_s, megabytes
from vectorlm.config.schema import Slurm
from vectorlm.config.sweep import total_runs
from vectorlm.errors import ClusterError

PATIENCE_S = 4.0
MOST_SHOWN = 12
_GPU = re.compile(r"gpu(?::([^:(,]+))?:(\d+)")
# States of a node in which it takes no job for now.
_AWAY = frozenset({"DOWN", "DRAIN", "FAIL", "FAILING", "NOT_RESPONDING", "ERROR"})


@dataclass(frozen=True)
class Node:
    """A node as `scontrol show node` tells of it."""

    name: str
    fields: dict[str, str]

    @property
    def partitions(self) -> set[str]:
        return set(self.fields.get("Partitions", "").split(","))

    @property
    def away(self) -> bool:
        return not _AWAY.isdisjoint(self.fields.get("State", "").rstrip("*").split("+"))

    @cached_property
    def gpus(self) -> dict[str, int]:
        """Type -> number; the type is empty where Slurm was told none."""
        found: dict[str, int] = {}
        for kind, count in _GPU.findall(self.fields.get("Gres", "")):
            found[kind] = found.get(kind, 0) + int(count)
        return found

    def number(self, name: str) -> int:
        text = self.fields.get(name, "")
        return int(text) if text.isdecimal() else 0


@dataclass(frozen=True)
class Cluster:
    """What Slurm says, asked once."""

    partitions: dict[str, dict[str, str]]
    nodes: tuple[Node, ...]


def look(here: Surroundings) -> Iterator[Finding]:
    section = here.config.slurm
    path = here.environ.get("PATH", os.defpath)
    if section is None or shutil.which("scontrol", path=path) is None:
        return
    try:
        cluster = Cluster(
            {one["PartitionName"]: one for one in _show(here, "partition")},
            tuple(Node(one["NodeName"], one) for one in _show(here, "node")),
        )
    except (ClusterError, KeyError) as problem:
        first = str(problem).split("; ")[0]
        text = f"Slurm cannot be asked what it has ({first})"
        yield note("slurm", text, "run it on a login node, to have this looked at, too")
        return
    looks = (
        _partitions(section, cluster),
        _preprocess_partition(section, cluster),
        _associations(here, section),
        _array(here),
        _reservation(here, section),
    )
    refused = False
    for finding in chain.from_iterable(looks):
        refused = refused or finding.severity == "error"
        yield finding
    if not refused:
        yield from _test(here)


def _show(here: Surroundings, what: str) -> list[dict[str, str]]:
    text = _ask(here, "scontrol", "-o", "show", what)
    return [slurm.fields(line) for line in text.splitlines() if "=" in line]


def _ask(here: Surroundings, *command: str) -> str:
    return slurm.call(command, PATIENCE_S, environ=dict(here.environ))


# --- partitions -----------------------------------------------------------------------------------


def _partitions(section: Slurm, cluster: Cluster) -> Iterator[Finding]:
    """A job may name several; it needs one that can take it."""
    if section.partition:
        asked = section.partition.split(",")
        unknown = [name for name in asked if name not in cluster.partitions]
        for name in unknown:
            yield _no_partition("slurm.partition", name, cluster)
        names = [name for name in asked if name not in unknown]
    else:
        names = [n for n, one in cluster.partitions.items() if one.get("Default") == "YES"]
        if not names:
            there = _some(cluster.partitions)
            text = "is not given, and this cluster has no default partition"
            yield error("slurm.partition", text, f"give one of: {there}")
    known = {node.name for node in cluster.nodes}
    for name in sorted(_expanded(section.exclude or "") - known):
        text = f"this cluster has no node {name}, and sbatch refuses such a name"
        yield error("slurm.exclude", text, f"there is: {_some(known)}")
    complaints = [list(_partition(name, section, cluster)) for name in names]
    fitting = [found for found in complaints if all(f.severity != "error" for f in found)]
    if complaints:
        yield from min(fitting or complaints, key=len)


def _no_partition(key: str, name: str, cluster: Cluster) -> Finding:
    near = get_close_matches(name, cluster.partitions, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    text = f"this cluster has no partition {name}"
    return error(key, text, f"{meant}there is: {_some(cluster.partitions)}")


def _partition(name: str, section: Slurm, cluster: Cluster) -> Iterator[Finding]:
    facts = cluster.partitions[name]
    state = facts.get("State", "UP")
    if state != "UP":
        text = f"partition {name} is {state}: the job would wait until that changes"
        yield warning("slurm.partition", text, "take another partition, or ask why")
    yield from _limits(name, facts, section)
    yield from _access(name, facts, section)
    yield from _nodes(name, section, [node for node in cluster.nodes if name in node.partitions])


def _limits(name: str, facts: dict[str, str], section: Slurm) -> Iterator[Finding]:
    most_time = _seconds(facts.get("MaxTime", "UNLIMITED"))
    if most_time is not None and section.time_s > most_time:
        text = f"{section.time} is more than partition {name} allows, {facts['MaxTime']}"
        yield error("slurm.time", text, f"set at most {facts['MaxTime']}; a run goes on after it")
    most_nodes = facts.get("MaxNodes", "UNLIMITED")
    if most_nodes.isdecimal() and section.nodes > int(most_nodes):
        text = f"{section.nodes} nodes are more than partition {name} allows, {most_nodes}"
        yield error("slurm.nodes", text, f"set at most {most_nodes}")
    least = facts.get("MinNodes", "0")
    if least.isdecimal() and section.nodes < int(least):
        text = f"{section.nodes} nodes are fewer than partition {name} takes, {least}"
        yield error("slurm.nodes", text, f"set at least {least}, or take another partition")
    most_cpus = facts.get("MaxCPUsPerNode", "UNLIMITED")
    if most_cpus.isdecimal() and _cpus(section) > int(most_cpus):
        text = f"{_cpus(section)} CPU cores a node are more than partition {name} allows, "
        yield error("slurm.cpus_per_gpu", text + most_cpus, _fewer_cpus(section, int(most_cpus)))
    most_mb = facts.get("MaxMemPerNode", "UNLIMITED")
    if most_mb.isdecimal() and int(most_mb) and megabytes(section.mem) > int(most_mb):
        text = f"{section.mem} a node is more than partition {name} allows, {most_mb}M"
        yield error("slurm.mem", text, f"set at most {most_mb}M")


def _access(name: str, facts: dict[str, str], section: Slurm) -> Iterator[Finding]:
    for field, key, value in (
        ("Accounts", "slurm.account", section.account),
        ("Qos", "slurm.qos", section.qos),
    ):
        allowed = facts.get(f"Allow{field}", "ALL")
        denied = facts.get(f"Deny{field}", "").split(",")
        if value and allowed not in ("ALL", "") and value.lower() not in allowed.lower().split(","):
            text = f"partition {name} does not take {value}"
            yield error(key, text, f"it takes: {allowed}; or take another partition")
        elif value and value in denied:
            yield error(key, f"partition {name} refuses {value}", "take another, or a partition")
    groups = facts.get("AllowGroups", "ALL")
    if groups not in ("ALL", "") and os.geteuid() and not _groups() & set(groups.split(",")):
        text = f"partition {name} is for members of {groups}"
        yield error("slurm.partition", text, "take another partition, or ask for access")


def _groups() -> set[str]:
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return names


# --- nodes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """One thing a node must have; `offers` tells what there is where none has it."""

    key: str
    text: str
    met: Callable[[Node], bool]
    offers: Callable[[list[Node]], str]


def _nodes(name: str, section: Slurm, nodes: list[Node]) -> Iterator[Finding]:
    """Demand by demand: the first that too few nodes meet is the one to change."""
    for demand in _demands(section):
        left = [node for node in nodes if demand.met(node)]
        if len(left) < section.nodes:
            there = f"{len(left)} of {len(nodes)} nodes" if left else "no node"
            where = f"in partition {name} {there} {'have' if left else 'has'} {demand.text}"
            needed = f", and the job needs {section.nodes}" if section.nodes > 1 else ""
            yield error(demand.key, where + needed, demand.offers(nodes))
            return
        nodes = left
    up = [node for node in nodes if not node.away]
    if len(up) < section.nodes:
        text = f"of {len(nodes)} nodes that fit in partition {name}, {len(up)} are up"
        yield warning("slurm.partition", text, "the job waits for the others; see sinfo -R")


def _demands(section: Slurm) -> Iterator[Demand]:
    if section.nodes:
        yield Demand(
            "slurm.nodes",
            "a place in it",
            lambda node: True,
            lambda nodes: f"set at most {len(nodes)}, or take another partition",
        )
    excluded = _expanded(section.exclude or "")
    if excluded:
        yield Demand(
            "slurm.exclude", "not been excluded", lambda n: n.name not in excluded, _shorter
        )
    if section.gpus_per_node:
        yield from _gpu_demands(section.gpus_per_node, section.gpu_type)
    features = section.constraint
    if features and re.fullmatch(r"[\w.-]+(&[\w.-]+)*", features):
        wanted = set(features.split("&"))
        yield Demand(
            "slurm.constraint",
            f"the features {features}",
            lambda node: wanted <= set(node.fields.get("AvailableFeatures", "").split(",")),
            lambda nodes: (
                "remove slurm.constraint, or take of the features: "
                + _offered(n.fields.get("AvailableFeatures") for n in nodes)
            ),
        )
    cpus, mem = _cpus(section), megabytes(section.mem)
    yield Demand(
        "slurm.cpus_per_gpu",
        f"{cpus} CPU cores",
        lambda node: node.number("CPUTot") >= cpus,
        lambda nodes: _fewer_cpus(section, max((n.number("CPUTot") for n in nodes), default=0)),
    )
    yield Demand(
        "slurm.mem",
        f"{section.mem} of memory",
        lambda node: node.number("RealMemory") >= mem,
        lambda nodes: f"set at most {max((n.number('RealMemory') for n in nodes), default=0)}M",
    )


def _gpu_demands(count: int, kind: str | None) -> Iterator[Demand]:
    yield Demand(
        "slurm.gpus_per_node",
        "a GPU",
        lambda node: bool(node.gpus),
        lambda nodes: "take a partition with GPUs (sinfo -o '%P %G'), or set gpus_per_node: 0",
    )
    if kind:
        yield Demand(
            "slurm.gpu_type",
            f"GPUs of type {kind}",
            lambda node: kind.lower() in {name.lower() for name in node.gpus},
            lambda nodes: "there is: " + _offered(name for n in nodes for name in n.gpus),
        )

    def number(node: Node) -> int:
        if kind is None:
            return sum(node.gpus.values())
        return sum(n for name, n in node.gpus.items() if name.lower() == kind.lower())

    yield Demand(
        "slurm.gpus_per_node",
        f"{count} GPUs{f' of type {kind}' if kind else ''}",
        lambda node: number(node) >= count,
        lambda nodes: f"set at most {max(map(number, nodes), default=0)}, and more slurm.nodes",
    )


def _shorter(nodes: list[Node]) -> str:
    return "exclude fewer nodes, or take another partition"


def _expanded(text: str) -> set[str]:
    """`gpu[01-03,7],x` -> its names."""
    found = set()
    for prefix, inside, plain in re.findall(r"([^,\[\]]+)\[([^\]]*)\]|([^,\[\]]+)", text):
        if plain:
            found.add(plain)
        for part in inside.split(",") if inside else ():
            first, _, last = part.partition("-")
            if first.isdecimal() and (last or first).isdecimal():
                for number in range(int(first), int(last or first) + 1):
                    found.add(f"{prefix}{number:0{len(first)}d}")
    return found


def _cpus(section: Slurm) -> int:
    return section.cpus_per_gpu * section.ranks_per_node


def _fewer_cpus(section: Slurm, most: int) -> str:
    return (
        f"set at most {most // section.ranks_per_node} ({section.ranks_per_node} processes a node)"
    )


def _seconds(text: str) -> int | None:
    try:
        return duration_s(text)
    except (ValueError, KeyError, AttributeError):
        return None  # UNLIMITED


# --- the job for the data, accounts, arrays -------------------------------------------------------


def _preprocess_partition(section: Slurm, cluster: Cluster) -> Iterator[Finding]:
    for name in (section.preprocess.partition or "").split(","):
        if name and name not in cluster.partitions:
            yield _no_partition("slurm.preprocess.partition", name, cluster)
    for name in (section.preprocess.partition or "").split(","):
        most = _seconds(cluster.partitions.get(name, {}).get("MaxTime", "UNLIMITED"))
        if most is not None and section.preprocess.time_s > most:
            text = f"{section.preprocess.time} is more than partition {name} allows"
            yield error("slurm.preprocess.time", text, f"set at most {most // 60} minutes")


def _associations(here: Surroundings, section: Slurm) -> Iterator[Finding]:
    """Silent where no accounts are kept."""
    who = f"user={getpass.getuser()}"
    try:
        text = _ask(here, "sacctmgr", "-n", "-P", "show", "assoc", who, "format=account,qos")
        columns = "format=name,maxwall,maxtres,maxtrespu"
        limits = _ask(here, "sacctmgr", "-n", "-P", "show", "qos", columns)
    except ClusterError:
        return
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    accounts = {row[0] for row in rows}
    if accounts and section.account and section.account.lower() not in accounts:
        cure = f"yours are: {_some(accounts)}"
        yield error("slurm.account", f"you are not in account {section.account}", cure)
        return
    mine = [row for row in rows if section.account in (None, row[0])]
    allowed = {name for row in mine for name in row[1].split(",") if name}
    if allowed and section.qos and section.qos not in allowed:
        cure = f"yours are: {_some(allowed)}"
        yield error("slurm.qos", f"you may not use {section.qos}", cure)
        return
    yield from _qos_limits(section, [line.split("|") for line in limits.splitlines()])


def _qos_limits(section: Slurm, rows: Sequence[Sequence[str]]) -> Iterator[Finding]:
    mine = next((row for row in rows if len(row) == 4 and row[0] == section.qos), None)
    if mine is None:
        return
    name, wall, *allowances = mine
    most = _seconds(wall or "UNLIMITED")
    if most is not None and section.time_s > most:
        text = f"{section.time} is more than qos {name} allows, {wall}"
        yield error("slurm.time", text, f"set at most {wall}; a run goes on after it")
    wanted = section.nodes * section.gpus_per_node
    for text in allowances:  # of a job, of all jobs of a user
        found = re.search(r"gres/gpu=(\d+)", text)
        if found and wanted > int(found[1]):
            said = f"{wanted} GPUs are more than qos {name} allows, {found[1]}"
            yield error("slurm.gpus_per_node", said, f"ask for at most {found[1]} in all")
            return


def _array(here: Surroundings) -> Iterator[Finding]:
    if here.config.sweep is None:
        return
    try:
        text = _ask(here, "scontrol", "show", "config")
    except ClusterError:
        return
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.M)
    runs = total_runs(here.config.sweep)
    if found and runs > int(found[1]):
        text = f"its {runs} runs are more than an array may have here, {found[1]}"
        yield error("sweep", text, "split it into several")


def _reservation(here: Surroundings, section: Slurm) -> Iterator[Finding]:
    if not section.reservation:
        return
    try:
        there = {one.get("ReservationName", "") for one in _show(here, "reservation")}
    except ClusterError:
        return
    for name in section.reservation.split(","):
        if name not in there:
            cure = f"remove slurm.reservation, or take one of: {_offered(there)}"
            yield error("slurm.reservation", f"there is no reservation {name}", cure)


def _test(here: Surroundings) -> Iterator[Finding]:
    """sbatch itself, which submits nothing: it knows what is not looked at here."""
    try:
        script = render(here.config, here.config_path)
        slurm.call(["sbatch", "--test-only"], PATIENCE_S, script, environment(here.environ))
    except ClusterError as problem:
        words = str(explained(problem))
        if "did not answer" in words or "is not on PATH" in words:
            return
        said, _, cure = words.partition("\n")
        # It asks whether the job could start now; what may be otherwise tomorrow is no refusal.
        if re.search(r"unrecognized|[Ii]nvalid (account|qos|partition|feature|node|generic)", said):
            yield error("slurm", said, cure or "change what it names")
        elif "policy" in said:
            yield warning("slurm", said, cure or "change what it names")


def _some(names: object) -> str:
    found = sorted(names)  # type: ignore[call-overload]
    more = f", and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return ", ".join(found[:MOST_SHOWN]) + more


def _offered(values: object) -> str:
    found = {v for v in values if v and v != "(null)"}  # type: ignore[attr-defined]
    return _some(found) or "none"
