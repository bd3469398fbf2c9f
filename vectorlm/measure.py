"""The preflight of a job: every rank says what it has, links are measured, and the first rank
prints what follows. Floor 3, called by `assemble` and `preflight_door` on every rank alike.

What the facts mean is judged in `preflight`, what suits the links in `plan.links`.
"""

from __future__ import annotations

import itertools
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vectorlm
from vectorlm import machine
from vectorlm.cluster.journal import write_json
from vectorlm.cluster.rollcall import Presence, roll_call
from vectorlm.config.schema import Config
from vectorlm.distributed import Ranks, rank_left
from vectorlm.errors import ClusterError, ModelError
from vectorlm.plan import links
from vectorlm.plan.flops import peak_flops
from vectorlm.plan.parameters import Parameters, count_parameters
from vectorlm.preflight import (
    Finding,
    Folder,
    Link,
    Links,
    Needs,
    PreflightReport,
    RankFacts,
    by_node,
    judge,
    names,
)

REPORT = "preflight.json"
ANSWER_S = 20.0  # for every rank to be there
BUDGET_S = 20.0  # after this no further link is measured
HANG_S = 60.0  # an all-reduce that takes longer will never end
ENOUGH_S = 0.3  # a longer all-reduce says no more
FIRST_BYTES = 1 << 20
GROWTH = 4
MOST_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
GPU_SHARE = 8  # of the free memory, one part for the payload
MOST_ROUNDS = 20
HOST_BYTES_A_RANK = 2 << 30  # libraries, and pieces of weights on their way to the GPU
_calls = itertools.count()  # the same on every rank


def preflight(config: Config, ranks: Ranks, node: str | None = None) -> PreflightReport:
    """Examine, print on the first rank, write `preflight.json`; ClusterError on every rank when
    something would end the run.
    """
    report = examine(config, ranks, node or machine.node_name())
    if ranks.first:
        print(report.text(), flush=True)
        with suppress(OSError):  # a full disk is among the findings
            write_json(Path(config.train_parameters.output_dir) / REPORT, report.to_dict())
    ranks.barrier()  # no rank leaves before it is said
    if report.errors:
        raise ClusterError("\n".join(f"preflight: {error.text}" for error in report.errors))
    return report


def examine(config: Config, ranks: Ranks, node: str) -> PreflightReport:
    began = time.monotonic()
    facts = _gather_facts(config, ranks, node)
    sizes = ranks.from_first(_parameters(config) if ranks.first else None)
    needs = _needs(config, facts, sizes)
    sound = not any(finding.level == "error" for finding in judge(facts, Links(), needs))
    measured = _measure_links(ranks, facts, began) if sound else Links()
    advice = _advise(config, facts, measured, sizes)
    findings = judge(facts, measured, needs)
    if advice.warns:
        findings.append(Finding("warning", tuple(by_node(facts)), advice.text))
    return PreflightReport(
        tuple(facts), measured, tuple(findings), advice.text, time.monotonic() - began
    )


# --- facts ----------------------------------------------------------------------------------------


def _gather_facts(config: Config, ranks: Ranks, node: str) -> list[RankFacts]:
    """Of every rank, in order. The first rank of each node looks at the folders there."""
    store: Any = dist.distributed_c10d._get_default_store()
    me = Presence(ranks.rank, node)
    present = roll_call(store, f"preflight/{next(_calls)}", me, ranks.world, ANSWER_S)
    clock = time.time()  # all have just been there
    looks = ranks.rank == next(one.rank for one in present if one.node == node)
    path = os.path.abspath(config.train_parameters.output_dir)
    mark, problem = ranks.from_first(_leave_mark(Path(path)) if ranks.first else (None, None))
    own = _own_facts(ranks, node)
    if looks:
        output = Folder(path, problem=problem if ranks.first else None)
        if mark:
            output = _look_for(Path(path) / mark) if not ranks.first else machine.look_at(path)
        own = replace(
            own,
            shm=machine.look_at("/dev/shm", writes=False),
            tmp=machine.look_at(own.tmp.path),
            output=output,
        )
    gathered = ranks.gather((own, clock))
    if ranks.first and mark:
        with suppress(OSError):
            (Path(path) / mark).unlink()
    return [
        replace(fact, clock_ahead_s=round(clock - gathered[0][1], 3)) for fact, clock in gathered
    ]


