"""Rules of the `slurm` and `sweep` sections. Floor 0; `checks` runs them with the others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from vectorlm.config.job_text import duration_s
from vectorlm.config.keys import KeyPath, dotted, find
from vectorlm.config.problem import Problem
from vectorlm.config.schema import Config, Slurm, Sweep
from vectorlm.config.suggest import unknown
from vectorlm.config.sweep import MOST_RUNS, total_runs

# Flags of sbatch that say what a key says.
KEY_OF_FLAG = {
    "account": "slurm.account",
    "array": "sweep",
    "constraint": "slurm.constraint",
    "container": "slurm.container_image",
    "container-image": "slurm.container_image",
    "container-mounts": "slurm.container_mounts",
    "cpus-per-gpu": "slurm.cpus_per_gpu",
    "cpus-per-task": "slurm.cpus_per_gpu",
    "exclude": "slurm.exclude",
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-socket": "slurm.gpus_per_node",
    "gpus-per-task": "slurm.gpus_per_node",
    "gres": "slurm.gpus_per_node or slurm.extra_gres",
    "job-name": "slurm.job_name",
    "mail-type": "slurm.mail_type",
    "mail-user": "slurm.mail_user",
    "mem": "slurm.mem",
    "mem-per-cpu": "slurm.mem",
    "mem-per-gpu": "slurm.mem",
    "no-requeue": "slurm.requeue",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.gpus_per_node or slurm.processes_per_node",
    "ntasks-per-gpu": "slurm.gpus_per_node or slurm.processes_per_node",
    "ntasks-per-node": "slurm.gpus_per_node or slurm.processes_per_node",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "requeue": "slurm.requeue",
    "reservation": "slurm.reservation",
    "signal": "slurm.signal_lead_s",
    "ntasks-per-tres": "slurm.gpus_per_node or slurm.processes_per_node",
    "tasks-per-node": "slurm.gpus_per_node or slurm.processes_per_node",
    "time": "slurm.time",
}
SET_BY_SCRIPT = {"error", "open-mode", "output"}
FOR_THE_CALL = {"dependency", "help", "parsable", "test-only", "usage", "version", "wait", "wrap"}
REFUSED_FLAGS = sorted(KEY_OF_FLAG.keys() | SET_BY_SCRIPT | FOR_THE_CALL)
SECRET_VARIABLE = re.compile(
    r"\b(?:\w*_)?(?:token|secret|password|passwd|api_?key)=[\"']?[^\"'\s$`]", re.I
)
KEY_NAME = re.compile(r"[^\s=.]+(\.[^\s=.]+)*")


def _gpus(config: Config, slurm: Slurm) -> Iterator[Problem]:
    gpus, processes = slurm.gpus_per_node, slurm.processes_per_node
    if slurm.gpu_type and not gpus:
        yield Problem(
            ("slurm.gpu_type", "slurm.gpus_per_node"),
            "gpu_type has no meaning where gpus_per_node is 0; remove one of the two",
        )
    if processes and gpus and processes != gpus:
        yield Problem(
            ("slurm.processes_per_node", "slurm.gpus_per_node"),
            f"processes_per_node {processes} contradicts gpus_per_node {gpus}, because one process "
            "is started for each GPU; remove it, or set gpus_per_node to 0 where there are none",
        )


def _gres(config: Config, slurm: Slurm) -> Iterator[Problem]:
    if any(item.split(":")[0] == "gpu" for item in slurm.extra_gres):
        yield Problem(
            ("slurm.extra_gres",),
            "gpu is asked for by slurm.gpus_per_node and slurm.gpu_type; remove it here",
        )


def _shard_group(config: Config, slurm: Slurm) -> Iterator[Problem]:
    train = config.train_parameters
    group, world = train.shard_group_size, slurm.nodes * slurm.ranks_per_node
    if train.sharding_strategy == "HYBRID_SHARD" and group and world % group:
        yield Problem(
            ("train_parameters.shard_group_size", "slurm.nodes", "slurm.gpus_per_node"),
            f"shard_group_size {group} must divide the {world} ranks that slurm asks for "
            f"({slurm.nodes} x {slurm.ranks_per_node})",
        )


def _containers(config: Config, slurm: Slurm) -> Iterator[Problem]:
    if slurm.container_mounts and not slurm.container_image:
        yield Problem(
            ("slurm.container_mounts", "slurm.container_image"),
            "has no effect without container_image; give that too, or remove this",
        )


def _time(config: Config, slurm: Slurm) -> Iterator[Problem]:
    for section, time in (("slurm", slurm.time), ("slurm.preprocess", slurm.preprocess.time)):
        if duration_s(time) == 0:
            yield Problem(
                (f"{section}.time",),
                f"time {time} is no limit to Slurm; give one, so that the job can end before it",
            )
    if 0 < slurm.time_s <= slurm.signal_lead_s:
        yield Problem(
            ("slurm.signal_lead_s", "slurm.time"),
            f"signal_lead_s {slurm.signal_lead_s} must be below the time limit, {slurm.time_s} s",
        )


def _memory(config: Config, slurm: Slurm) -> Iterator[Problem]:
    for section, mem in (("slurm", slurm.mem), ("slurm.preprocess", slurm.preprocess.mem)):
        if mem.isdecimal() and 0 < int(mem) < 1000:
            yield Problem(
                (f"{section}.mem",), f"mem {mem} is {mem} MB to Slurm; write {mem}G if GB are meant"
            )


def _flags(config: Config, slurm: Slurm) -> Iterator[Problem]:
    for flag in slurm.extra_flags:
        name = flag.removeprefix("--").partition("=")[0]
        full = _full_name(name)
        shown = f"--{name}" if full == name else f"--{name}, short for --{full},"
        if full in SET_BY_SCRIPT:
            yield Problem(("slurm.extra_flags",), f"{shown} is set by the job script; remove it")
        elif full in FOR_THE_CALL:
            yield Problem(
                ("slurm.extra_flags",), f"{shown} is for a call of sbatch, not a script; remove it"
            )
        elif full is not None:
            yield Problem(
                ("slurm.extra_flags",),
                f"{shown} has a key of its own; give it as {KEY_OF_FLAG[full]}",
            )


def _full_name(name: str) -> str | None:
    """The refused flag that `--name` is, or is the beginning of: sbatch lets one shorten them."""
    longer = [flag for flag in REFUSED_FLAGS if flag.startswith(name)]
    return name if name in longer else next(iter(longer), None)


def _secrets(config: Config, slurm: Slurm) -> Iterator[Problem]:
    for number, line in enumerate(slurm.setup, 1):
        if SECRET_VARIABLE.search(line):
            yield Problem(
                ("slurm.setup",),
                f"item {number} holds a secret, and configurations are shared and logged; read it "
                "from a file instead, as in TOKEN=$(cat ~/.token)",
            )


SLURM_RULES: tuple[Callable[[Config, Slurm], Iterator[Problem]], ...] = (
    _gpus,
    _gres,
    _shard_group,
    _containers,
    _time,
    _memory,
    _flags,
    _secrets,
)


def slurm_rules(config: Config) -> Iterator[Problem]:
    if config.slurm is not None:
        for rule in SLURM_RULES:
            yield from rule(config, config.slurm)


# --- sweep ----------------------------------------------------------------------------------------


def sweep_rules(config: Config) -> Iterator[Problem]:
    sweep = config.sweep
    if sweep is None:
        return
    if not sweep.grid and not sweep.runs:
        yield Problem(("sweep",), "has neither grid nor runs; give one of them, or remove sweep")
    yield from _sweep_keys(sweep)
    total = total_runs(sweep)
    if total > MOST_RUNS:
        yield Problem(("sweep",), f"makes {total} runs; must be at most {MOST_RUNS}")
    data, varied = config.dataset, {*sweep.grid, *itertools.chain(*sweep.runs)}
    evaluates = data is None or data.eval_ds or "dataset.eval_ds" in varied
    if sweep.metric == "eval_loss" and not evaluates:
        yield Problem(
            ("sweep.metric", "sweep", "dataset.eval_ds"),
            "eval_loss is logged only where there is evaluation data; give dataset.eval_ds, or "
            "take another metric, such as loss",
        )


def _sweep_keys(sweep: Sweep) -> Iterator[Problem]:
    for name, values in sweep.grid.items():
        fault = _key_fault(name) or _clash(name, sweep.grid)
        if fault or not values:
            yield Problem((f"sweep.grid.{name}",), fault or "is empty; give at least one value")
    for number, run in enumerate(sweep.runs, 1):
        for name in run:
            fault = _key_fault(name) or _clash(name, run) or _clash(name, sweep.grid)
            if name in sweep.grid:
                fault = "stands in grid, too; keep one"
            if fault:
                yield Problem(("sweep.runs",), f"run {number}: {name}: {fault}")


def _key_fault(name: str) -> str | None:
    """What keeps a key from being one that runs of a sweep may differ in."""
    path = tuple(name.split("."))
    if not KEY_NAME.fullmatch(name):
        return "must be a key such as train_parameters.optimizer.lr"
    if path[0] in ("slurm", "sweep"):
        return f"stands in {path[0]}, which is the same for all runs; remove it"
    if path[0] == "dataset_preprocess":
        return "changes the data, which no run prepares; prepare it apart and vary dataset.train_ds"
    if path == ("train_parameters", "output_dir"):
        return "each run gets a folder of its own in output_dir; remove it"
    key = find(path)
    if key is None and not _in_free_mapping(path):
        meant = " or ".join(map(dotted, unknown(path).candidates))
        return f"is no key; did you mean {meant}?" if meant else "is no key; see docs/config.md"
    return "is a section; name a key in it" if key and key.kind == "section" else None


def _in_free_mapping(path: KeyPath) -> bool:
    around = [find(path[:end]) for end in range(1, len(path))]
    return any(key is not None and key.kind == "mapping" for key in around)


def _clash(name: str, others: Iterable[str]) -> str | None:
    """A key inside another one that is given as well: which of the two would count?"""
    whole = next((other for other in others if name.startswith(f"{other}.")), None)
    return f"is a part of {whole}, which is given too; keep one" if whole else None
