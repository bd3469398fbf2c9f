"""How far the planner's figures are from each other and from what is measured.

    python benchmarks/planner_grid.py [--write]     the two tables for a machine without a GPU
    python benchmarks/planner_grid.py --gpu         the third, on a machine with NVIDIA GPUs

First the estimate of `vectorlm plan` against its simulation, over real models' shapes. Then the
simulation against real ranks that train small models over gloo: torch's profiler records every
allocation and release of the CPU's allocator, and the sum is followed. On GPUs the allocator's own
peak is asked for. `--write` puts what was found into docs/planner.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import ROOT, wrapped, write
from vectorlm.config.schema import Config, DatasetConfig, TrainParameters
from vectorlm.plan import memory
from vectorlm.plan.gpus import find_gpu
from vectorlm.plan.shapes import read_shape
from vectorlm.plan.simulated import Job, Simulated, job_from_json, job_to_json, simulate_apart
from vectorlm.simulate import full_batch, simulate

COMMAND = "python benchmarks/planner_grid.py"
PAPER = ROOT / "docs" / "planner.md"
GIB, MIB = 2**30, 2**20
LIMIT_S = 600.0

# name: hidden, intermediate, layers, heads, heads of keys, vocabulary
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "Llama 1.1B": (2048, 5632, 22, 32, 4, 32000),
    "Llama 7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama 13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama 70B": (8192, 28672, 80, 64, 8, 32000),
    "128k vocabulary (8B)": (4096, 14336, 32, 32, 8, 128256),
    "grouped heads (7B)": (4096, 14336, 32, 32, 8, 32000),
    "small": (512, 1408, 6, 8, 8, 8192),
    "small, grouped heads": (512, 1408, 6, 8, 2, 8192),
    "small, large vocabulary": (384, 1024, 4, 6, 6, 32768),
}
LORA = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
AMPERE = (8, 0)


@dataclass(frozen=True)
class Point:
    model: str
    ranks: int
    strategy: str = "FULL_SHARD"
    precision: str = "bf16-mixed"
    lora: bool = False
    recompute: bool = False
    rows: int = 1
    length: int = 2048
    accumulation: int = 1
    layers: int = 0  # other than the shape's

    @property
    def ranks_per_node(self) -> int:
        """HYBRID_SHARD on two nodes."""
        return max(self.ranks // 2, 1) if self.strategy == "HYBRID_SHARD" else self.ranks

    def job(self, folder: Path, gpu_capability: tuple[int, int] | None = AMPERE) -> Job:
        train = {
            "output_dir": str(folder / "output"),
            "max_seq_len": self.length,
            "sharding_strategy": self.strategy,
            "shard_group_size": self.ranks_per_node,
            "precision": self.precision,
            "use_activation_checkpointing": self.recompute,
            "gradient_accumulation_steps": self.accumulation,
            "lora_peft_config": LORA if self.lora else None,
        }
        config = Config(
            model=str(write_model(folder, self.model, self.layers)),
            train_parameters=TrainParameters.model_validate(train),
            dataset=DatasetConfig(train_ds="nowhere", train_bs=self.rows),
        )
        return Job(config, self.ranks, self.ranks_per_node, gpu_capability)

    @property
    def cells(self) -> list[str]:
        what = "LoRA" if self.lora else "full"
        tokens = f"{self.rows} x {self.length}"
        if self.accumulation > 1:
            tokens += f", {self.accumulation} times"
        again = "recomputed" if self.recompute else "kept"
        return [
            self.model,
            str(self.ranks),
            self.strategy,
            self.precision,
            what,
            again,
            tokens,
        ]


HEADER = ["model", "ranks", "strategy", "precision", "trained", "activations", "rows x length"]


def write_model(folder: Path, model: str, layers: int) -> Path:
    """A model folder with a config.json and nothing else."""
    hidden, intermediate, own_layers, heads, kv_heads, vocabulary = SHAPES[model]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or own_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": False,
    }
    place = folder / f"{model.replace(' ', '-')}-{layers}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


# --- the estimate against the simulation ----------------------------------------------------------

BIG = list(SHAPES)[:6]
LENGTHS = ((1, 4096), (4, 512), (2, 2048), (1, 8192))
STRATEGIES = ("FULL_SHARD", "HYBRID_SHARD", "NO_SHARD")
PRECISIONS = ("bf16-mixed", "bf16-mixed", "bf16-true", "32-true")
SHALLOW = (4, 6)  # layers that are simulated, to tell what each further one adds


def grid() -> list[Point]:
    """Every model on every number of ranks, whole and LoRA, recomputing and not; the rest in
    turn.
    """
    every = product(BIG, (1, 4, 8), (False, True), (False, True))
    points = []
    for i, (model, ranks, lora, recompute) in enumerate(every):
        # Steps without a common factor with what goes round, so that all pairs meet.
        turn = i + i // 12
        rows, length = LENGTHS[(turn + i // 4) % 4]
        points.append(
            Point(
                model,
                ranks,
                STRATEGIES[turn % 3],
                PRECISIONS[(i // 2 + i // 12) % 4],
                lora,
                recompute,
                rows,
                length,
            )
        )
    return points


WHOLE = (0, 29, 50, 71)  # points of the grid that are simulated in their whole depth as well


def simulated(point: Point, folder: Path) -> Simulated:
    return simulate(point.job(folder))


def whole(point: Point, folder: Path) -> int:
    return simulated(point, folder).peak_bytes


def by_depth(point: Point, folder: Path) -> int:
    """The peak of the whole depth, told from two shallow models: each moment's bytes grow by the
    same for each block.
    """
    full = SHAPES[point.model][2]
    few, more = (_by_place(simulated(replace(point, layers=n), folder), n) for n in SHALLOW)
    steps = (full - SHALLOW[1]) / (SHALLOW[1] - SHALLOW[0])
    return round(max(more[m] + (more[m] - few[m]) * steps for m in few))


def _by_place(result: Simulated, layers: int) -> dict[str, int]:
    """Moments without their block's number: the first two, and the last two from the end."""
    found = {}
    for moment, size in result.moments.items():
        block = re.search(r"block (\d+) of", moment)
        k = int(block[1]) if block else 0
        if k <= 2:
            found[re.sub(r" of \d+$", "", moment)] = size
        elif k >= layers - 1:
            found[f"{moment.split(' block')[0]} block -{layers - k}"] = size
    return found