def _leave_mark(folder: Path) -> tuple[str | None, str | None]:
    """A file that tells this folder from any other, or why none can be written."""
    mark = f".preflight-mark-{secrets.token_hex(8)}"

    def leave() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        machine.write_private(folder / mark, b"")
        return mark

    try:
        return machine.within(machine.FOLDER_S, leave), None
    except (OSError, TimeoutError) as error:
        return None, machine.reason(error)


def _look_for(mark: Path) -> Folder:
    """The folder, and whether it is the one in which the first rank left its mark."""
    try:
        patience_s = machine.FOLDER_S
        seen = machine.within(2 * patience_s, lambda: machine.appears(mark, patience_s))
    except TimeoutError:
        seen = None  # it does not answer, and `look_at` says so
    return replace(machine.look_at(str(mark.parent)), shared=seen)


def _own_facts(ranks: Ranks, node: str) -> RankFacts:
    facts = RankFacts(
        rank=ranks.rank,
        node=node,
        device="CPU",
        versions=_versions(ranks.device),
        cores=machine.usable_cores(),
        host_free_bytes=machine.free_host_bytes(),
        network=machine.network(ranks.device.type == "cuda"),
        shm=Folder("/dev/shm"),
        tmp=Folder(tempfile.gettempdir()),
        output=Folder(""),
    )
    if ranks.device.type == "cpu":
        return facts
    free, total = torch.cuda.mem_get_info(ranks.device)
    return replace(
        facts,
        device=torch.cuda.get_device_name(ranks.device),
        gpu=str(torch.cuda.get_device_properties(ranks.device).uuid),
        gpu_free_bytes=free,
        gpu_total_bytes=total,
    )


def _versions(device: torch.device) -> dict[str, str | None]:
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": metadata.version("transformers"),
        "vectorlm": vectorlm.__version__,
    }
    if device.type == "cpu":
        return {**versions}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {**versions, "CUDA": torch.version.cuda, "NCCL": nccl, "driver": machine.gpu_driver()}


# --- links ----------------------------------------------------------------------------------------


def _measure_links(ranks: Ranks, facts: Sequence[RankFacts], began: float) -> Links:
    nodes = {node: [fact.rank for fact in group] for node, group in by_node(facts).items()}
    most = _most_bytes(ranks.device, facts)

    def measured(groups: list[list[int]], what: str) -> list[Any]:
        """What each rank measured in its group; nothing once the time is used up."""
        if max(ranks.gather(time.monotonic() - began)) > BUDGET_S:
            return [None] * ranks.world
        results = ranks.gather(_measure(ranks, groups, most, what))
        problems = dict.fromkeys(found for found in results if isinstance(found, str))
        if problems:
            raise ClusterError("\n".join(problems))
        return results

    everyone = list(range(ranks.world))
    inside = measured(list(nodes.values()), f"inside {facts[ranks.rank].node}")
    found = {name: link for name, members in nodes.items() if (link := inside[members[0]])}
    if len(nodes) == 1:
        return Links(found)
    firsts = [members[0] for members in nodes.values()]
    between = f"between {names(list(nodes))}"
    everywhere = measured([everyone], between)[0]
    across = everywhere if firsts == everyone else measured([firsts], between)[0]
    return Links(found, across, everywhere)


