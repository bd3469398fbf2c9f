"""What the ranks of a job found before the first step, and what follows from it. Floor 1.

`measure` gathers the facts and prints the report. Here they are only judged: no torch, no files.
A finding names the nodes it concerns, and says what to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, TypeVar

Level = Literal["error", "warning"]
T = TypeVar("T")

MIB, GIB = 1 << 20, 1 << 30
SHM_BYTES_A_RANK = 64 * MIB  # NCCL's shared buffers between the ranks of a node
FULL_DISK_BYTES = 256 * MIB
FULL_DISK_FILES = 1000
USED_GPU_BYTES = 2 * GIB  # more than a process takes by starting
CLOCK_SKEW_S = 60.0
SLOW_LINK_BYTES_S = 0.125e9  # 1 Gb/s
FASTER = 4  # an idle interface this many times faster is worth a word
LAGGING = 0.5  # of the median node's bandwidth

# What must be the same everywhere, and how bad it is if it is not.
SOFTWARE: dict[str, Level] = {
    "torch": "error",
    "CUDA": "error",
    "NCCL": "error",
    "vectorlm": "error",
    "transformers": "error",
    "python": "warning",
    "driver": "warning",
}


@dataclass(frozen=True)
class Folder:
    """A folder as one rank sees it."""

    path: str
    free_bytes: int | None = None
    free_files: int | None = None  # None: this file system does not count them
    problem: str | None = None  # why it cannot be written
    shared: bool | None = None  # whether the first rank's file is seen; None: nobody looked


@dataclass(frozen=True)
class Network:
    """How a rank reaches the others."""

    interface: str | None  # that of gloo, and of NCCL where there is no InfiniBand
    address: str | None
    interfaces: dict[str, int | None] = field(default_factory=dict)  # those that are up -> Mb/s
    absent: str | None = None  # an interface that was asked for and is not there
    infiniband: bool = False  # an active port, not switched off


@dataclass(frozen=True)
class RankFacts:
    """What a rank says of itself and its machine."""

    rank: int
    node: str
    device: str  # a GPU's name, or CPU
    versions: dict[str, str | None]
    cores: tuple[int, ...]  # the numbers of those it may use
    host_free_bytes: int
    network: Network
    shm: Folder
    tmp: Folder
    output: Folder
    gpu: str | None = None  # what tells it from every other
    gpu_free_bytes: int | None = None
    gpu_total_bytes: int | None = None
    clock_ahead_s: float = 0.0  # of the first rank's


@dataclass(frozen=True)
class Needs:
    """What the configuration asks of the machines."""

    cores: int | None = None  # a rank
    interface: str | None = None
    checkpoint_bytes: int | None = None
    first_host_bytes: int = 0  # of the first node's memory
    host_bytes: int = 0  # of every other node's memory


@dataclass(frozen=True)
class Link:
    """An all-reduce as it was measured."""

    ranks: int
    payload_bytes: int
    seconds: float
    latency_s: float  # of one that carries nothing

    @property
    def algorithm_bytes_s(self) -> float:
        return self.payload_bytes / self.seconds

    @property
    def bus_bytes_s(self) -> float:
        """What each rank sends a second; comparable between numbers of ranks."""
        return self.algorithm_bytes_s * 2 * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Links:
    """None where there is none, or no time was left."""

    inside: dict[str, Link] = field(default_factory=dict)  # by node
    across: Link | None = None  # one rank a node
    everywhere: Link | None = None  # all ranks

    @property
    def slowest_inside(self) -> tuple[str, Link] | None:
        return min(self.inside.items(), key=lambda item: item[1].bus_bytes_s, default=None)


@dataclass(frozen=True)
class Finding:
    level: Level
    nodes: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class PreflightReport:
    facts: tuple[RankFacts, ...]
    links: Links
    findings: tuple[Finding, ...]
    advice: str
    seconds: float

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.level == "error")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return "\n".join(_report_lines(self))


def judge(facts: Sequence[RankFacts], links: Links, needs: Needs) -> list[Finding]:
    """Everything that is wrong or doubtful, errors first."""
    found = [finding for rule in RULES for finding in rule(facts, needs)]
    found += [*_slow_network(facts, links), *_lagging_nodes(links)]
    return sorted(found, key=lambda finding: finding.level)


# --- rules ----------------------------------------------------------------------------------------


def by_node(facts: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    return _grouped(facts, lambda fact: fact.node)


def _grouped(facts: Sequence[RankFacts], key: Callable[[RankFacts], T]) -> dict[T, list[RankFacts]]:
    groups: dict[T, list[RankFacts]] = defaultdict(list)
    for fact in facts:
        groups[key(fact)].append(fact)
    return dict(groups)


def _nodes(facts: Sequence[RankFacts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fact.node for fact in facts))


def _values_by_nodes(groups: Mapping[Any, Sequence[RankFacts]]) -> str:
    """`2.13 on n1, 2.12 on n2 and n3`."""
    return ", ".join(f"{value or 'none'} on {names(_nodes(f))}" for value, f in groups.items())


def names(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    if len(words) > 8:
        return f"{', '.join(words[:7])} and {len(words) - 7} more"
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _software(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    for name, level in SOFTWARE.items():
        groups = _grouped(facts, lambda fact, name=name: fact.versions.get(name))  # type: ignore[misc]
        if len(groups) < 2:
            continue
        cure = "start all ranks from the same environment or container"
        if name == "driver":
            cure = "NCCL may be slow or fail between them: exclude one kind (slurm.exclude)"
        yield Finding(
            level, _nodes(facts), f"{name} is not the same: {_values_by_nodes(groups)}; {cure}"
        )


def _devices(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    kinds = _grouped(facts, lambda fact: fact.device)
    if len(kinds) < 2:
        return
    without = kinds.get("CPU")
    if without:
        ranks = names([fact.rank for fact in without])
        yield Finding(
            "error",
            _nodes(without),
            f"{names(_nodes(without))}: rank {ranks} sees no GPU, while others have one; exclude "
            "the node (slurm.exclude), and look at nvidia-smi and CUDA_VISIBLE_DEVICES there",
        )
    else:
        yield Finding(
            "warning",
            _nodes(facts),
            f"GPUs are not the same: {_values_by_nodes(kinds)}; the slowest sets the pace: ask for "
            "one type (slurm.gpu_type or slurm.constraint)",
        )


def _shared_gpus(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    with_gpu = [fact for fact in facts if fact.gpu]
    for (node, _), users in _grouped(with_gpu, lambda fact: (fact.node, fact.gpu)).items():
        if len(users) > 1:
            yield Finding(
                "error",
                (node,),
                f"{node}: ranks {names([fact.rank for fact in users])} are on the same GPU; start "
                "one process a GPU, and let all of them see all GPUs of the node",
            )
        else:
            yield from _used_gpu(users[0])


def _used_gpu(fact: RankFacts) -> Iterator[Finding]:
    total, free = fact.gpu_total_bytes, fact.gpu_free_bytes
    if total is None or free is None or total - free <= USED_GPU_BYTES:
        return
    yield Finding(
        "error" if free < total / 2 else "warning",
        (fact.node,),
        f"{fact.node}: {size(total - free)} of the {size(total)} of rank {fact.rank}'s GPU are "
        "used by another process; find it with nvidia-smi, or exclude the node (slurm.exclude)",
    )


def _shared_memory(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    """Only NCCL needs it, between the GPUs of a node."""
    for node, ranks in by_node([fact for fact in facts if fact.gpu]).items():
        free, needed = ranks[0].shm.free_bytes, SHM_BYTES_A_RANK * len(ranks)
        if free is not None and len(ranks) > 1 and free < needed:
            yield Finding(
                "error",
                (node,),
                f"{node}: /dev/shm has {size(free)} free, NCCL needs about {size(needed)} for "
                f"{len(ranks)} ranks; remove what other jobs left there, or give the container "
                "more (--shm-size)",
            )


def _temporary_files(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    for node, ranks in by_node(facts).items():
        broken = next((fact.tmp for fact in ranks if fact.tmp.problem), None)
        if broken:
            yield Finding(
                "error",
                (node,),
                f"{node}: TMPDIR {broken.path} cannot be used ({broken.problem}); make room, or "
                "set TMPDIR to a folder that exists on every node",
            )
        elif _is_full(ranks[0].tmp):
            yield Finding(
                "warning",
                (node,),
                f"{node}: TMPDIR {ranks[0].tmp.path} is nearly full ({_left(ranks[0].tmp)}); make "
                "room, or set TMPDIR to a larger disk",
            )


def _is_full(folder: Folder) -> bool:
    few_bytes = folder.free_bytes is not None and folder.free_bytes < FULL_DISK_BYTES
    return few_bytes or (folder.free_files is not None and folder.free_files < FULL_DISK_FILES)


def _left(folder: Folder) -> str:
    files = "" if folder.free_files is None else f", {folder.free_files:,} files"
    return f"{size(folder.free_bytes or 0)}{files} left"


def _output_folder(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    key = "train_parameters.output_dir"
    for node, ranks in by_node(facts).items():
        broken = next((fact.output for fact in ranks if fact.output.problem), None)
        apart = next((fact.output for fact in ranks if fact.output.shared is False), None)
        if apart:
            first = facts[0]
            yield Finding(
                "error",
                (node,),
                f"{node}: {key} {apart.path} is not the folder that {first.node} has (a file "
                f"written there as {first.output.path} is not seen here); give a folder on a "
                "file system that all nodes share",
            )
        elif broken:
            yield Finding(
                "error",
                (node,),
                f"{node}: {key} {broken.path} cannot be written ({broken.problem}); make room, or "
                "give another folder",
            )
    yield from _output_room(facts[0], needs)


def _output_room(first: RankFacts, needs: Needs) -> Iterator[Finding]:
    """Of the first rank's view: the folder is one, so its room is said once."""
    output, key = first.output, "train_parameters.output_dir"
    if output.problem or output.free_bytes is None:
        return
    if _is_full(output):
        yield Finding(
            "error",
            (first.node,),
            f"{first.node}: {key} {output.path}: the disk is full ({_left(output)}); make room, or "
            "give another folder",
        )
    elif needs.checkpoint_bytes and output.free_bytes < needs.checkpoint_bytes:
        yield Finding(
            "warning",
            (first.node,),
            f"{first.node}: {key} {output.path} has {size(output.free_bytes)} free, a checkpoint "
            f"needs about {size(needs.checkpoint_bytes)}; make room before the first save",
        )