def estimated(point: Point, folder: Path) -> int:
    job = point.job(folder)
    train = job.config.train_parameters
    shape = read_shape(job.config.model)
    gpu = find_gpu("A100-80GB")
    kernel, _ = memory.choose_kernel(shape, train, gpu, flash_attn=False)
    load = memory.Load(point.rows, point.length, point.accumulation)
    return memory.peak(shape, train, load, job.ranks, job.ranks_per_node, kernel).peak_bytes


def cost() -> str:
    """What a simulation takes, as `vectorlm plan --simulate` runs it."""
    told = []
    for model in ("Llama 7B", "Llama 70B"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory(prefix="vectorlm-planner-") as name:
            found = simulate_apart(Point(model, 8, recompute=True, length=4096).job(Path(name)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        host, peak = after.ru_maxrss * 1024 / GIB, found.peak_bytes / GIB
        told.append(f"{model} {took:.0f} s and {host:.1f} GiB (it finds {peak:.1f} GiB a rank)")
    return (
        f"A simulation of all layers, 8 ranks, blocks recomputed, length 4096, takes of one core's "
        f"time and of memory: {'; '.join(told)}."
    )


# --- the simulation against what is measured ------------------------------------------------------

SMALL = [
    Point("small", 1, precision="32-true", length=512),
    Point("small", 2, precision="bf16-mixed", recompute=True, rows=2, length=512),
    Point("small", 2, "NO_SHARD", "32-true", length=384, rows=2, accumulation=2),
    Point("small", 4, "HYBRID_SHARD", "32-true", length=256, accumulation=3),
    Point("small", 2, "SHARD_GRAD_OP", "bf16-mixed", length=512),
    Point("small", 2, precision="32-true", lora=True, length=512),
    Point("small, grouped heads", 2, precision="32-true", rows=2, length=512),
    Point("small, large vocabulary", 2, precision="32-true", length=512),
    Point("small, large vocabulary", 2, precision="bf16-true", recompute=True, length=512),
]
ON_GPU = [
    Point("Llama 1.1B", 1, precision="32-true", rows=8, length=512),
    Point("Llama 1.1B", 1, precision="bf16-mixed", recompute=True, rows=4, length=2048),
    Point("Llama 7B", 1, precision="bf16-true", recompute=True, length=2048),
    Point("Llama 7B", 1, precision="bf16-mixed", lora=True, length=2048),
    Point("grouped heads (7B)", 1, precision="bf16-mixed", lora=True, recompute=True, length=4096),
    Point("128k vocabulary (8B)", 1, precision="bf16-true", lora=True, recompute=True),
]


def measured(point: Point, folder: Path) -> int:
    """The first rank's peak over two optimizer steps, in processes that really train."""
    (folder / "job.json").write_text(job_to_json(point.job(folder)), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, __file__, "--as-rank", str(folder)]
    ranks = []
    for rank in range(point.ranks):
        where = {"RANK": rank, "WORLD_SIZE": point.ranks, "MASTER_PORT": port}
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": point.ranks_per_node}
        variables = {key: str(value) for key, value in {**where, **local}.items()}
        environment = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **variables}
        ranks.append(subprocess.Popen(command, env={**os.environ, **environment}))
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise SystemExit(f"{point}: ranks ended with {codes}")
    return int((folder / "peak").read_text())


def as_rank(folder: Path) -> None:
    """What each of `measured`'s processes does."""
    from vectorlm.distributed import connect, disconnect

    job = job_from_json((folder / "job.json").read_text(encoding="utf-8"))
    ranks = connect(timeout_minutes=5)
    watch = _watched_on_gpu if ranks.device.type == "cuda" else _watched_on_cpu
    peak = watch(lambda: _train(job, ranks))
    if ranks.first:
        (folder / "peak").write_text(str(peak))
    disconnect()


def _train(job: Job, ranks: Any) -> None:
    """Two steps of the trainer, on random weights."""
    from torch.distributed.tensor import DTensor

    from vectorlm.dataset import Group
    from vectorlm.model import attention
    from vectorlm.model.load import Place, allocate, make_outline, read_config, spread
    from vectorlm.optim import Schedule, build_optimizer, build_scaler
    from vectorlm.steps import Position
    from vectorlm.stop import StopFlag
    from vectorlm.trainer import Trainer

    train = job.config.train_parameters
    folder = Path(job.config.model)
    capability = attention.gpu_capability(ranks.device)
    outline = make_outline(job.config.model, folder, read_config(folder), train, capability)
    here = Place(ranks.rank, ranks.world, job.ranks_per_node, ranks.device)
    model = spread(outline, train, here)
    allocate(model.module, ranks.device)
    for param in model.module.parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        torch.nn.init.normal_(local, std=0.02)
    optimizer = build_optimizer(train.optimizer, model.trainable().values())
    none: Any = None
    trainer = Trainer(
        train=train,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        schedule=Schedule(train, optimizer, 2, 0),
        scaler=build_scaler(train.effective_precision, ranks.device),
        data=none,
        evaluation=none,
        steps=none,
        checkpoints=none,
        metrics=none,
        stop=StopFlag(),
        description={},
    )
    batches = [full_batch(job.config)] * train.gradient_accumulation_steps
    for _ in range(2):
        trainer.step(Group(batches, Position()))


def _watched_on_cpu(work: Callable[[], None]) -> int:
    """By the profiler's record of the allocator, without what gloo copies for itself: NCCL does
    not, and gloo's threads release it unseen.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        work()
    found: Any = watch.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    live: dict[int, int] = {}
    total = peak = 0
    for event in sorted(_allocations(found), key=lambda event: event.start_time_ns):
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        total -= live.pop(pointer, 0)
        if size > 0:
            live[pointer] = size
            total += size
        peak = max(peak, total)
    return peak


def _allocations(events: Any) -> Iterator[Any]:
    for event in events:
        if event.name == "[memory]":
            yield event
        elif event.name.startswith(("c10d::", "gloo:")):
            # Releases count also here.
            yield from (e for e in _allocations(event.children) if e.extra_fields.alloc_size < 0)
        else:
            yield from _allocations(event.children)


def _watched_on_gpu(work: Callable[[], None]) -> int:
    work()
    return torch.cuda.max_memory_allocated()


# --- what is told ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    point: Point
    truth: int
    others: list[int]  # what is compared with it

    def off(self, i: int = 0) -> float:
        return self.others[i] / self.truth - 1


def table(rows: Sequence[Row], columns: Sequence[str], unit: int, name: str) -> str:
    head = [*HEADER, *(f"{column}, {name}" for column in columns), "off"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        sizes = [f"{size / unit:.1f}" for size in (row.truth, *row.others)]
        offs = ", ".join(f"{row.off(i):+.1%}" for i in range(len(row.others)))
        lines.append(f"| {' | '.join([*row.point.cells, *sizes, offs])} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row], allowed: float) -> str:
    offs = [abs(row.off(i)) for row in rows for i in range(len(row.others))]
    inside = sum(off <= allowed for off in offs)
    return (
        f"{inside} of {len(offs)} are within {allowed:.0%}; the median is {median(offs):.1%} off, "
        f"the furthest {max(offs):.1%}."
    )


def compare(points: Sequence[Point], truth: Any, others: Sequence[Any]) -> Iterator[Row]:
    for i, point in enumerate(points, start=1):
        with tempfile.TemporaryDirectory(prefix="vectorlm-planner-") as name:
            began = time.monotonic()
            row = Row(point, truth(point, Path(name)), [f(point, Path(name)) for f in others])
        offs = ", ".join(f"{row.off(j):+.1%}" for j in range(len(others)))
        took = time.monotonic() - began
        print(
            f"{i}/{len(points)} {', '.join(point.cells)}: {row.truth / MIB:.0f} MiB, {offs}, "
            f"{took:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        yield row


def without_gpu() -> tuple[str, bool]:
    price = cost()
    depths = list(compare([grid()[i] for i in WHOLE], whole, [by_depth]))
    estimates = list(compare(grid(), by_depth, [estimated]))
    real = list(compare(SMALL, measured, [_simulated_on_cpu]))
    text = [
        circumstances(),
        wrapped(price),
        "### The estimate against the simulation",
        wrapped(
            f"{summary(estimates, 0.10)} AdamW throughout; HYBRID_SHARD on two nodes. Each point "
            f"is simulated with {SHALLOW[0]} and with {SHALLOW[1]} layers, and what each moment "
            f"gains by a layer is added up to the whole depth. Simulated whole, {len(depths)} of "
            f"them differ by {max(abs(row.off()) for row in depths):.2%} at most."
        ),
        table(estimates, ["simulated", "estimated"], GIB, "GiB"),
        "### The simulation against real ranks",
        wrapped(
            f"{summary(real, 0.05)} Real ranks over gloo train small Llamas with the trainer; the "
            "profiler records what torch's allocator gives out and takes back on the first of "
            "them. What gloo copies for itself is left out."
        ),
        table(real, ["measured", "simulated"], MIB, "MiB"),
    ]
    good = {0.10: estimates, 0.05: real, 0.001: depths}
    return "\n\n".join(text), all(abs(r.off()) <= most for most in good for r in good[most])


def _simulated_on_cpu(point: Point, folder: Path) -> int:
    return simulate(point.job(folder, gpu_capability=None)).peak_bytes


def with_gpu() -> tuple[str, bool]:
    rows = list(compare(ON_GPU, measured, [whole, estimated]))
    text = [
        circumstances(),
        "### Simulation and estimate against a GPU's allocator",
        f"{summary(rows, 0.08)} Measured is `torch.cuda.max_memory_allocated`.",
        table(rows, ["measured", "simulated", "estimated"], GIB, "GiB"),
    ]
    return "\n\n".join(text), all(abs(row.off(i)) <= 0.08 for row in rows for i in (0, 1))


def circumstances() -> str:
    where = platform.machine()
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "peft"))
    return wrapped(f"On {time.strftime('%Y-%m-%d')} by `{COMMAND}`: {where}, {versions}.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/planner.md")
    parser.add_argument("--gpu", action="store_true", help="measure on this machine's GPU")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.as_rank:
        as_rank(given.as_rank)
        return 0
    if given.gpu and not torch.cuda.is_available():
        print("--gpu: there is no CUDA GPU here", file=sys.stderr)
        return 2
    text, good = with_gpu() if given.gpu else without_gpu()
    print(text)
    if given.write:
        write(COMMAND + (" --gpu" if given.gpu else ""), text, PAPER)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