def _most_bytes(device: torch.device, facts: Sequence[RankFacts]) -> int:
    free = [fact.gpu_free_bytes // GPU_SHARE for fact in facts if fact.gpu_free_bytes is not None]
    return min([MOST_BYTES[device.type], *free])


def _measure(ranks: Ranks, groups: list[list[int]], most: int, what: str) -> Link | str | None:
    """What this rank measured, or why it could not."""
    try:
        return machine.within(HANG_S, lambda: _in_own_group(ranks, groups, most))
    except TimeoutError:
        return f"preflight: the all-reduce {what} does not end; {_WAYS}"
    except RuntimeError as error:
        if rank_left(error):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"preflight: the all-reduce {what} failed ({first_line}); {_WAYS}"


_WAYS = (
    "look at the network interface (slurm.network_interface) and for a firewall; where InfiniBand "
    "does not work set slurm.disable_infiniband; NCCL_DEBUG=INFO in the environment says more"
)


def _in_own_group(ranks: Ranks, groups: list[list[int]], most: int) -> Link | None:
    """None where this rank is in none of the groups, or alone. All ranks make all groups."""
    if groups == [list(range(ranks.world))]:
        return _all_reduces(_Timer(ranks.device, None), ranks.world, most)
    own, link = None, None
    for members in groups:
        group = dist.new_group(members, timeout=timedelta(seconds=HANG_S))
        if ranks.rank in members:
            own = (group, len(members))
    if own:
        group, count = own
        link = _all_reduces(_Timer(ranks.device, group), count, most) if count > 1 else None
        dist.destroy_process_group(group)
    return link


def _all_reduces(timer: _Timer, members: int, most: int) -> Link:
    """The payload grows until an all-reduce takes long enough to be timed."""
    timer.seconds(1, rounds=1)  # the first one connects
    latency = timer.seconds(1, MOST_ROUNDS)
    payload = FIRST_BYTES
    seconds = timer.seconds(payload // 4, rounds=1)
    while seconds < ENOUGH_S and payload * GROWTH <= most:
        payload *= GROWTH
        seconds = timer.seconds(payload // 4, rounds=1)
    rounds = max(1, min(MOST_ROUNDS, int(ENOUGH_S / seconds)))
    return Link(members, payload, timer.seconds(payload // 4, rounds), latency)


class _Timer:
    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device = device
        self._group = group

    def seconds(self, numbers: int, rounds: int) -> float:
        """What one all-reduce takes on the slowest of the group: the same on all of them."""
        payload = torch.zeros(numbers, device=self._device)
        self._synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            dist.all_reduce(payload, group=self._group)
        self._synchronize()
        taken = torch.tensor((time.perf_counter() - began) / rounds, device=self._device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self._group)
        return taken.item()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# --- what the configuration asks for --------------------------------------------------------------


def _parameters(config: Config) -> Parameters | None:
    folder = Path(config.model)
    if not folder.is_dir():
        from vectorlm.model.load import model_folder  # slow, and rarely needed

        try:
            folder = model_folder(config.model)
        except ModelError:
            return None
    return count_parameters(folder, config.train_parameters.lora_peft_config)


def _needs(config: Config, facts: Sequence[RankFacts], sizes: Parameters | None) -> Needs:
    train, slurm = config.train_parameters, config.slurm
    needs = Needs(_cores_asked(config), slurm.network_interface if slurm else None)
    if sizes is None:
        return needs
    ranks_here = max(map(len, by_node(facts).values()))
    host = HOST_BYTES_A_RANK * ranks_here
    if facts[0].gpu is None:  # the model stays in the host's memory
        group = {"NO_SHARD": 1, "HYBRID_SHARD": train.shard_group_size or ranks_here}
        host = ranks_here * links.held_bytes(
            sizes, train, group.get(train.sharding_strategy, len(facts))
        )
    whole = 0 if train.low_cpu_mem_usage else sizes.every * 4
    return replace(
        needs,
        checkpoint_bytes=links.checkpoint_bytes(sizes, train)
        if train.checkpointing_enabled
        else None,
        host_bytes=host,
        first_host_bytes=host + whole,
    )


def _cores_asked(config: Config) -> int | None:
    """A rank; only Slurm counts them out."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    if config.slurm:
        return config.slurm.cpus_per_gpu
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(asked) if asked.isdecimal() else None


def _advise(
    config: Config, facts: Sequence[RankFacts], measured: Links, sizes: Parameters | None
) -> links.Advice:
    nodes = by_node(facts)
    slowest = measured.slowest_inside
    if len(nodes) == 1:
        return links.Advice("on one node FULL_SHARD and HYBRID_SHARD are the same")
    if len({len(ranks) for ranks in nodes.values()}) > 1:
        return links.Advice("FULL_SHARD, for the nodes have different numbers of ranks")
    if sizes is None:
        return links.Advice(f"none, for the weights of {config.model} cannot be counted")
    if measured.everywhere is None or measured.across is None:
        return links.Advice("none, for the links were not measured")
    rates = links.Rates(
        inside=slowest[1].bus_bytes_s if slowest else None,
        between=max(measured.across.bus_bytes_s, measured.everywhere.bus_bytes_s),
        everywhere=measured.everywhere.bus_bytes_s,
    )
    return links.advise(sizes, config.train_parameters, _shape(config, facts), rates)


def _shape(config: Config, facts: Sequence[RankFacts]) -> links.Shape:
    train, dataset = config.train_parameters, config.dataset
    micro_batches = train.gradient_accumulation_steps
    memories = [fact.gpu_total_bytes for fact in facts if fact.gpu_total_bytes]
    return links.Shape(
        ranks=len(facts),
        ranks_per_node=len(by_node(facts)[facts[0].node]),
        micro_batches=micro_batches,
        tokens=dataset.train_bs * train.max_seq_len * micro_batches if dataset else None,
        peak_flops=peak_flops(facts[0].device),
        gpu_bytes=min(memories, default=None),
    )