def _cores(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    short: dict[int, list[RankFacts]] = defaultdict(list)
    for ranks in by_node(facts).values():
        cores = len({core for fact in ranks for core in fact.cores}) // len(ranks)
        wanted = needs.cores or (2 if ranks[0].gpu else 1)
        if cores < wanted:
            short[cores].append(ranks[0])
    for cores, firsts in short.items():
        asked = f"{needs.cores} were asked for" if needs.cores else "the CPU will hold the GPU up"
        yield Finding(
            "warning",
            _nodes(firsts),
            f"{names(_nodes(firsts))}: {_count(cores, 'core')} for each rank, {asked}; restate "
            "--cpus-per-task on the srun line, which does not take it from sbatch",
        )


def _host_memory(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    for node, ranks in by_node(facts).items():
        free = min(fact.host_free_bytes for fact in ranks)
        needed = needs.first_host_bytes if node == facts[0].node else needs.host_bytes
        if free < needed:
            yield Finding(
                "warning",
                (node,),
                f"{node}: {size(free)} of host memory are free, loading the model needs about "
                f"{size(needed)}; ask for more (slurm.mem)",
            )


def _clocks(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    for node, ranks in by_node(facts).items():
        ahead = max((fact.clock_ahead_s for fact in ranks), key=abs)
        if abs(ahead) > CLOCK_SKEW_S:
            yield Finding(
                "warning",
                (node,),
                f"{node}: its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
                f"that of {facts[0].node}, so times in logs and of files mislead; tell the "
                "administrators",
            )


def _interfaces(facts: Sequence[RankFacts], needs: Needs) -> Iterator[Finding]:
    for node, ranks in by_node(facts).items():
        here = ranks[0].network
        if here.absent:
            yield Finding(
                "error",
                (node,),
                f"{node}: there is no network interface {here.absent} (it has "
                f"{names(list(here.interfaces)) or 'none'}); set slurm.network_interface, "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one that every node has",
            )
    if needs.interface and needs.interface[0] not in "^=":
        wanted = needs.interface.split(",")
        others = [
            fact
            for fact in facts
            if fact.network.interface and not fact.network.interface.startswith(tuple(wanted))
        ]
        if others:
            used = names(sorted({str(fact.network.interface) for fact in others}))
            yield Finding(
                "warning",
                _nodes(others),
                f"{names(_nodes(others))}: traffic goes over {used}, but slurm.network_interface "
                f"asks for {needs.interface}; submit with `vectorlm submit`, whose script sets it",
            )


def _slow_network(facts: Sequence[RankFacts], links: Links) -> Iterator[Finding]:
    """A slow link, and a faster interface that is idle."""
    nodes = by_node(facts)
    if len(nodes) < 2:
        return
    for node, ranks in nodes.items():
        better = _faster_interface(ranks[0])
        if better:
            rates = ranks[0].network.interfaces
            used = ranks[0].network.interface or ""
            yield Finding(
                "warning",
                (node,),
                f"{node}: traffic between nodes goes over {used} ({_line_rate(rates.get(used))}) "
                f"although {better} ({_line_rate(rates[better])}) is up; try "
                f"slurm.network_interface: {better}",
            )
    link = links.across or links.everywhere
    if link and link.bus_bytes_s < SLOW_LINK_BYTES_S:
        ways = names(sorted({str(fact.network.interface or "an unknown") for fact in facts}))
        yield Finding(
            "warning",
            tuple(nodes),
            f"{names(list(nodes))}: the link between them carries {speed(link.bus_bytes_s)}, less "
            f"than 1 Gb/s (interface {ways}); look for a faster interface with `ip addr`",
        )


def _faster_interface(fact: RankFacts) -> str | None:
    here = fact.network
    if fact.gpu and here.infiniband:
        return None  # NCCL goes past the interface
    used = here.interfaces.get(here.interface or "")
    rest = {name: mbits for name, mbits in here.interfaces.items() if mbits}
    best = max(rest, key=lambda name: rest[name], default=None)
    return best if used and best and rest[best] >= FASTER * used else None


def _lagging_nodes(links: Links) -> Iterator[Finding]:
    usual = median([link.bus_bytes_s for link in links.inside.values()] or [0.0])
    for node, link in links.inside.items():
        if len(links.inside) > 2 and link.bus_bytes_s < LAGGING * usual:
            yield Finding(
                "warning",
                (node,),
                f"{node}: its GPUs reach {speed(link.bus_bytes_s)} among themselves, those of the "
                f"other nodes {speed(usual)}; all wait for it: exclude it (slurm.exclude)",
            )


RULES: tuple[Callable[[Sequence[RankFacts], Needs], Iterator[Finding]], ...] = (
    _software,
    _devices,
    _shared_gpus,
    _shared_memory,
    _temporary_files,
    _output_folder,
    _cores,
    _host_memory,
    _clocks,
    _interfaces,
)


# --- the report -----------------------------------------------------------------------------------


def size(n_bytes: float) -> str:
    if n_bytes < GIB:
        return f"{n_bytes / MIB:.0f} MiB"
    return f"{n_bytes / GIB:.{1 if n_bytes < 100 * GIB else 0}f} GiB"


def speed(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.3g} GB/s"


def _line_rate(mbits: int | None) -> str:
    return "speed unknown" if not mbits else f"{mbits / 1000:g} Gb/s"


def _report_lines(report: PreflightReport) -> Iterator[str]:
    nodes = by_node(report.facts)
    versions = report.facts[0].versions
    software = ", ".join(f"{name} {versions[name]}" for name in SOFTWARE if versions.get(name))
    counts = f"{_count(len(nodes), 'node')}, {_count(len(report.facts), 'rank')}"
    yield f"preflight of {counts}: {software}"
    for node, ranks in nodes.items():
        yield f"  {node}: {_node_line(ranks)}"
    yield from _link_lines(report.links, len(nodes))
    for finding in report.findings:
        if finding.level == "warning":  # errors are raised, and said there
            yield f"  warning: {finding.text}"
    if report.advice not in (finding.text for finding in report.findings):
        yield f"  advice: {report.advice}"
    yield f"  took {report.seconds:.1f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _node_line(ranks: Sequence[RankFacts]) -> str:
    first = ranks[0]
    cores = len({core for fact in ranks for core in fact.cores})
    parts = [f"rank {names([fact.rank for fact in ranks])} on {first.device}"]
    if first.gpu_free_bytes is not None and first.gpu_total_bytes is not None:
        least = min(fact.gpu_free_bytes or 0 for fact in ranks)
        parts.append(f"{size(least)} of {size(first.gpu_total_bytes)} free")
    parts += [f"{cores} cores", f"{size(first.host_free_bytes)} host memory free"]
    places = {"/dev/shm": first.shm, "TMPDIR": first.tmp, "output_dir": first.output}
    for name, folder in places.items():
        free = "?" if folder.free_bytes is None else size(folder.free_bytes)
        parts.append(f"{name} {free}")
    network = first.network
    way = f"{network.interface or 'interface unknown'} {network.address or ''}".strip()
    return ", ".join([*parts, way + (" and InfiniBand" if network.infiniband else "")])


def _link_lines(links: Links, nodes: int) -> Iterator[str]:
    slowest = links.slowest_inside
    if slowest:
        where = f"inside each node (slowest: {slowest[0]})" if nodes > 1 else "inside the node"
        yield f"  {where}: {_link_words(slowest[1])}"
    if links.across:
        yield f"  across nodes, one rank each: {_link_words(links.across)}"
    if links.everywhere and nodes > 1:
        yield f"  all ranks: {_link_words(links.everywhere)}"


def _link_words(link: Link) -> str:
    return (
        f"all-reduce of {size(link.payload_bytes)} by {link.ranks} ranks {link.seconds:.3g} s "
        f"({speed(link.algorithm_bytes_s)}, bus {speed(link.bus_bytes_s)}), "
        f"latency {link.latency_s * 1e3:.2g} ms"
    )
